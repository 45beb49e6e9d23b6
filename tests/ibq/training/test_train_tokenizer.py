"""The trainer on real images at a tiny size: repeatable, resumable bit for bit, honest about what it logs."""

from __future__ import annotations

import functools
import itertools
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import RUNTIME, assert_same_run, assert_same_tensors, images_once, read_the_images_once, stop_after  # noqa: F401

import ibq.training.tokenizer as trainer
from ibq import load_tokenizer
from ibq.config import TrainConfig
from ibq.data.loader import batch_indices
from ibq.distributed import resolve_device
from ibq.errors import ConfigError, NonFiniteError
from ibq.evaluation.tokenizer import evaluate
from ibq.losses import loss_weights
from ibq.metrics.codebook import code_gap
from ibq.metrics.dimension import DIMENSIONS, Moments, dimension_metrics
from ibq.run_directory import RunDirectory
from ibq.training.checkpoint import load_checkpoint
from ibq.training.logging import GAPS
from ibq.training.runtime import LogEvent, Runtime, StopRequested
from ibq.training.tokenizer import train_tokenizer

CHECKPOINT_ALWAYS = Runtime(device="cpu", log_every=2, snapshots=3, eval_images=8, checkpoint_every_s=0)
ARMS = {
    "vq": ("vq", {}),
    "ibq": ("ibq", {}),
    "vq from features": ("vq", {"quantizer.codebook_init": "features"}),
    "ibq in bf16": ("ibq", {"precision": "bf16"}),
}
every_arm = pytest.mark.parametrize("arm", ARMS)


@pytest.fixture(scope="module")
def finished(
    tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[RunDirectory, list[LogEvent]]]:
    """An uninterrupted run of each arm, trained once."""

    @functools.cache
    def train(arm: str) -> tuple[RunDirectory, list[LogEvent]]:
        method, fields = ARMS[arm]
        folder = tmp_path_factory.mktemp("finished")
        return RunDirectory(folder), list(train_tokenizer(tiny(method, **fields), folder, RUNTIME))

    return train


def of_arm(tiny: Any, arm: str) -> TrainConfig:
    method, fields = ARMS[arm]
    return tiny(method, **fields)


# --- A whole run ------------------------------------------------------------------------------------------------------


@every_arm
def test_one_seed_gives_one_run(tiny: Any, finished: Any, tmp_path: Path, arm: str) -> None:
    run, _ = finished(arm)
    list(train_tokenizer(of_arm(tiny, arm), tmp_path, RUNTIME))
    assert_same_run(RunDirectory(tmp_path), run)


def test_another_seed_gives_another_run(tiny: Any, finished: Any, tmp_path: Path) -> None:
    run, _ = finished("ibq")
    list(train_tokenizer(tiny(seed=1), tmp_path, RUNTIME))
    other = RunDirectory(tmp_path)
    assert other.read_history()[0]["loss"] != run.read_history()[0]["loss"]
    assert other.read_row()["run"] != run.read_row()["run"]


def test_log_cadence_snapshots_and_checkpoints_do_not_change_the_numbers(
    tiny: Any, finished: Any, tmp_path: Path
) -> None:
    run, _ = finished("ibq")
    list(
        train_tokenizer(
            tiny(), tmp_path, Runtime(device="cpu", log_every=3, snapshots=0, eval_images=8, checkpoint_every_s=0)
        )
    )
    other = RunDirectory(tmp_path)
    assert [line["step"] for line in other.read_history()] == [3, 6, 8]
    assert other.snapshot_steps() == []
    assert_same_tensors(load_file(other.model), load_file(run.model))


@every_arm
def test_events_are_the_lines_of_the_history(finished: Any, arm: str) -> None:
    run, events = finished(arm)
    assert [event.record for event in events] == run.read_history()
    assert [(event.step, event.steps) for event in events] == [(2, 8), (4, 8), (6, 8), (8, 8)]
    assert [event.record["step"] for event in events] == [2, 4, 6, 8]


