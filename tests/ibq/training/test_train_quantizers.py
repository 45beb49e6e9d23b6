"""The trainer with every quantizer: what they keep beside parameters survives a stop, and errors are measured where
codes are compared."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_variants import VARIANTS
from safetensors.torch import load_file
from training_runs import GAN, RUNTIME, assert_same_run, images_once, read_the_images_once, stop_after  # noqa: F401

from ibq import load_tokenizer
from ibq.config import TrainConfig
from ibq.errors import ConfigError, NonFiniteError
from ibq.metrics.dimension import DIMENSIONS
from ibq.run_directory import RunDirectory
from ibq.training.checkpoint import load_checkpoint
from ibq.training.runtime import StopRequested
from ibq.training.tokenizer import train_tokenizer

TRAINED = (
    "vq cosine",
    "vq ema restart",
    "vq restart",
    "vq online",
    "vq kmeans",
    "vq linear",
    "vq cosine ema restart",
    "vq kmeans rotation",
    "vq online cosine",
    "ibq soft path to codes",
    "ibq cosine",
    "lfq boosted",
    "bsq",
    "fsq",
    "fsq cdf",
    "simvq",
    "vqbridge kmeans",
    "optvq",
    "nsvq",
    "spherical",
    "grouped ibq",
    "grouped vq ema restart",
    "grouped dropping",
    "gumbel",
    "gumbel annealed",
    "diveq",
    "diveq curve",
    "wasserstein",
)
CODES_WITHOUT_GRADIENT = (  # or with those of parts
    *("vq ema restart", "vq cosine ema restart", "lfq boosted", "bsq", "fsq", "fsq cdf", "simvq", "spherical"),
    *("grouped ibq", "grouped vq ema restart", "grouped dropping"),
)


@pytest.fixture(scope="module")
def config_of(tiny: Any) -> Callable[[str], TrainConfig]:
    def make(variant: str) -> TrainConfig:
        quantizer = {"codebook_size": 64, "code_dim": 6} | VARIANTS[variant]
        return TrainConfig.parse(tiny().to_json_dict() | {"quantizer": quantizer, "steps": 6})

    return make


@pytest.fixture(scope="module")
def finished(config_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    @functools.cache
    def train(variant: str) -> RunDirectory:
        folder = tmp_path_factory.mktemp("finished")
        list(train_tokenizer(config_of(variant), folder, RUNTIME))
        return RunDirectory(folder)

    return train


@pytest.mark.parametrize("variant", TRAINED)
def test_stop_and_resume_equals_the_uninterrupted_run(
    config_of: Any, finished: Any, tmp_path: Path, variant: str
) -> None:
    with pytest.raises(StopRequested):
        list(train_tokenizer(config_of(variant), tmp_path, RUNTIME, stop_after(3)))
    torch.manual_seed(99)
    list(train_tokenizer(config_of(variant), tmp_path, RUNTIME))
    assert_same_run(RunDirectory(tmp_path), finished(variant))


@pytest.mark.parametrize("variant", TRAINED)
def test_a_finished_run_loads_and_its_numbers_are_finite(finished: Any, variant: str) -> None:
    run = finished(variant)
    row, history = run.read_row(), run.read_history()
    assert row["status"] == "ok"
    assert all(math.isfinite(value) for line in history for value in line.values())
    assert [("reach_effective" in line) for line in history] == [variant not in CODES_WITHOUT_GRADIENT] * len(history)
    tokenizer, snapshot = load_tokenizer(run.path), run.read_snapshot(6)
    x_BCHW = torch.rand(2, 1, 32, 32)
    assert torch.equal(tokenizer.decode(tokenizer.encode(x_BCHW)), tokenizer(x_BCHW).images)
    D = tokenizer.config.quantizer.code_dim
    assert (snapshot["codes"].shape, snapshot["features"].shape, snapshot["code_norms"].shape) == (
        (64, D),
        (2048, D),
        (64,),
    )


@pytest.mark.parametrize("variant", ["vq cosine", "ibq cosine", "bsq", "fsq", "spherical"])
def test_features_and_errors_are_in_the_space_of_the_codes(finished: Any, variant: str) -> None:
    run = finished(variant)
    snapshot = run.read_snapshot(6)
    codes_KD, features_ND = snapshot["codes"], snapshot["features"]
    if variant == "fsq":
        assert features_ND.abs().max() < 1.01
    else:
        torch.testing.assert_close(features_ND.norm(dim=1), torch.ones(2048))
        torch.testing.assert_close(codes_KD.norm(dim=1), torch.ones(64))
        assert {round(line["feature_norm"], 4) for line in run.read_history()} == {1.0}
    nearest = (features_ND[:, None] - codes_KD).square().sum(2).min(1).values.mean() / features_ND.var(
        0, correction=0
    ).sum()
    assert run.read_history()[-1]["quantization_error"] == pytest.approx(nearest.item(), rel=0.5)

    tokenizer = load_tokenizer(run.path)
    _, z_BDHW, quantized = tokenizer(
        images_once(tokenizer.config.data, "test").batch(torch.arange(8), torch.device("cpu"))
    )
    space_BDHW = tokenizer.quantize.to_code_space(z_BDHW)
    error = (space_BDHW - quantized.z_q).square().sum() / (
        space_BDHW - space_BDHW.mean((0, 2, 3), keepdim=True)
    ).square().sum()
    assert run.read_row()["quantization_error"] == pytest.approx(error.item(), rel=1e-3)


def test_codes_that_are_averages_are_not_averaged_again_and_have_no_optimizer_state(
    config_of: Any, tmp_path: Path
) -> None:
    with pytest.raises(StopRequested):
        list(train_tokenizer(config_of("vq ema restart"), tmp_path, RUNTIME, stop_after(3)))
    tensors = load_checkpoint(tmp_path / "checkpoint")[0].tensors
    assert not [name for name in tensors if name.startswith("optimizer.quantize")]
    average, raw = tensors["average.module.quantize.embedding"], tensors["model.quantize.embedding"]
    assert torch.equal(average, raw)
    for name in (
        "restart.usage_K",
        "restart.weight_K",
        "restart.anchors_KD",
        "moving_average.counts_K",
        "moving_average.observed",
    ):
        assert torch.equal(tensors[f"average.module.quantize.{name}"], tensors[f"model.quantize.{name}"])


def test_a_restarted_code_is_restarted_in_the_averaged_weights_at_once(config_of: Any, tmp_path: Path) -> None:
    """A checkpoint every step; where a code is restarted in a step, its average is the code, and where it is not, it is
    not."""
    runtime = replace(RUNTIME, log_every=1, checkpoint_every_s=0)
    config = config_of("vq restart").with_fields(**{"quantizer.restart_threshold": 0.9})
    states = [
        load_checkpoint(tmp_path / "checkpoint")[0].tensors
        for event in train_tokenizer(config, tmp_path, runtime)
        if event.step > 1
    ]
    restarted = []
    for before, after in itertools.pairwise(states):
        moved_K = before["model.quantize.restart.weight_K"].bool()
        equal_K = (after["average.module.quantize.embedding"] == after["model.quantize.embedding"]).all(1)
        assert torch.equal(equal_K, moved_K)
        restarted.append(int(moved_K.sum()))
    assert 0 < sum(restarted) < 64 * len(restarted)


@pytest.mark.parametrize("variant", ["vq", "ibq", "fsq", "lfq", "gumbel"])
@pytest.mark.parametrize("steps", [6, 1], ids=["in training", "at the last update"])
def test_features_that_leave_the_finite_numbers_end_a_run_with_a_row(
    config_of: Any, tmp_path: Path, variant: str, steps: int
) -> None:
    config = config_of(variant).with_fields(**{"optim.lr": 1e38, "optim.ema_decay": 0.0, "steps": steps})
    with pytest.raises(NonFiniteError, match=f"step {min(steps, 1)}: ") as caught:
        list(train_tokenizer(config, tmp_path, RUNTIME))
    row = RunDirectory(tmp_path).read_row()
    assert (row["status"], row["reason"]) == ("nan", str(caught.value))


# --- Steps, not forwards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("adversarial", [False, True], ids=["L1", "adversarial"])
def test_schedules_of_a_run_follow_its_steps_whatever_the_micro_batches(
    config_of: Any, tmp_path: Path, accumulate: int, adversarial: bool
) -> None:
    """LFQ's boost was over in a quarter of its steps."""
    changes = {"accumulate": accumulate, "batch_size": 8, "quantizer.entropy_boost_steps": 8}
    config = config_of("lfq boosted").with_fields(**changes | (GAN if adversarial else {}))
    list(train_tokenizer(config, tmp_path, replace(RUNTIME, log_every=1)))
    factors = [
        line["loss_entropy_boost"] / (line["loss_sample_entropy"] - line["loss_codebook_entropy"])
        for line in RunDirectory(tmp_path).read_history()
    ]
    assert factors == pytest.approx([2 * (1 - step / 8) for step in range(6)], rel=1e-3)
    assert load_file(RunDirectory(tmp_path).model)["quantize.schedule.steps"] == 5


