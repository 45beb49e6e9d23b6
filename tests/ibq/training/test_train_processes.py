"""Several processes train what one does: weights, history, snapshots and row. They stop, fail and go on together, and
one writes."""

from __future__ import annotations

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
from training_runs import (
    GAN,
    TIMED,
    WITHOUT_EFFECT,
    images_once,
    poison_codebook,
    poison_decoder,
    poison_discriminator,
    poison_images,
    stop_after,
    weights_of,
)

import ibq.training.tokenizer as trainer
from ibq.config import DataConfig, TrainConfig
from ibq.data import Images
from ibq.data.images import Split
from ibq.data.loader import TrainingBatches
from ibq.distributed import Processes, barrier
from ibq.errors import ConfigError, DataError, NonFiniteError
from ibq.run_directory import RunDirectory
from ibq.training.runtime import Runtime, StopRequested
from ibq.training.tokenizer import train_tokenizer
from ibq.training.tokenizer_state import TrainingState

pytestmark = pytest.mark.processes

RUNTIME = Runtime(device="cpu", log_every=2, snapshots=3, eval_images=10, eval_batch_size=4)
MODEL = {"base_channels": 4, "channel_multipliers": (1, 2, 2), "res_blocks": 1, "z_channels": 8, "norm_groups": 4}
VQ = {"method": "vq", "codebook_init": "features", "beta_on": "commitment", "ema_decay": 0.9, "entropy_weight": 0.05}
LFQ = {"method": "lfq", "codebook_size": 16, "code_dim": 4, "entropy_temperature": 1.0}
"""Not as sharp as released: at 0.01 the softmax over signs makes 1e-4 of rounding, with some seeds on some CPUs."""
EQUAL: dict[str, dict[str, Any]] = {
    "whole": {},
    "adaptive": {"loss.adversarial.adaptive": True},
    "two micro-batches": {"accumulate": 2, "loss.adversarial.adaptive": True, "optim.clip_norm": 0.5},
    "starts late": {"loss.adversarial.start": 0.5},
    "quantizes late": {"quantize_from": 0.5, "quantizer": {"method": "vq", "beta_on": "commitment"}},
    "vq": {"quantizer": VQ},
    "lfq": {"quantizer": LFQ},
}
ARMS = EQUAL | {
    "local": {"averages": "local"},
    "bf16": {"precision": "bf16"},
    "vq local": {"averages": "local", "quantizer": VQ},
}
RESUMED = ("whole", "two micro-batches")
CLOSE = 1e-5
CLOSE_WEIGHTS = 1e-6
"""A fiftieth of what the five steps can move a weight by: less than what local averages change in either network."""
LEARNING_RATE = 1e-5
"""So that a step is no larger: where a pixel's error is nearly 0, rounding decides on the sign of its gradient, and
Adam may make much of that."""
OF_ONE_PROCESS = {
    *("feature_norm", "quantization_error", "logit_spread", "max_probability", "assignment_entropy", "entropy_pull"),
    *("gap", "gap_angular", "gap_used", "gap_dead"),
    *("dimension_features", "dimension99_features"),
    *TIMED,
}
"""Columns of the history that are of rank 0's images alone."""


def config_of(arm: str) -> TrainConfig:
    fields = ARMS[arm]
    quantizer = {"method": "ibq", "codebook_size": 16, "code_dim": 8} | fields.get("quantizer", {})
    config = TrainConfig.parse({"model": MODEL, "quantizer": quantizer, "steps": 5, "batch_size": 8})
    return config.with_fields(
        **GAN | {"optim.lr": LEARNING_RATE} | {name: value for name, value in fields.items() if name != "quantizer"}
    )


class Seen(TrainingState):
    """The state that the trainer has made, for tests to look into."""

    last: TrainingState

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Seen.last = self


def train(
    arm: str,
    folder: Path,
    should_stop: Callable[[], bool] = lambda: False,
    at_step: Callable[[int], None] = lambda _: None,
) -> str:
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
    patch.setattr(trainer, "load_images", few_images)


def few_images(config: DataConfig, split: Split, count: int = 100) -> Images:
    return Images("fashion-mnist", split, images_once(config, split).images_NCHW[:count])


def weights() -> dict[str, torch.Tensor]:
    return {name: weights_of(trained.network) for name, trained in Seen.last.trained.items()}


# --- What the two processes do ----------------------------------------------------------------------------------------


