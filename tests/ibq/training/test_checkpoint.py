"""A checkpoint is the old one or the new one, whole, whenever the process dies; and it brings the optimizer back
exactly."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ibq.training import checkpoint as module
from ibq.training.checkpoint import (
    flatten_optimizer,
    load_checkpoint,
    remove_checkpoint,
    restore_optimizer,
    save_checkpoint,
)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weights": torch.full((3, 2), float(step)), "counts": torch.arange(step + 1), "flag": torch.tensor(True)}


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, tensors(step), {"step": step, "note": "é"})


def step_of(folder: Path) -> int | None:
    """Step of the checkpoint that would be resumed, once its parts agree on it."""
    loaded, _ = load_checkpoint(folder)
    if loaded is None:
        return None
    state, meta = loaded
    expected = tensors(meta["step"])
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    return int(meta["step"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoint"


def test_round_trip_and_readable_meta(folder: Path) -> None:
    assert step_of(folder) is None
    save(folder, 3)
    save(folder, 4)
    assert step_of(folder) == 4
    meta = json.loads((folder / "meta.json").read_text())
    assert meta == {
        "step": 4,
        "note": "é",
        "sha256": hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest(),
    }
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint", "checkpoint.previous"]
    remove_checkpoint(folder)
    assert step_of(folder) is None
    assert not list(folder.parent.iterdir())
    remove_checkpoint(folder)


def dying(call: Callable[..., Any], countdown: itertools.count[int], *, after: bool) -> Callable[..., Any]:
    """The call, but at zero of a shared countdown the process dies before or after it."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        last = next(countdown) == 0
        if last and not after:
            raise Killed
        result = call(*args, **kwargs)
        if last:
            raise Killed
        return result

    return wrapped


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("moment", range(6))
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(folder: Path, moment: int, after: bool) -> None:
    save(folder, 1)
    countdown = itertools.count(-moment)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((shutil, "rmtree"), (os, "rename"), (module, "write_tensors"), (module, "write_json")):
            patch.setattr(owner, name, dying(getattr(owner, name), countdown, after=after))
        with pytest.raises(Killed):
            save(folder, 2)
    assert step_of(folder) in (1, 2)
    save(folder, 3)
    assert step_of(folder) == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint", "checkpoint.previous"]


def test_between_the_two_renames_the_previous_one_is_loaded(folder: Path) -> None:
    save(folder, 1)
    os.rename(folder, folder.with_suffix(".previous"))
    assert step_of(folder) == 1


@pytest.mark.parametrize("file", ["state.safetensors", "meta.json"])
@pytest.mark.parametrize("kept", [None, 0, 5, -1])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(folder: Path, file: str, kept: int | None) -> None:
    save(folder, 1)
    save(folder, 2)
    damaged = folder / file
    if kept is None:
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes().rstrip()[:kept])
    assert step_of(folder) == 1
    _, (note,) = load_checkpoint(folder)
    assert note.startswith("checkpoint is damaged (")
    shutil.rmtree(folder.with_suffix(".previous"))
    assert load_checkpoint(folder)[0] is None
    assert load_checkpoint(folder)[1] == [note]


# --- The optimizer ----------------------------------------------------------------------------------------------------


def small_model(memory_format: torch.memory_format) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 3)).to(memory_format=memory_format)
    return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_goes_on_exactly_from_a_saved_optimizer(folder: Path, memory_format: torch.memory_format) -> None:
    model, optimizer = small_model(memory_format)
    for step in range(3):
        take_step(model, optimizer, step)
    save_checkpoint(folder, model.state_dict() | flatten_optimizer(model, optimizer, "optimizer"), {})

    resumed_model, resumed_optimizer = small_model(memory_format)
    loaded, _ = load_checkpoint(folder)
    assert loaded is not None
    resumed_model.load_state_dict({name: loaded[0][name] for name in model.state_dict()})
    restore_optimizer(resumed_model, resumed_optimizer, loaded[0], "optimizer")
    for step in range(3, 6):
        take_step(model, optimizer, step)
        take_step(resumed_model, resumed_optimizer, step)
    for name, parameter in model.named_parameters():
        assert torch.equal(resumed_model.get_parameter(name), parameter), name


def test_optimizer_state_is_named_after_its_parameters() -> None:
    model, optimizer = small_model(torch.contiguous_format)
    take_step(model, optimizer, 0)
    names = {
        f"optimizer.{name}.{slot}" for name, _ in model.named_parameters() for slot in ("step", "exp_avg", "exp_avg_sq")
    }
    assert flatten_optimizer(model, optimizer, "optimizer").keys() == names


def test_a_parameter_without_saved_state_is_an_error_that_names_it() -> None:
    model, optimizer = small_model(torch.contiguous_format)
    take_step(model, optimizer, 0)
    saved = {
        name: value
        for name, value in flatten_optimizer(model, optimizer, "optimizer").items()
        if not name.startswith("optimizer.2.bias.")
    }
    with pytest.raises(KeyError, match=r"optimizer\.2\.bias\."):
        restore_optimizer(*small_model(torch.contiguous_format), saved, "optimizer")