def test_a_temperature_that_follows_steps_may_have_micro_batches_and_noise_may_not(config_of: Any) -> None:
    quiet = config_of("gumbel annealed").with_fields(**{"quantizer.noise": False, "batch_size": 8, "accumulate": 4})
    assert quiet.accumulate == 4
    with pytest.raises(ConfigError, match="accumulate=4 would move what method='gumbel' changes or draws"):
        config_of("gumbel annealed").with_fields(batch_size=8, accumulate=4)


# --- Too many codes to count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bsq", "fsq", "grouped"])
def test_a_codebook_too_large_to_count_trains_and_says_what_is_absent(
    config_of: Any, tmp_path: Path, method: str
) -> None:
    """Windows of counts asked for 512 GiB each."""
    sizes = {
        "bsq": {"code_dim": 36},
        "fsq": {"code_dim": 12, "levels": (8,) * 12},
        "grouped": {"code_dim": 12, "groups": 3, "inner": {"method": "vq"}},
    }[method]
    tree = config_of("bsq").to_json_dict() | {"quantizer": {"method": method, "codebook_size": 2**36} | sizes}
    with pytest.raises(StopRequested):
        list(train_tokenizer(TrainConfig.parse(tree), tmp_path, RUNTIME, stop_after(3)))
    events = list(train_tokenizer(TrainConfig.parse(tree), tmp_path, RUNTIME))
    assert [event.step for event in events] == [4, 6]
    run = RunDirectory(tmp_path)
    row = run.read_row()
    assert row["status"] == "ok"
    assert not {"usage", "perplexity", "bits", "dead_codes"} & row.keys()
    assert row["protocol.usage"] == (
        "absent: 68,719,476,736 codes are too many to be counted one by one, 16,777,216 are the most"
    )
    assert math.isfinite(row["l1"])
    assert math.isfinite(row["quantization_error"])
    for measured in (row, run.read_history()[-1], run.read_snapshot(6)):
        assert {name for name in DIMENSIONS if name in measured} == {"dimension_features", "dimension99_features"}
    assert len(run.read_snapshot(6)["codes"]) == 1024
    most = {"bsq": 2, "fsq": 8, "grouped": 4096}[method]
    for line in (row, *run.read_history()):
        assert 1 / most <= line["part_usage"] <= 1
        assert 1 <= line["part_perplexity"] <= most
    assert all("usage" not in line and line["codebook_size"] == 2**36 for line in run.read_history())
