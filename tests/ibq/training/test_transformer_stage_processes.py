"""Several processes train the generator that one does, its weights whole on each (DDP) or in parts (FSDP2). They stop,
fail and go on together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from transformer_runs import (
    COST,
    RUNTIME,
    WITHOUT_DROPOUT,
    few_images,
    poison_gradient,
    poison_weights,
    state_of_last_run,
    stop_at,
    transformer_config,
    untrained_tokenizer,
    watch_images,
    watch_state,
    without_cost,
)

import ibq.training.transformer as trainer
from ibq.config import TransformerTrainConfig
from ibq.data import Images
from ibq.distributed import Processes, barrier
from ibq.errors import ConfigError, DataError, NonFiniteError
from ibq.models.transformer import Transformer
from ibq.run_directory import RunDirectory
from ibq.training.runtime import StopRequested
from ibq.training.sharding import is_sharded, local
from ibq.training.transformer import train_transformer

pytestmark = pytest.mark.processes

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two micro-batches": {"accumulate": 2, "optim.ema_decay": 0.5, "optim.clip_norm": 0.5},
    "sub-tokens": {"model.subtoken_bits": (2, 3)},
}
SHARDINGS = ("ddp", "fsdp")
ROUNDED = ("bf16", "fp16")
"""Precisions of an arm with all that saves memory."""
RESUMED = "two micro-batches"
CLOSE, CLOSE_WEIGHTS, CLOSE_ROUNDED = 1e-5, 1e-6, 0.2
LEARNING_RATE = 1e-5
"""So that Adam makes little of rounding; five steps move a weight by fifty times CLOSE_WEIGHTS."""


def config_of(arm: str) -> TransformerTrainConfig:
    return transformer_config(**WITHOUT_DROPOUT | {"steps": 5, "optim.lr": LEARNING_RATE} | ARMS.get(arm, {}))


def train(
    config: TransformerTrainConfig,
    folder: Path,
    sharding: Any = "ddp",
    should_stop: Callable[[], bool] = lambda: False,
    at_step: Callable[[int], None] = lambda _: None,
    checkpoint_activations: bool = False,
) -> str:
    """Returns what the run was ended with, '' if it came to its end."""
    runtime = dataclasses.replace(RUNTIME, sharding=sharding, samples=2, checkpoint_activations=checkpoint_activations)
    try:
        for event in train_transformer(config, untrained_tokenizer(config), folder, runtime, should_stop):
            at_step(event.step)
    except (StopRequested, NonFiniteError, ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train_rounded(folder: Path, precision: str, sharding: str) -> str:
    """In half precision, with the codes in chunks of 8, and activations that are computed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ibq.losses.LARGEST_LOGITS", 1)
        patch.setattr("ibq.losses.MULTIPLE", 8)
        # the default of 2^16 overflows here on the half batches of two processes, which costs both of them a step
        patch.setattr("torch.amp.GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**12))
        config = config_of("plain").with_fields(precision=precision)
        return train(config, folder, sharding, checkpoint_activations=True)


def watch(patch: pytest.MonkeyPatch, folder: Path) -> None:
    watch_images(patch, folder / "cache")
    watch_state(patch)


def weights() -> dict[str, torch.Tensor]:
    """A collective."""
    return dict(state_of_last_run().result().state_dict())


# --- What the two processes do ----------------------------------------------------------------------------------------


def train_together(processes: Processes, folder: Path) -> None:
    second, said = processes.rank == 1, {}
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, folder)
        for arm, sharding in itertools.product(ARMS, SHARDINGS):
            name = f"{arm}, {sharding}"
            said[name] = train(config_of(arm), folder / ("nothing" if second else "together") / name, sharding)
            torch.save(weights(), folder / f"{name} {processes.rank}.pt")
        parts = [local(weight).numel() for weight in state_of_last_run().transformer.parameters() if is_sharded(weight)]
        torch.save([len(parts), sum(parts)], folder / f"parts of {processes.rank}.pt")
        for precision, sharding in itertools.product(ROUNDED, SHARDINGS):
            name = f"{precision}, {sharding}"
            said[name] = train_rounded(folder / name, precision, sharding)
            torch.save(weights(), folder / f"{name}.pt")
        go_on(second, folder, said)
        draw(processes, folder)
        lose(second, folder, said)
        refuse(second, folder, said, patch)
    torch.save(said, folder / f"said by {processes.rank}.pt")


