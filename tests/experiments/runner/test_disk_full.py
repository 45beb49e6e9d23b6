"""A disk that fills up while a checkpoint, a snapshot, a history line or the row is written.

Here the writes are made to fail; `make faults` fills a real, small file system.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.cells import Cell
from experiments.runner import worker
from experiments.study import Study
from ibq import run_directory
from ibq.run_directory import RunDirectory
from ibq.training import tokenizer


@pytest.fixture(scope="module")
def cell() -> Cell:
    return Study("smoke", overrides={"steps": 8}).cells[1]


def attempt(cell: Cell, folder: Path) -> tuple[int, RunDirectory]:
    """One attempt as the trainer's process makes it, with a checkpoint after every step."""
    run = RunDirectory(folder)
    run.path.mkdir(exist_ok=True)
    runtime = replace(Study("smoke").preset.runtime, device="cpu", checkpoint_every_s=0.0)
    return worker.attempt(run, cell.config, runtime, lambda: False).code, run


def fails_on_call(function: Callable[..., Any], number: int, harm: Callable[..., None]) -> Callable[..., Any]:
    """The function, but for one call, which leaves something half-written and finds no space left."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            harm(*args)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return function(*args, **kwargs)

    return wrapped


def nothing(*_: Any) -> None:
    pass


def torn_line(path: Path, record: dict[str, Any]) -> None:
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "sec')


def half_a_file(tensors: dict[str, Any], path: Path) -> None:
    Path(path).write_bytes(b"half a tensor")


@pytest.mark.parametrize(
    ("module", "name", "number", "harm"),
    [
        pytest.param(run_directory, "save_file", 3, half_a_file, id="checkpoint"),
        pytest.param(run_directory, "save_file", 1, half_a_file, id="snapshot"),
        pytest.param(tokenizer, "append_line", 2, torn_line, id="history"),
        pytest.param(tokenizer, "write_json", 2, nothing, id="row"),
    ],
)
def test_nothing_is_half_written_and_the_run_ends_as_if_nothing_had_been(
    cell: Cell, tmp_path: Path, module: Any, name: str, number: int, harm: Callable[..., None]
) -> None:
    code, quiet = attempt(cell, tmp_path / "quiet")
    assert code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, fails_on_call(getattr(module, name), number, harm))
        code, run = attempt(cell, tmp_path / "full")
    assert code == worker.DISK_FULL
    assert not run.finished
    assert run.read_attempts()[-1]["event"] == "error"
    assert run.read_attempts()[-1]["reason"].startswith("No space left on device")
    assert not [path for path in run.path.rglob(".*") if path.is_file()]

    code, run = attempt(cell, run.path)
    assert code == 0
    assert run.finished
    assert run.model.read_bytes() == quiet.model.read_bytes()
    assert [line["loss"] for line in run.read_history()] == [line["loss"] for line in quiet.read_history()]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "meta"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(cell: Cell, tmp_path: Path, damage: str) -> None:
    _, quiet = attempt(cell, tmp_path / "quiet")
    run = RunDirectory(tmp_path / "damaged")
    runtime = replace(Study("smoke").preset.runtime, device="cpu", checkpoint_every_s=0.0)
    for event in tokenizer.train_tokenizer(cell.config, run.path, runtime):
        if event.step == 6:
            break
    state = run.checkpoint / "state.safetensors"
    data = bytearray(state.read_bytes())
    if damage == "truncated":
        state.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-100] ^= 1
        state.write_bytes(data)
    else:
        (run.checkpoint / "meta.json").write_text('{"step": 5')
    code, run = attempt(cell, run.path)
    assert code == 0
    (note,) = [a["reason"] for a in run.read_attempts() if a["event"] == "damaged"]
    assert note.startswith("checkpoint is damaged (")
    assert note.endswith("; going on from step 4")
    assert run.model.read_bytes() == quiet.model.read_bytes()