@every_arm
def test_the_directory_of_a_finished_run(tiny: Any, finished: Any, arm: str) -> None:
    run, _ = finished(arm)
    assert {path.name for path in run.path.iterdir()} == {
        "config.json",
        "history.jsonl",
        "snapshots",
        "model.safetensors",
        "eval",
        "row.json",
    }
    config, row = of_arm(tiny, arm), run.read_row()
    assert json.loads(run.config.read_text()) == config.to_json_dict()
    content_hash = images_once(config.data, "train").content_hash
    assert (row["status"], row["run"], row["data_hash"]) == ("ok", config.run_id(content_hash), content_hash)
    assert (row["method"], row["codebook_size"], row["code_dim"], row["seed"]) == (config.quantizer.method, 16, 8, 0)
    assert row["parameters"] == sum(parameter.numel() for parameter in load_tokenizer(run.path).parameters())
    assert row["train_seconds"] == run.read_history()[-1]["seconds"] > 0
    assert row["config.optim.lr"] == config.optim.lr
    assert (row["protocol.n_images"], row["protocol.split"], row["protocol.weights"]) == (8, "test", "ema")


@every_arm
def test_the_total_loss_is_the_weighted_sum_of_the_logged_terms(tiny: Any, finished: Any, arm: str) -> None:
    run, _ = finished(arm)
    weights = loss_weights(of_arm(tiny, arm))
    for line in run.read_history():
        terms = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss_")}
        assert terms.keys() == weights.keys()
        assert line["loss"] == pytest.approx(sum(weights[name] * value for name, value in terms.items()), rel=1e-5)


@every_arm
def test_every_token_is_counted_once(finished: Any, arm: str) -> None:
    run, _ = finished(arm)
    tokens = 4 * 64
    assert [line["tokens"] for line in run.read_history()] == [2 * tokens] * 4
    assert run.snapshot_steps() == [0, 4, 8]
    assert [int(run.read_snapshot(step)["counts"].sum()) for step in (0, 4, 8)] == [0, 4 * tokens, 4 * tokens]
    assert int(load_file(run.evaluation)["counts_K"].sum()) == run.read_row()["tokens"] == 8 * 64


def test_the_mean_pixel_loss_is_of_every_batch_since_the_last_line(tiny: Any, finished: Any, tmp_path: Path) -> None:
    list(train_tokenizer(tiny(), tmp_path, Runtime(device="cpu", log_every=1, snapshots=0, eval_images=8)))
    each = [line["loss_pixel"] for line in RunDirectory(tmp_path).read_history()]
    means = [line["pixel_mean"] for line in finished("ibq")[0].read_history()]
    assert means == pytest.approx([(each[i] + each[i + 1]) / 2 for i in range(0, 8, 2)])


def test_snapshots_hold_what_figures_need(finished: Any) -> None:
    run, _ = finished("ibq")
    snapshot = run.read_snapshot(8)
    assert {name: tuple(tensor.shape) for name, tensor in snapshot.items() if name not in (*GAPS, *DIMENSIONS)} == {
        "codes": (16, 8),
        "code_indices": (16,),
        "features": (2048, 8),
        "counts": (16,),
        "code_norms": (16,),
    }
    in_use = snapshot["counts"][snapshot["code_indices"]] > 0
    gaps = code_gap(snapshot["features"], snapshot["codes"], in_use)
    assert {name: snapshot[name].item() for name in GAPS if name in snapshot} == pytest.approx(gaps)
    assert {name: run.read_row()[name] for name in gaps} == pytest.approx(gaps)
    assert run.read_row()["protocol.gap"].startswith(
        "raw weights; at most 2048 features of the first test images, 1024 codes; in use: "
    )
    assert [name for name in GAPS if name in run.read_snapshot(0)] == ["gap", "gap_angular"]  # nothing is counted yet
    features = Moments(8, snapshot["features"].device)
    features.update(snapshot["features"])
    dimensions = dimension_metrics(features, snapshot["codes"], snapshot["counts"])  # all codes are watched ones
    assert {name: snapshot[name].item() for name in DIMENSIONS} == pytest.approx(dimensions)
    assert not {"dimension_used", "dimension99_used"} & run.read_snapshot(0).keys()
    assert set(DIMENSIONS) <= run.read_row().keys()
    assert all(set(DIMENSIONS) <= line.keys() for line in run.read_history())
    assert "each weighted by its tokens in these images" in run.read_row()["protocol.dimension"]
    torch.testing.assert_close(snapshot["code_norms"][snapshot["code_indices"]], snapshot["codes"].norm(dim=1))
    assert not torch.equal(run.read_snapshot(0)["codes"], snapshot["codes"])


