"""Late quantization: before its step the decoder gets the features and the quantizer is idle; at it the codes are the
k-means of features; a stop anywhere changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_variants import VARIANTS
from training_runs import GAN, RUNTIME, assert_same_run, images_once, read_the_images_once, stop_after  # noqa: F401

from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.quantizers.updates import kmeans
from ibq.run_directory import RunDirectory
from ibq.training.checkpoint import load_checkpoint
from ibq.training.interventions import Intervention, amended, live_fields, scheduled
from ibq.training.runtime import Runtime, StopRequested
from ibq.training.tokenizer import features_from, train_tokenizer
from ibq.training.tokenizer_state import TrainingState

EVERY_STEP = Runtime(device="cpu", log_every=1, snapshots=0, eval_images=8)
TRAINED = (
    "vq",
    "vq cosine ema restart",
    "vq linear",
    "ibq",
    "lfq boosted",
    "simvq",
    "gumbel annealed",
    "diveq",
    "nsvq",
)
STOPPED = [*((variant, 4) for variant in TRAINED), ("vq cosine ema restart", 2), ("vq cosine ema restart", 5)]
"""The quantizer begins after step 4: stopped before it, at it and behind it."""


def late(tiny: Any, variant: str = "vq", **dotted: Any) -> TrainConfig:
    quantizer = {"codebook_size": 64, "code_dim": 6} | VARIANTS[variant]
    config = TrainConfig.parse(tiny().to_json_dict() | {"quantizer": quantizer, "steps": 8})
    return config.with_fields(**{"quantize_from": 0.5} | dotted)


def stopped(config: TrainConfig, folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint of a run that was stopped after so many steps."""
    with pytest.raises(StopRequested):
        list(train_tokenizer(config, folder, EVERY_STEP, stop_after(step)))
    checkpoint, _ = load_checkpoint(RunDirectory(folder).checkpoint)
    assert checkpoint is not None
    return checkpoint.tensors


def test_the_quantizer_is_idle_before_its_step(tiny: Any, tmp_path: Path) -> None:
    config = late(tiny, "vq with entropy")
    torch.manual_seed(config.seed)
    fresh = TrainingState(config, torch.device("cpu")).tokenizer.quantize.state_dict()
    tensors = stopped(config, tmp_path, 4)
    assert all(torch.equal(tensors[f"model.quantize.{name}"], value) for name, value in fresh.items())
    assert not [name for name in tensors if name.startswith("optimizer.quantize.")]
    list(train_tokenizer(config, tmp_path, EVERY_STEP))
    before, after = RunDirectory(tmp_path).read_history()[:4], RunDirectory(tmp_path).read_history()[4:]
    assert all(line["loss"] == pytest.approx(line["loss_pixel"]) and "perplexity" not in line for line in before)
    assert all("loss_commitment" in line and line["tokens"] == 4 * 64 for line in after)


def test_the_decoder_gets_the_features_themselves(tiny: Any) -> None:
    tokenizer = TrainingState(late(tiny), torch.device("cpu")).tokenizer
    images, z, quantized = tokenizer(torch.rand(2, 1, 32, 32) * 2 - 1, quantize=False)
    assert torch.equal(images, tokenizer.decoder(tokenizer.post_quant_conv(z)))
    assert quantized.z_q is z
    assert (quantized.indices.numel(), quantized.losses) == (0, {})


@pytest.mark.parametrize(
    "variant",
    ["vq", "vq ema", "vq linear", "ibq", "simvq", "gumbel", "diveq", "wasserstein", "vqbridge", "optvq", "nsvq"],
)
def test_codes_begin_as_the_k_means_of_features(tiny: Any, variant: str) -> None:
    config = late(tiny, variant)
    state = TrainingState(config, torch.device("cpu"))
    state.start_average()
    state.step = 4
    quantizer = state.tokenizer.quantize
    source = images_once(config.data, "train")
    features_MD = features_from(4, quantizer.features_to_cluster, state.tokenizer, config, source, state.device)
    state.begin_quantizing(features_MD)
    expected_KD = kmeans(features_MD, 64, torch.Generator().manual_seed(config.seed))
    torch.testing.assert_close(quantizer.codebook, expected_KD)
    averaged = state.averaged_tokenizer.quantize.state_dict()
    assert all(torch.equal(averaged[name], value) for name, value in quantizer.state_dict().items())
    assert state.quantized_since == 4
    # of the batches that come next, as many as four features a code need
    assert len(features_MD) == 4 * 64
    assert torch.equal(features_MD, features_from(4, 1, state.tokenizer, config, source, state.device)[:256])


@pytest.mark.parametrize(("variant", "step"), STOPPED)
def test_stop_and_resume_equals_the_uninterrupted_run(tiny: Any, tmp_path: Path, variant: str, step: int) -> None:
    config = late(tiny, variant)
    list(train_tokenizer(config, tmp_path / "whole", RUNTIME))
    with pytest.raises(StopRequested):
        list(train_tokenizer(config, tmp_path / "stopped", RUNTIME, stop_after(step)))
    torch.manual_seed(99)
    list(train_tokenizer(config, tmp_path / "stopped", RUNTIME))
    assert_same_run(RunDirectory(tmp_path / "stopped"), RunDirectory(tmp_path / "whole"))


def test_with_a_discriminator_and_micro_batches(tiny: Any, tmp_path: Path) -> None:
    config = late(tiny, "ibq", accumulate=2, **GAN)
    list(train_tokenizer(config, tmp_path, RUNTIME))
    first, last = RunDirectory(tmp_path).read_history()[0], RunDirectory(tmp_path).read_history()[-1]
    assert "loss_double" not in first
    assert {"loss_double", "loss_adversarial", "perplexity"} <= last.keys()


def test_schedules_begin_with_the_quantizer(tiny: Any, tmp_path: Path) -> None:
    tensors = stopped(late(tiny, "gumbel annealed"), tmp_path, 6)
    steps = next(value for name, value in tensors.items() if name.startswith("model.") and name.endswith(".steps"))
    assert steps == 1  # of the steps 4 and 5, which quantize, the second has one before it


def test_it_can_be_switched_on_while_a_run_trains(tiny: Any, tmp_path: Path) -> None:
    config = late(tiny)
    on = [Intervention(step=2, fields={"quantize_from": 0.0})]
    list(train_tokenizer(config, tmp_path / "whole", EVERY_STEP, intervene=scheduled(on)))
    has = ["perplexity" in line for line in RunDirectory(tmp_path / "whole").read_history()]
    assert has == [False] * 2 + [True] * 6
    with pytest.raises(StopRequested):
        list(train_tokenizer(config, tmp_path / "stopped", EVERY_STEP, stop_after(3), intervene=scheduled(on)))
    list(train_tokenizer(config, tmp_path / "stopped", EVERY_STEP))
    assert_same_run(RunDirectory(tmp_path / "stopped"), RunDirectory(tmp_path / "whole"))


def test_it_cannot_be_put_off_while_a_run_trains(tiny: Any) -> None:
    assert "quantize_from" in live_fields(late(tiny))
    assert "quantize_from" not in live_fields(late(tiny, quantize_from=0.0))
    with pytest.raises(ConfigError, match=r"quantize_from=0\.9 cannot be set while a run trains; 0 switches"):
        amended(late(tiny), {"quantize_from": 0.9})


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_it_is_a_share_of_the_run(tiny: Any, share: float) -> None:
    with pytest.raises(ConfigError, match="quantize_from"):
        late(tiny, quantize_from=share)
