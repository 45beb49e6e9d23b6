"""A run that is steered through control.jsonl: each line is obeyed once, whatever becomes of the trainer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import RUNTIME, assert_same_run, read_the_images_once, stop_after  # noqa: F401

from ibq.run_directory import RunDirectory, append_line, read_lines
from ibq.training.control import Control, last_command, on_their_way, send
from ibq.training.interventions import Intervention, read_interventions, scheduled
from ibq.training.runtime import StopRequested
from ibq.training.tokenizer import train_tokenizer


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_intervention_in_the_file_equals_a_scripts_and_is_repeated(tiny: Any, tmp_path: Path) -> None:
    run, changes = RunDirectory(tmp_path / "steered"), {"optim.lr": 3e-4, "quantizer.entropy_weight": 0.1}
    events = train_tokenizer(tiny(), run.path, RUNTIME, stop_after(6))
    assert next(events).step == 2
    send(run, Intervention(fields=changes))
    send(run, Intervention(restart_dead=True))
    with pytest.raises(StopRequested):
        list(events)
    assert [(each.step, each.line) for each in read_interventions(run)] == [(2, 1), (2, 2)]
    list(train_tokenizer(tiny(), run.path, RUNTIME))  # reads the file again, and repeats neither line
    assert len(read_interventions(run)) == 2
    expected = tmp_path / "script"
    list(train_tokenizer(tiny(), expected, RUNTIME, intervene=scheduled(read_interventions(run))))
    assert_same_run(run, RunDirectory(expected))


def test_a_change_that_was_recorded_before_a_kill_is_done_once(tiny: Any, tmp_path: Path) -> None:
    run, whole = RunDirectory(tmp_path / "killed"), RunDirectory(tmp_path / "whole")
    with pytest.raises(StopRequested):
        list(train_tokenizer(tiny(), run.path, RUNTIME, stop_after(1)))
    events = train_tokenizer(tiny(), run.path, RUNTIME)
    assert [next(events).step for _ in range(2)] == [2, 4]
    send(run, Intervention(fields={"optim.lr": 1e-5}))
    assert next(events).step == 6
    events.close()
    list(train_tokenizer(tiny(), run.path, RUNTIME))
    assert [(each.step, each.fields) for each in read_interventions(run)] == [(4, {"optim.lr": 1e-5})]
    list(train_tokenizer(tiny(), whole.path, RUNTIME, intervene=scheduled(read_interventions(run))))
    assert_same_run(run, whole)


def test_a_stop_is_obeyed_once_and_what_was_asked_before_it_is_done_first(tiny: Any, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    events = train_tokenizer(tiny(), run.path, RUNTIME)
    assert next(events).step == 2
    send(run, "pause")
    send(run, Intervention(fields={"optim.lr": 1e-5}))
    send(run, "stop")
    assert last_command(run) == "stop"
    assert [each.fields for each in on_their_way(run)] == [{"optim.lr": 1e-5}]
    with pytest.raises(StopRequested, match="stopped at step 3 of 8"):
        list(events)
    assert len(read_interventions(run)) == 1
    assert on_their_way(run) == []
    assert read_lines(run.control)[-1] == {"obeyed": 3, "step": 3}
    list(train_tokenizer(tiny(), run.path, RUNTIME))
    assert run.finished


def test_a_pause_holds_until_a_resume_and_ends_with_the_trainers_own_reason_to_stop(tmp_path: Path) -> None:
    run, stop, said = RunDirectory(tmp_path), threading.Event(), []
    control = Control(run, stop.is_set)
    send(run, "pause")
    assert last_command(run) == "pause"
    waiting = threading.Thread(target=lambda: said.append(control.should_stop()))
    waiting.start()
    time.sleep(0.2)
    assert not said
    send(run, "resume")
    until(lambda: said == [False])
    send(run, "pause")
    waiting = threading.Thread(target=lambda: said.append(control.should_stop()))
    waiting.start()
    stop.set()
    until(lambda: said == [False, True])


def test_what_cannot_be_obeyed_is_refused_once_and_training_goes_on(tiny: Any, tmp_path: Path) -> None:
    run, quiet = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "quiet")
    run.path.mkdir()
    for line in ({"command": "halt"}, {"feilds": {}}, {"fields": {"steps": 7}}, {"fields": {"optim.lr": -1.0}}):
        append_line(run.control, line)
    with run.control.open("a") as file:
        file.write('words\n\n[]\n{"command": "st')
    with pytest.raises(StopRequested):
        list(train_tokenizer(tiny(), run.path, RUNTIME, stop_after(4)))
    list(train_tokenizer(tiny(), run.path, RUNTIME))
    refused = [line for line in read_lines(run.control) if "refused" in line]
    assert sorted(line["refused"] for line in refused) == [1, 2, 3, 4, 5, 7, 8]  # the torn one too, once a line follows
    reasons = {line["refused"]: line["reason"] for line in refused}
    assert reasons[1] == "command 'halt' is not known; valid names are pause, resume, stop"
    assert "feilds: Extra inputs" in reasons[2]
    assert "'steps' cannot change while this run trains" in reasons[3]
    assert "optim.lr: Input should be greater than 0" in reasons[4]
    assert not run.interventions.exists()
    list(train_tokenizer(tiny(), quiet.path, RUNTIME))
    assert_same_run(run, quiet)
