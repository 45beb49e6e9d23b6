"""Files that survive a kill at any byte."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibq.run_directory import (
    RunDirectory,
    append_line,
    read_lines,
    source_commit,
    write_json,
    write_tensors,
    write_text,
)

values = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
records = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), min_size=1, max_size=5)


@given(records, st.data())
def test_a_history_torn_at_any_byte_keeps_its_whole_lines_and_can_be_appended_to(
    lines: list[dict[str, Any]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "history.jsonl"
        for line in lines:
            append_line(path, line)
        assert read_lines(path) == lines
        content = path.read_bytes()
        kept = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:kept])
        whole = [json.loads(line) for line in content[:kept].split(b"\n")[:-1]]
        survivors = read_lines(path)
        assert survivors in (whole, lines[: len(whole) + 1])
        append_line(path, {"after": 1})
        assert read_lines(path) == [*survivors, {"after": 1}]


def test_a_torn_last_line_is_left_out_and_the_next_is_readable(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    append_line(run.history, {"step": 1})
    with open(run.history, "a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_history() == [{"step": 1}]
    append_line(run.history, {"step": 3})
    assert run.read_history() == [{"step": 1}, {"step": 3}]


def test_absent_files_are_empty_lists(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "nowhere")
    assert run.read_history() == run.read_attempts() == run.snapshot_steps() == []
    assert not run.finished


@pytest.mark.parametrize(("step", "kept"), [(0, [0]), (3, [0, 2]), (4, [0, 2, 4]), (99, [0, 2, 4, 10])])
def test_rewind_drops_later_lines_and_snapshots(tmp_path: Path, step: int, kept: list[int]) -> None:
    run = RunDirectory(tmp_path)
    for at in (0, 2, 4, 10):
        append_line(run.history, {"step": at, "loss": at / 7})
        run.write_snapshot(at, {"codes": torch.full((2,), float(at))})
    with open(run.history, "a") as file:
        file.write('{"step": 1')
    run.rewind(step)
    assert run.read_history() == [{"step": at, "loss": at / 7} for at in kept]
    assert len(run.history.read_text().splitlines()) == len(kept), "the torn line is gone for good"
    assert run.snapshot_steps() == kept
    assert run.read_snapshot(kept[-1])["codes"].tolist() == [kept[-1]] * 2


def test_rewinding_a_new_directory_is_harmless(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new")
    run.rewind(0)
    assert run.read_history() == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    text_path, tensor_path = tmp_path / "row.json", tmp_path / "model.safetensors"
    write_text(text_path, "old")
    write_tensors(tensor_path, {"a": torch.zeros(2)})
    before = tensor_path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="no space"):
            write_text(text_path, "new")
        with pytest.raises(OSError, match="no space"):
            write_tensors(tensor_path, {"a": torch.ones(2)})
    assert text_path.read_text() == "old"
    assert tensor_path.read_bytes() == before
    write_text(text_path, "new")
    assert text_path.read_text() == "new"


def test_json_that_no_other_program_could_read_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": math.nan})
    assert json.loads(path.read_text()) == {"loss": 1.5}


def test_the_row_alone_makes_a_run_finished(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    write_json(run.config, {})
    write_tensors(run.model, {})
    assert not run.finished
    write_json(run.row, {"status": "ok"})
    assert run.finished
    assert run.read_row() == {"status": "ok"}


def test_tensors_come_back_whatever_their_layout(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    tensors = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).T,
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "counts": torch.arange(4),
    }
    run.write_snapshot(7, tensors)
    loaded = run.read_snapshot(7)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_commit_is_a_hash_or_unknown() -> None:
    commit = source_commit()
    assert commit == "unknown" or (len(commit.rstrip("+")) == 12 and int(commit.rstrip("+"), 16) >= 0)
