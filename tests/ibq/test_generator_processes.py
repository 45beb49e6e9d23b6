"""Several processes train the generator that one does, its weights whole on each (DDP) or in parts (FSDP2); they go on in each other's place,
stop and fail together.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_runs import (
    COST,
    RUNTIME,
    WITHOUT_DROPOUT,
    few_images,
    generator_config,
    poison_gradient,
    poison_weights,
    untrained_tokenizer,
    watch_images,
    without_cost,
)
from processes import run_processes
from safetensors.torch import load_file
from training_runs import stop_after

import ibq.train_generator as trainer
from ibq.data import DataError, Images
from ibq.distributed import Processes, barrier
from ibq.errors import ConfigError, NonFiniteError
from ibq.generator_config import GeneratorConfig
from ibq.generator_state import GeneratorState
from ibq.run_directory import RunDirectory
from ibq.sharding import is_sharded
from ibq.train_generator import train_generator
from ibq.training import StopRequested

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two micro-batches": {"accumulate": 2, "optim.ema_decay": 0.5, "optim.clip_norm": 0.5},
    "sub-tokens": {"transformer.subtoken_bits": (2, 3)},
}
SHARDINGS = ("ddp", "fsdp")
RESUMED = "two micro-batches"
CLOSE, CLOSE_WEIGHTS = 1e-5, 1e-6
LEARNING_RATE = 1e-5
"""So that Adam makes little of rounding; five steps move a weight by fifty times CLOSE_WEIGHTS."""


def config_of(arm: str) -> GeneratorConfig:
    return generator_config(**WITHOUT_DROPOUT | {"steps": 5, "optim.lr": LEARNING_RATE} | ARMS.get(arm, {}))


class Seen(GeneratorState):
    """The state that the trainer has made, for tests to look into."""

    last: GeneratorState

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Seen.last = self


def train(
    config: GeneratorConfig,
    folder: Path,
    sharding: Any = "ddp",
    should_stop: Callable[[], bool] = lambda: False,
    at_step: Callable[[int], None] = lambda _: None,
) -> str:
    """Returns what the run was ended with, '' if it came to its end."""
    runtime = dataclasses.replace(RUNTIME, sharding=sharding)
    try:
        for event in train_generator(config, untrained_tokenizer(config), folder, runtime, should_stop):
            at_step(event.step)
    except (StopRequested, NonFiniteError, ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def watch(patch: pytest.MonkeyPatch, folder: Path) -> None:
    watch_images(patch, folder / "cache")
    patch.setattr(trainer, "GeneratorState", Seen)


def weights() -> dict[str, torch.Tensor]:
    return dict(Seen.last.result().state_dict())


# --- What the two processes do ------------------------------------------------------------------------------------------------------------


def train_together(processes: Processes, folder: Path) -> None:
    second, said = processes.rank == 1, {}
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, folder)
        for arm, sharding in itertools.product(ARMS, SHARDINGS):
            name = f"{arm}, {sharding}"
            said[name] = train(config_of(arm), folder / ("nothing" if second else "together") / name, sharding)
            torch.save(weights(), folder / f"{name} {processes.rank}.pt")
        parts = [parameter.to_local().numel() for parameter in Seen.last.transformer.parameters() if is_sharded(parameter)]
        torch.save([len(parts), sum(parts)], folder / f"parts of {processes.rank}.pt")
        go_on(second, folder, said)
        draw(processes, folder)
        lose(second, folder, said)
        refuse(second, folder, said, patch)
    torch.save(said, folder / f"said by {processes.rank}.pt")


def go_on(second: bool, folder: Path, said: dict[str, str]) -> None:
    """One process has trained two steps; two, sharded, train one more, and two that are not, or one, the rest."""
    config, begun, name = config_of(RESUMED), folder / "begun", "one, fsdp, ddp"
    said["fsdp stopped"] = train(config, begun, "fsdp", stop_in_training(1) if second else lambda: False)
    if not second:
        shutil.copytree(begun, folder / "one, fsdp, one")
    barrier()
    said[name] = train(config, begun, "ddp")
    torch.save(weights(), folder / f"{name}.pt")


def draw(processes: Processes, folder: Path) -> None:
    for sharding in SHARDINGS:
        config = generator_config(steps=2)
        train(config, folder / f"with dropout, {sharding}", sharding)
        torch.save(torch.rand(4), folder / f"random {sharding} {processes.rank}.pt")


POISONED = {"weights": poison_weights, "gradient": poison_gradient}
REASONS = {"weights": "^step 2: loss term 'cross_entropy' is nan$", "gradient": "^step 2: the gradient of '[a-z0-9._]+' is not finite$"}


def lose(second: bool, folder: Path, said: dict[str, str]) -> None:
    """What is not finite in the second process alone, from the third step on."""
    for sharding, what in itertools.product(SHARDINGS, POISONED):

        def at_step(step: int, what: str = what) -> None:
            if step == 2 and second:
                POISONED[what](Seen.last)

        said[f"{what}, {sharding}"] = train(config_of("plain"), folder / f"{what}, {sharding}", sharding, at_step=at_step)


def refuse(second: bool, folder: Path, said: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    config = config_of("plain")
    other = untrained_tokenizer(generator_config(**{"tokenizer.steps": 7})) if second else untrained_tokenizer(config)
    with patch.context() as patched:
        patched.setitem(globals(), "untrained_tokenizer", lambda _: other)
        said["another tokenizer"] = train(config, folder / "another tokenizer")
    for name, load in {"other data": partial(few_images, count=30), "no data": no_images}.items():
        patch.setattr(trainer, "load_images", load if second else few_images)
        said[name] = train(config, folder / name)


def no_images(*_: object) -> Images:
    raise DataError("there are no images here")


def stop_in_training(steps: int) -> Callable[[], bool]:
    """Asks to stop after so many steps from here; encoding, which asks too, is done already."""
    return stop_after(steps)


# --- One process, and what both came to ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The runs of one process, and then those of two."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, folder)
        for arm in ARMS:
            assert train(config_of(arm), folder / "alone" / arm) == ""
            torch.save(weights(), folder / f"{arm} alone.pt")
        assert "stopped at step 2" in train(config_of(RESUMED), folder / "begun", should_stop=stop_after(2))
        run_processes(train_together, folder, 2)
        yield folder
