"""Several processes train what one does: weights, history, snapshots and row; they stop, fail and go on together, and one of them writes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from training_runs import GAN, SMALL, TIMED, WITHOUT_EFFECT, images_once, stop_after, untimed, weights_of

import ibq.train_tokenizer as trainer
from ibq.config import DataConfig, TrainConfig, parse_train_config
from ibq.data import DataError, Images
from ibq.distributed import Processes, barrier
from ibq.errors import ConfigError, NonFiniteError
from ibq.run_directory import RunDirectory
from ibq.train_tokenizer import Runtime, StopRequested, train_tokenizer
from ibq.training_state import TrainingState

RUNTIME = Runtime(device="cpu", log_every=2, snapshots=3, eval_images=10, eval_batch_size=4)
MODEL = {"base_channels": 4, "channel_multipliers": (1, 2, 2), "res_blocks": 1, "z_channels": 8, "norm_groups": 4}
VQ = {"method": "vq", "codebook_init": "features", "beta_on": "commitment", "ema_decay": 0.9, "entropy_weight": 0.05}
LFQ = {"method": "lfq", "codebook_size": 16, "code_dim": 4}
ARMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "adaptive": {"loss.adversarial.adaptive": True},
    "two micro-batches": {"accumulate": 2, "loss.adversarial.adaptive": True, "optim.clip_norm": 0.5},
    "starts late, one player before": {"loss.adversarial.start": 0.5},
    "vq": {"quantizer": VQ},
    "lfq": {"quantizer": LFQ},
}
OTHER = {"local": {"averages": "local"}, "bf16": {"precision": "bf16"}}
CLOSE = 1e-5
OF_ONE_PROCESS = {"feature_norm", "quantization_error", "logit_std", "largest_probability"} | TIMED
"""What the history has of rank 0's images alone."""


def config_of(arm: str) -> TrainConfig:
    fields = (ARMS | OTHER)[arm]
    quantizer = {"method": "ibq", "codebook_size": 16, "code_dim": 8} | fields.get("quantizer", {})
    config = parse_train_config({"model": MODEL, "quantizer": quantizer, "steps": 5, "batch_size": 8})
    return config.with_fields(**GAN | {"optim.lr": SMALL} | {name: value for name, value in fields.items() if name != "quantizer"})


class Seen(TrainingState):
    """The state that the trainer has made, for tests to look into."""

    last: TrainingState

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Seen.last = self


def train(arm: str, folder: Path, should_stop: Callable[[], bool] = lambda: False, at_step: Callable[[int], None] = lambda _: None) -> str:
    """Returns what the run was ended with, '' if it came to its end."""
    try:
        for event in train_tokenizer(config_of(arm), folder, RUNTIME, should_stop):
            at_step(event.step)
    except (StopRequested, NonFiniteError, ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(autouse=True, scope="module")
def _watched() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        watch(patch)
        yield


def watch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer, "TrainingState", Seen)
    patch.setattr(trainer, "load_images", images_once)


def weights() -> dict[str, torch.Tensor]:
    return {name: weights_of(player.network) for name, player in Seen.last.players.items()}


# --- What the two processes do ------------------------------------------------------------------------------------------------------------


def train_together(processes: Processes, folder: Path) -> None:
    patch = pytest.MonkeyPatch()
    watch(patch)
    said: dict[str, str] = {}
    for arm in ARMS | OTHER:
        run = folder / ("together" if processes.rank == 0 else "nothing") / arm
        said[arm] = train(arm, run)
        torch.save(weights(), folder / f"{arm} {processes.rank}.pt")
    stop_and_go_on(processes, folder, said)
    lose(processes, folder, said)
    refuse(processes, folder, said, patch)
    torch.save(said, folder / f"said by {processes.rank}.pt")


def stop_and_go_on(processes: Processes, folder: Path, said: dict[str, str]) -> None:
    never = lambda: False  # noqa: E731
    for arm in RESUMED:
        stopped = folder / f"{arm} stopped by two"
        said[f"{arm} stopped"] = train(arm, stopped, stop_after(3) if processes.rank == 1 else never)
        if processes.rank == 0:
            shutil.copytree(stopped, folder / f"{arm} two then one")
        barrier()
        for name in (f"{arm} stopped by two", f"{arm} one then two"):
            said[name] = train(arm, folder / name)
            if processes.rank == 0:
                torch.save(weights(), folder / name / "weights.pt")


RESUMED = ("whole", "two micro-batches")


def poison_images(state: TrainingState) -> None:
    def first_layer(module: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        arguments[0][0, 0, 0] = math.nan
        return arguments

    state.tokenizer.encoder.conv_in.register_forward_pre_hook(first_layer)


def poison_decoder(state: TrainingState) -> None:
    next(state.tokenizer.decoder.parameters()).data[0] = math.inf


def poison_codebook(state: TrainingState) -> None:
    state.tokenizer.quantize.get_parameter("embedding").data[3] = math.nan


def poison_discriminator(state: TrainingState) -> None:
    next(state.players["discriminator"].network.parameters()).data[0] = math.nan


def poison_last_update(state: TrainingState) -> None:
    """So that the state cannot be saved."""
    poison_decoder(state)
    state.step_is_due = True  # type: ignore[attr-defined]


POISONS = {"images": poison_images, "decoder": poison_decoder, "codebook": poison_codebook, "discriminator": poison_discriminator}
POISONED = ("whole", "two micro-batches", "local", "vq")


def lose(processes: Processes, folder: Path, said: dict[str, str]) -> None:
    """What is not finite in process 1 alone, from the third step on."""
    for arm in POISONED:
        for what, poison in POISONS.items():
            name = f"{arm}, {what}"

            def at_step(step: int, poison: Callable[[TrainingState], None] = poison) -> None:
                if step == 2 and processes.rank == 1:
                    poison(Seen.last)

            said[name] = train(arm, folder / name, at_step=at_step)


def refuse(processes: Processes, folder: Path, said: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    train("whole", folder / "shared", stop_after(1))
    elsewhere = folder / ("shared" if processes.rank == 0 else "not shared")
    said["another folder"] = train("whole", elsewhere)
    patch.setattr(trainer, "load_images", other_images if processes.rank == 1 else images_once)
    said["other data"] = train("whole", folder / "other data")
    patch.setattr(trainer, "load_images", no_images if processes.rank == 1 else images_once)
    said["no data"] = train("whole", folder / "no data")


def other_images(config: DataConfig, split: str) -> Images:
    images = images_once(config, split)
    return Images("fashion-mnist", images.split, images.images_NCHW[:1000])


def no_images(config: DataConfig, split: str) -> Images:
    raise DataError("there are no images here")


# --- One process, and what both came to ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, stopped ones among them, and then those of two."""
    folder = tmp_path_factory.mktemp("processes")
    for arm in ARMS | OTHER:
        assert train(arm, folder / "alone" / arm) == ""
        torch.save(weights(), folder / f"{arm} alone.pt")
    for arm in RESUMED:
        assert "stopped at step 3" in train(arm, folder / f"{arm} one then two", stop_after(3))
    run_processes(train_together, folder, 2)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    first, second = (torch.load(folder / f"said by {rank}.pt") for rank in range(2))
    return first, second