def go_on(second: bool, folder: Path, said: dict[str, str]) -> None:
    """One process has trained two steps; two, sharded, train one more, and two that are not, or one, the rest."""
    config, begun, name = config_of(RESUMED), folder / "begun", "one, fsdp, ddp"
    said["fsdp stopped"] = train(config, begun, "fsdp", stop_at(3) if second else lambda: False)
    if not second:
        shutil.copytree(begun, folder / "one, fsdp, one")
    barrier()
    said[name] = train(config, begun, "ddp")
    torch.save(weights(), folder / f"{name}.pt")


def draw(processes: Processes, folder: Path) -> None:
    for sharding in SHARDINGS:
        config = transformer_config(steps=3)
        train(config, folder / f"with dropout, {sharding}", sharding)
        torch.save(torch.rand(4), folder / f"random {sharding} {processes.rank}.pt")
        torch.save(weights(), folder / f"uninterrupted {sharding} {processes.rank}.pt")
        train(config, folder / f"in two parts, {sharding}", sharding, stop_at(2))
        train(config, folder / f"in two parts, {sharding}", sharding)
        torch.save(weights(), folder / f"in two parts {sharding} {processes.rank}.pt")


POISONED = {"weights": poison_weights, "gradient": poison_gradient}
REASONS = {
    "weights": "^step 2: loss term 'cross_entropy' is nan$",
    "gradient": "^step 2: the gradient of '[a-z0-9._]+' is not finite$",
}


def lose(second: bool, folder: Path, said: dict[str, str]) -> None:
    """Runs with a value that is not finite in the second process alone, from the third step on."""
    for sharding, what in itertools.product(SHARDINGS, POISONED):

        def at_step(step: int, what: str = what) -> None:
            if step == 2 and second:
                POISONED[what](state_of_last_run())

        said[f"{what}, {sharding}"] = train(
            config_of("plain"), folder / f"{what}, {sharding}", sharding, at_step=at_step
        )