def train_together(processes: Processes, folder: Path) -> None:
    patch, second = pytest.MonkeyPatch(), processes.rank == 1
    watch(patch)
    said: dict[str, str] = {}
    for arm in EQUAL | {"local": {}, "bf16": {}}:
        said[arm] = train(
            arm, folder / ("nothing" if second else "together") / arm
        )  # where both see no file, one could write elsewhere
        torch.save(weights(), folder / f"{arm} {processes.rank}.pt")
    stop_and_go_on(second, folder, said)
    lose(second, folder, said)
    refuse(second, folder, said, patch)
    torch.save(said, folder / f"said by {processes.rank}.pt")


def stop_and_go_on(second: bool, folder: Path, said: dict[str, str]) -> None:
    for arm in RESUMED:
        stopped = folder / f"{arm}, two then two"
        said[f"{arm} stopped"] = train(arm, stopped, stop_after(3) if second else lambda: False)
        if not second:
            shutil.copytree(stopped, folder / f"{arm}, two then one")
        barrier()
        for name in (stopped.name, f"{arm}, one then two"):
            said[name] = train(arm, folder / name)
            torch.save(weights(), folder / f"{name}.pt")


def lose(second: bool, folder: Path, said: dict[str, str]) -> None:
    """Runs with a value that is not finite in the second process alone, from the third step on."""
    for arm, what in POISONED:

        def at_step(step: int, what: str = what) -> None:
            if step == 2 and second:
                POISONS[what](Seen.last)

        said[f"{arm}, {what}"] = train(arm, folder / f"{arm}, {what}", at_step=at_step)


POISONS = {
    "images": poison_images,
    "decoder": poison_decoder,
    "codebook": poison_codebook,
    "discriminator": poison_discriminator,
}
REASONS = {
    "images": r"^step 2: the images are not finite: \d+ of \d+ values of features are NaN",
    "decoder": r"^step 2: the reconstructions are not finite: loss term 'discriminator' is nan$",
    "codebook": r"^step 2: \d+ of \d+ values of codebook are NaN",
    "discriminator": r"^step 2: loss term 'discriminator' is nan$",
}
POISONED = [
    ("whole", "codebook"),
    ("whole", "discriminator"),
    ("two micro-batches", "images"),
    ("two micro-batches", "decoder"),
    ("local", "images"),
    ("vq local", "codebook"),
    ("lfq", "decoder"),
]


def refuse(second: bool, folder: Path, said: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    train("whole", folder / "shared", stop_after(1))
    said["another folder"] = train("whole", folder / ("not shared" if second else "shared")).replace(
        "not shared", "shared"
    )
    odd: dict[str, Callable[..., Images]] = {
        "other data": partial(few_images, count=50),
        "no data": no_images,
        "lost data": few_images,
    }
    for name, load in odd.items():
        patch.setattr(trainer, "load_images", load if second else few_images)
        if name == "lost data":
            patch.setattr(TrainingBatches, "next", no_images if second else TrainingBatches.next)
        said[name] = train("whole", folder / name)


def no_images(*_: object) -> Images:
    raise DataError("there are no images here")


# --- One process, and what both came to -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, stopped ones among them, and then those of two."""
    folder = tmp_path_factory.mktemp("processes")
    for arm in EQUAL:
        assert train(arm, folder / "alone" / arm) == ""
        torch.save(weights(), folder / f"{arm} alone.pt")
    for arm in RESUMED:
        assert "stopped at step 3" in train(arm, folder / f"{arm}, one then two", stop_after(3))
    run_processes(train_together, folder, 2)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """Error that ended each run ('' if none), the same on both processes."""
    first, second = (torch.load(folder / f"said by {rank}.pt") for rank in range(2))
    assert first == second
    return first


def load_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pt")


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = CLOSE) -> None:
    torch.testing.assert_close(actual, expected, rtol=CLOSE, atol=atol)


def assert_equal_runs(run: RunDirectory, alone: RunDirectory) -> None:
    """Averaged weights to 1e-6; history, snapshots, evaluation and row to 1e-5."""
    averaged, expected = (
        {k: v for k, v in load_file(of.model).items() if WITHOUT_EFFECT not in k} for of in (run, alone)
    )
    assert_close(averaged, expected, CLOSE_WEIGHTS)
    lines = [
        [{k: v for k, v in line.items() if k not in OF_ONE_PROCESS} for line in of.read_history()]
        for of in (run, alone)
    ]
    assert [line["step"] for line in lines[0]] == [2, 4, 5]
    for line, other in zip(*lines, strict=True):
        amplified = {
            name: other[name] for name in other if "gradient" in name or name in ("loss", "weighted_adversarial")
        }
        assert line == pytest.approx(other | {name: line[name] for name in amplified}, rel=CLOSE, abs=CLOSE)
        # a sharp softmax and a quotient of norms make more of rounding than the weights do
        assert {name: line[name] for name in amplified} == pytest.approx(amplified, rel=1e-4)
    assert run.snapshot_steps() == alone.snapshot_steps() == [0, 2, 5]
    for step in run.snapshot_steps():
        assert_close(run.read_snapshot(step), alone.read_snapshot(step))
    rows = [
        {name: value for name, value in of.read_row().items() if name not in TIMED | {"processes"}}
        for of in (run, alone)
    ]
    for name, value in rows[1].items():
        assert rows[0][name] == (pytest.approx(value, rel=CLOSE, abs=CLOSE) if isinstance(value, float) else value), (
            name
        )