def test_the_learning_rate_that_is_logged_follows_the_schedule(tiny: Any, finished: Any) -> None:
    run, _ = finished("vq")
    assert [line["lr"] for line in run.read_history()] == [
        tiny("vq").lr_at(line["step"] - 1) for line in run.read_history()
    ]
    assert len({line["lr"] for line in run.read_history()}) > 1


@pytest.mark.parametrize("arm", ["vq", "ibq"])
def test_gradient_reach_tells_vq_from_ibq(finished: Any, arm: str) -> None:
    """Few features sit on many codes here, so VQ's gradient stays with the selected ones and IBQ's goes everywhere."""
    for line in finished(arm)[0].read_history():
        assert (line["reach_above_eps"] == 1) == (arm == "ibq")
        assert 1 <= line["reach_effective"] <= 16


@every_arm
def test_a_finished_run_loads_and_reproduces_the_metrics_of_its_row(tiny: Any, finished: Any, arm: str) -> None:
    run, _ = finished(arm)
    tokenizer = load_tokenizer(run.path)
    row, images = run.read_row(), images_once(tokenizer.config.data, "test")
    for batch_size in (8, 3):
        metrics, protocol, tensors = evaluate(tokenizer, images, 8, batch_size, weights="ema")
        assert {name: row[name] for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        assert {name: row[f"protocol.{name}"] for name in protocol} == protocol
        assert torch.equal(tensors["counts_K"], load_file(run.evaluation)["counts_K"])
        assert tensors["reconstructions_BCHW"].shape == ((8 if batch_size == 8 else 3), 1, 32, 32)
    assert not tokenizer.training


def test_training_lowers_the_loss(tiny: Any, tmp_path: Path) -> None:
    events = list(train_tokenizer(tiny("vq", steps=60, **{"optim.lr": 1e-2}), tmp_path, RUNTIME))
    first, last = (sum(event.record["loss_pixel"] for event in part) for part in (events[:3], events[-3:]))
    assert last < 0.6 * first


def test_codes_drawn_from_features_are_features_of_the_runs_first_images(tiny: Any, finished: Any) -> None:
    run, _ = finished("vq from features")
    config = tiny("vq", **{"quantizer.codebook_init": "features"})
    torch.manual_seed(config.seed)
    untrained = trainer.Tokenizer(config).to(memory_format=torch.channels_last)
    images = images_once(config.data, "train").batch(batch_indices(0, 0, 60_000, 4), "cpu")
    features_ND = untrained.features(images).detach().permute(0, 2, 3, 1).reshape(-1, 8)
    distance_K = (run.read_snapshot(0)["codes"][:, None] - features_ND).norm(dim=2).min(1).values
    assert distance_K.max() < 1e-5


def test_a_row_of_fashion_mnist_has_the_distances_of_its_images(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=2)
    images_once(config.data, "train"), images_once(config.data, "test")
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    list(train_tokenizer(config, tmp_path / "run", Runtime(device="cpu", snapshots=0, eval_images=100)))
    row = RunDirectory(tmp_path / "run").read_row()
    assert row["status"] == "ok"
    assert row["fid[fashion-cnn]"] > 0
    assert "100 uint8 images against 100" in row["protocol.distances[fashion-cnn]"]
    assert "fid" not in row
    assert "protocol.gap" not in row  # without snapshots


def test_a_gap_that_is_no_number_stays_out_of_the_row(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(*arguments: Any) -> dict[str, torch.Tensor]:
        return trainer_snapshot(*arguments) | {"gap": torch.tensor(math.inf), "gap_used": torch.tensor(0.5)}

    trainer_snapshot = trainer.take_snapshot
    monkeypatch.setattr(trainer, "take_snapshot", snapshot)
    list(train_tokenizer(tiny(steps=2), tmp_path, RUNTIME))
    row = RunDirectory(tmp_path).read_row()
    assert (row["status"], row["gap_used"], "gap" in row) == ("ok", 0.5, False)


def test_the_peak_of_memory_is_that_of_training(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def costly(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2**40))
        return evaluate(*arguments, **named)

    monkeypatch.setattr(trainer, "evaluate", costly)
    list(train_tokenizer(tiny(steps=2), tmp_path, RUNTIME))
    assert 0 < RunDirectory(tmp_path).read_row()["peak_memory_gib"] < 2**10


# --- The averaged weights ---------------------------------------------------------------------------------------------


def test_the_averaged_weights_are_an_exponential_moving_average(tiny: Any, tmp_path: Path) -> None:
    """Each checkpoint, written at every step, holds weights and average; the event of a step finds that of the step
    before on disk."""
    config = tiny(steps=6, **{"optim.ema_decay": 0.7})
    every_step = Runtime(device="cpu", log_every=1, snapshots=2, eval_images=8, checkpoint_every_s=0)
    states = [load_checkpoint(tmp_path / "checkpoint")[0] for _ in train_tokenizer(config, tmp_path, every_step)][1:]
    names = [
        name.removeprefix("model.") for name in states[0][0] if name.startswith("model.") and "initialized" not in name
    ]
    assert [meta["step"] for _, meta in states] == [1, 2, 3, 4, 5]
    for (before, _), (after, _) in itertools.pairwise(states):
        for name in names:
            expected = 0.7 * before[f"average.module.{name}"] + 0.3 * after[f"model.{name}"]
            torch.testing.assert_close(after[f"average.module.{name}"], expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(after[f"average.module.{name}"], after[f"model.{name}"])
    run, last_average = RunDirectory(tmp_path), states[-1][0]["average.module.quantize.embedding"]
    last_codes = run.read_snapshot(6)["codes"]
    torch.testing.assert_close(
        load_file(run.model)["quantize.embedding"], 0.7 * last_average + 0.3 * last_codes, rtol=1e-5, atol=1e-6
    )


def test_without_decay_the_evaluated_weights_are_the_last_ones(tiny: Any, tmp_path: Path) -> None:
    every_step = Runtime(device="cpu", log_every=1, snapshots=2, eval_images=8)
    list(train_tokenizer(tiny(**{"optim.ema_decay": 0.0}), tmp_path, every_step))
    run = RunDirectory(tmp_path)
    assert torch.equal(load_file(run.model)["quantize.embedding"], run.read_snapshot(8)["codes"])


# --- Stopping, dying, resuming ----------------------------------------------------------------------------------------


@every_arm
@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_stop_and_resume_equals_the_uninterrupted_run(
    tiny: Any, finished: Any, tmp_path: Path, arm: str, steps: int
) -> None:
    config = of_arm(tiny, arm)
    with pytest.raises(StopRequested, match=f"step {steps} of 8"):
        list(train_tokenizer(config, tmp_path, RUNTIME, stop_after(steps)))
    run = RunDirectory(tmp_path)
    assert not run.finished
    torch.manual_seed(99)  # another process would not share this one's random state
    resumed = list(train_tokenizer(config, tmp_path, RUNTIME))
    assert [event.step for event in resumed] == [step for step in (2, 4, 6, 8) if step > steps]
    assert_same_run(run, finished(arm)[0])


@pytest.mark.parametrize("arm", ["vq", "ibq", "vq from features"])
@pytest.mark.parametrize("runtime", [RUNTIME, CHECKPOINT_ALWAYS], ids=["no checkpoint yet", "checkpoint every step"])
def test_a_killed_run_resumes_to_the_same_end(
    tiny: Any, finished: Any, tmp_path: Path, arm: str, runtime: Runtime
) -> None:
    """Killed while its third event is looked at: lines and snapshots beyond the last checkpoint are on disk and are
    redone."""
    config = of_arm(tiny, arm)
    abandoned = train_tokenizer(config, tmp_path, runtime)
    for _ in range(3):
        next(abandoned)
    abandoned.close()
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    checkpoint, _ = load_checkpoint(tmp_path / "checkpoint")
    assert (checkpoint is None) == (runtime is RUNTIME)
    resumed = list(train_tokenizer(config, tmp_path, RUNTIME))
    assert [event.step for event in resumed] == ([2, 4, 6, 8] if checkpoint is None else [6, 8])
    assert_same_run(RunDirectory(tmp_path), finished(arm)[0])


def test_a_run_that_is_stopped_again_and_again_ends_the_same(tiny: Any, finished: Any, tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(StopRequested):
            list(train_tokenizer(tiny("vq"), tmp_path, RUNTIME, stop_after(2)))
    list(train_tokenizer(tiny("vq"), tmp_path, RUNTIME))
    assert_same_run(RunDirectory(tmp_path), finished("vq")[0])


def test_two_runs_may_advance_in_turns_in_one_process(tiny: Any, finished: Any, tmp_path: Path) -> None:
    turns = [train_tokenizer(of_arm(tiny, arm), tmp_path / arm, RUNTIME) for arm in ("vq", "ibq")]
    for events in itertools.zip_longest(*turns):
        assert all(events)
    for arm in ("vq", "ibq"):
        assert_same_run(RunDirectory(tmp_path / arm), finished(arm)[0])


def test_a_finished_run_is_not_run_again(tiny: Any, tmp_path: Path) -> None:
    list(train_tokenizer(tiny(), tmp_path, RUNTIME))
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert list(train_tokenizer(tiny(), tmp_path, RUNTIME)) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_the_directory_of_another_config_is_refused_by_the_field(tiny: Any, tmp_path: Path, state: str) -> None:
    if state == "stopped":
        with pytest.raises(StopRequested):
            list(train_tokenizer(tiny(), tmp_path, RUNTIME, stop_after(2)))
    else:
        list(train_tokenizer(tiny(), tmp_path, RUNTIME))
    with pytest.raises(ConfigError, match=r"quantizer\.code_dim=8, not 4; pass another directory"):
        list(train_tokenizer(tiny(**{"quantizer.code_dim": 4}), tmp_path, RUNTIME))
    if state == "stopped":
        assert len(list(train_tokenizer(tiny(), tmp_path, RUNTIME))) == 3, (
            "the refused attempt must not have harmed the run"
        )


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("log_every", 0, 1),
        ("snapshots", -1, 0),
        ("eval_images", 0, 1),
        ("eval_batch_size", 0, 1),
        ("workers", -1, 0),
        ("checkpoint_every_s", -1, 0),
    ],
)
def test_a_cadence_out_of_range_is_refused_before_anything_is_trained(field: str, value: int, least: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}={value} is too small; choose {least} or more$"):
        Runtime(**{field: value})


# --- Refusals and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vq", "ibq"])
def test_a_diverging_run_ends_with_a_named_term_and_a_row_without_metrics(
    tiny: Any, tmp_path: Path, method: str
) -> None:
    config = tiny(method, **{"optim.lr": 1e30})
    named = (
        r"loss term '\w+' is (nan|inf)|the gradient of '[\w.]+' is not finite|\d+ of \d+ values of features are "
        r"NaN or infinite"
    )
    with pytest.raises(NonFiniteError, match=rf"^step \d+: ({named})") as caught:
        list(train_tokenizer(config, tmp_path, RUNTIME))
    run = RunDirectory(tmp_path)
    row = run.read_row()
    assert (row["status"], row["reason"]) == ("nan", str(caught.value))
    assert not {"perplexity", "usage", "l1", "psnr_db", "ssim", "quantization_error"} & row.keys()
    assert not run.model.exists()
    assert list(train_tokenizer(config, tmp_path, RUNTIME)) == [], "nan is a final state"
    assert all(math.isfinite(line["loss"]) for line in run.read_history())


def test_more_images_a_step_than_there_are_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=60001 exceeds the 60000 training images of fashion-mnist"):
        list(train_tokenizer(tiny(batch_size=60_001), tmp_path, RUNTIME))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_refused_and_auto_falls_back() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device='cuda:0' .* use device='auto' or 'cpu'"):
        resolve_device("cuda:0")
    for name in ("meta", "mps", "cpu:3"):
        with pytest.raises(ConfigError, match=f"^device='{name}' "):
            resolve_device(name)