def refuse(second: bool, folder: Path, said: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    config = config_of("plain")
    other = untrained_tokenizer(transformer_config(**{"tokenizer.steps": 7})) if second else untrained_tokenizer(config)
    with patch.context() as patched:
        patched.setitem(globals(), "untrained_tokenizer", lambda _: other)
        said["another tokenizer"] = train(config, folder / "another tokenizer")
    for name, load in {"other data": partial(few_images, count=30), "no data": no_images}.items():
        patch.setattr(trainer, "load_images", load if second else few_images)
        said[name] = train(config, folder / name)


def no_images(*_: object) -> Images:
    raise DataError("there are no images here")


# --- One process, and what both came to -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The runs of one process, and then those of two."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, folder)
        for arm in ARMS:
            assert train(config_of(arm), folder / "alone" / arm) == ""
            torch.save(weights(), folder / f"{arm} alone.pt")
        for precision in ROUNDED:
            assert train_rounded(folder / "alone" / precision, precision, "ddp") == ""
            torch.save(weights(), folder / f"{precision} alone.pt")
        assert "stopped at step 2" in train(config_of(RESUMED), folder / "begun", should_stop=stop_at(2))
        run_processes(train_together, folder, 2)
        yield folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """Error that ended each run ('' if none), the same on both processes."""
    first, second = (torch.load(folder / f"said by {rank}.pt") for rank in range(2))
    assert first == second
    return first


def load_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pt")


def assert_equal_runs(run: RunDirectory, alone: RunDirectory) -> None:
    """Weights to 1e-6; history and row to 1e-5."""
    torch.testing.assert_close(load_file(run.model), load_file(alone.model), rtol=CLOSE, atol=CLOSE_WEIGHTS)
    lines, expected = run.read_history(), alone.read_history()
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other | {name: line[name] for name in COST & line.keys()}, rel=CLOSE, abs=CLOSE)
    row, other = without_cost(run), without_cost(alone) | {"processes": run.read_row()["processes"]}
    assert row.keys() == other.keys()
    for name, value in other.items():
        assert row[name] == (pytest.approx(value, rel=CLOSE, abs=CLOSE) if isinstance(value, float) else value), name


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_equal_one_with_the_same_global_batch(
    folder: Path, said: dict[str, str], arm: str, sharding: str
) -> None:
    name = f"{arm}, {sharding}"
    assert said[name] == ""
    alone, *both = (load_weights(folder, which) for which in (f"{arm} alone", f"{name} 0", f"{name} 1"))
    for of_one in both:
        torch.testing.assert_close(of_one, alone, rtol=CLOSE, atol=CLOSE_WEIGHTS)
    assert all(torch.equal(both[0][weight], both[1][weight]) for weight in alone), (
        "both hold the same weights to the bit"
    )
    assert_equal_runs(RunDirectory(folder / "together" / name), RunDirectory(folder / "alone" / arm))
    assert not (folder / "nothing").exists(), "one process writes"


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("precision", ROUNDED)
def test_what_saves_memory_trains_the_same_on_two_processes(
    folder: Path, said: dict[str, str], precision: str, sharding: str
) -> None:
    assert said[f"{precision}, {sharding}"] == ""
    together, alone = (load_weights(folder, name) for name in (f"{precision}, {sharding}", f"{precision} alone"))
    config = config_of("plain")
    torch.manual_seed(config.seed)
    begun = Transformer(config.transformer_config).state_dict()
    moved, apart = (
        torch.cat([(alone[name] - other[name]).flatten() for name in alone]).norm() for other in (begun, together)
    )
    assert 0 < apart < CLOSE_ROUNDED * moved
    losses = [
        [line["loss"] for line in RunDirectory(folder / path).read_history()]
        for path in (f"{precision}, {sharding}", f"alone/{precision}", "alone/plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[1] != losses[2], "rounded"


def test_a_sharded_process_holds_half_of_every_weight(folder: Path, said: dict[str, str]) -> None:
    (count, first), (_, second) = (torch.load(folder / f"parts of {rank}.pt") for rank in range(2))
    whole = load_weights(folder, "sub-tokens alone")
    assert (count, first + second) == (len(whole), sum(weight.numel() for weight in whole.values()))
    assert first == pytest.approx(second, rel=0.01)


@pytest.mark.parametrize("name", ["one, fsdp, ddp", "one, fsdp, one"])
def test_a_run_goes_on_with_any_number_of_processes_and_any_sharding(
    folder: Path, said: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert said["fsdp stopped"] == "StopRequested: stopped at step 3 of 5; the next run goes on from there"
    if name in said:
        run = RunDirectory(folder / "begun")
        assert said[name] == ""
    else:
        run = RunDirectory(folder / name)
        assert train(config_of(RESUMED), run.path) == ""
        torch.save(weights(), folder / f"{name}.pt")
    expected = load_weights(folder, f"{RESUMED} alone")
    torch.testing.assert_close(load_weights(folder, name), expected, rtol=CLOSE, atol=CLOSE_WEIGHTS)
    assert_equal_runs(run, RunDirectory(folder / "alone" / RESUMED))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_processes_draw_random_numbers_of_their_own(folder: Path, said: dict[str, str], sharding: str) -> None:
    first, second = (torch.load(folder / f"random {sharding} {rank}.pt") for rank in range(2))
    assert not (first == second).any()
    assert RunDirectory(folder / f"with dropout, {sharding}").read_row()["status"] == "ok"


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_with_dropout_a_run_goes_on_as_if_it_had_not_been_stopped(
    folder: Path, said: dict[str, str], sharding: str, rank: int
) -> None:
    whole, resumed = (load_weights(folder, f"{name} {sharding} {rank}") for name in ("uninterrupted", "in two parts"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("what", POISONED)
def test_what_is_not_finite_on_one_process_ends_all_in_the_same_words(
    folder: Path, said: dict[str, str], what: str, sharding: str
) -> None:
    kind, reason = said[f"{what}, {sharding}"].split(": ", 1)
    assert kind == "NonFiniteError"
    assert re.search(REASONS[what], reason)
    row = RunDirectory(folder / f"{what}, {sharding}").read_row()
    assert (row["status"], row["reason"]) == ("nan", reason)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("another tokenizer", r"^ConfigError: the tokenizer has steps=7, not 300; pass the one that the config names$"),
        (
            "other data",
            r"^ConfigError: process 1 finds the data of .* \w+, process 0 \w+; all processes need the same folders of "
            r"runs and data$",
        ),
        ("no data", "^DataError: there are no images here$"),
    ],
)
def test_what_one_process_sees_otherwise_is_refused_by_all(said: dict[str, str], what: str, reason: str) -> None:
    assert re.search(reason, said[what])