@pytest.mark.parametrize("arm", EQUAL)
def test_two_processes_equal_one_with_the_same_global_batch(folder: Path, said: dict[str, str], arm: str) -> None:
    assert said[arm] == ""
    alone, *both = (load_weights(folder, f"{arm} {which}") for which in ("alone", 0, 1))
    assert alone.keys() == {"model", "discriminator"}
    for weights_of_one in both:
        assert_close(weights_of_one, alone, CLOSE_WEIGHTS)
    assert all(torch.equal(both[0][name], both[1][name]) for name in alone), "both hold the same weights to the bit"
    assert_equal_runs(RunDirectory(folder / "together" / arm), RunDirectory(folder / "alone" / arm))


def test_local_averages_train_something_else(folder: Path, said: dict[str, str]) -> None:
    assert said["local"] == ""
    local, shared = (load_weights(folder, name) for name in ("local 0", "whole 0"))
    assert (local["model"] - shared["model"]).abs().max() > 2 * CLOSE
    assert (local["discriminator"] - shared["discriminator"]).abs().max() > 2 * CLOSE_WEIGHTS  # through LeCam alone
    assert torch.equal(local["model"], load_weights(folder, "local 1")["model"])


def test_bfloat16_trains_the_same_but_for_its_rounding(folder: Path, said: dict[str, str]) -> None:
    assert said["bf16"] == ""
    rounded, whole = (load_weights(folder, name) for name in ("bf16 0", "whole 0"))
    assert 0 < (rounded["model"] - whole["model"]).abs().max() < 5e-3
    row = RunDirectory(folder / "together" / "bf16").read_row()
    assert (row["status"], row["processes"]) == ("ok", 2)


def test_one_process_writes(folder: Path, said: dict[str, str]) -> None:
    assert (folder / "together").is_dir()
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize("arm", RESUMED)
def test_a_run_stops_on_all_processes_at_once_and_goes_on_with_any_number(
    folder: Path, said: dict[str, str], arm: str
) -> None:
    assert said[f"{arm} stopped"] == "StopRequested: stopped at step 3 of 5; the next run goes on from there"
    expected, alone = load_weights(folder, f"{arm} alone"), RunDirectory(folder / "alone" / arm)
    assert train(arm, folder / f"{arm}, two then one") == ""
    torch.save(weights(), folder / f"{arm}, two then one.pt")
    for name in (f"{arm}, two then two", f"{arm}, one then two", f"{arm}, two then one"):
        assert said.get(name, "") == ""
        assert_close(load_weights(folder, name), expected, CLOSE_WEIGHTS)
        assert_equal_runs(RunDirectory(folder / name), alone)


@pytest.mark.parametrize(("arm", "what"), POISONED)
def test_what_is_not_finite_on_one_process_ends_all_in_the_same_words(
    folder: Path, said: dict[str, str], arm: str, what: str
) -> None:
    kind, reason = said[f"{arm}, {what}"].split(": ", 1)
    assert kind == "NonFiniteError"
    assert re.search(REASONS[what], reason)
    row = RunDirectory(folder / f"{arm}, {what}").read_row()
    assert (row["status"], row["reason"]) == ("nan", reason)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (
            "another folder",
            r"^ConfigError: process 1 finds the checkpoint of .*shared absent, process 0 of step 1 \(\w+\); all proc",
        ),
        (
            "other data",
            r"^ConfigError: process 1 finds the data of .* \w+, process 0 \w+; all processes need the same folders of "
            r"runs and data$",
        ),
        ("no data", "^DataError: there are no images here$"),
        ("lost data", "^DataError: there are no images here$"),
    ],
)
def test_what_one_process_sees_otherwise_is_refused_by_all(said: dict[str, str], what: str, reason: str) -> None:
    assert re.search(reason, said[what])
