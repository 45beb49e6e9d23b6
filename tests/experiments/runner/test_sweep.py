from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from experiments import rows
from experiments.cells import unique_runs
from experiments.cli import app
from experiments.runner import worker
from experiments.runner.sweep import Outcome, train_study
from experiments.study import Study
from ibq.run_directory import RunDirectory

TIMING = {"train_seconds", "peak_memory_gib"}


def small(folder: Path, monkeypatch: pytest.MonkeyPatch, arms: int = 2, **overrides: object) -> Study:
    """A study of the first arms only, in a folder of its own."""
    monkeypatch.setenv("IBQ_RUNS", str(folder / "runs"))
    study = Study("smoke", overrides={"steps": 4, **overrides})
    return study.only(study.cells[:arms])


def test_every_run_has_a_row_and_the_sweep_said_so(trained: tuple[Study, Outcome, list[str]]) -> None:
    study, outcome, said = trained
    assert not outcome.failed
    assert not outcome.unfinished
    assert {cell.run.path for cell in outcome.finished} == {cell.run.path for cell in study.cells}
    assert sum("left" in line for line in said) >= len(unique_runs(study.cells))
    for cell in study.cells:
        assert [attempt["event"] for attempt in cell.run.read_attempts()] == ["started", "finished"]
        assert not cell.run.checkpoint.exists()


def test_a_second_sweep_trains_nothing(trained: tuple[Study, Outcome, list[str]]) -> None:
    study = trained[0]
    before = {cell.run.row: cell.run.row.stat().st_mtime_ns for cell in study.cells}
    outcome = train_study(study, device="cpu", say=lambda _: None)
    assert outcome.finished == []
    assert outcome.skipped == len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_rows_join_arms_and_facts(trained: tuple[Study, Outcome, list[str]]) -> None:
    frame = rows.load(trained[0])
    assert list(frame.columns[:7]) == rows.FIRST_COLUMNS
    assert set(frame["status"]) == {"ok"}
    assert len(frame) == len(trained[0].cells)
    assert (frame["protocol.n_images"] == 16).all()
    tokenizers, transformers = (frame[frame["stage"] == stage] for stage in ("tokenizer", "transformer"))
    assert (tokenizers["tokens"] == 16 * 64).all()
    assert (tokenizers["config.quantizer.codebook_size"] == tokenizers["codebook_size"]).all()
    assert len(transformers) == 7
    assert (transformers["config.tokenizer.quantizer.codebook_size"] == transformers["codebook_size"]).all()


def test_the_same_seed_gives_the_same_row_in_another_process(
    trained: tuple[Study, Outcome, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = trained[0].cells[1:2]
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    again = Study("smoke")
    again = again.only(again.cells[1:2])
    train_study(again, device="cpu", say=lambda _: None)
    one, other = (cell.run.read_row() for cell in (cells[0], again.cells[0]))
    assert {k: v for k, v in one.items() if k not in TIMING} == {k: v for k, v in other.items() if k not in TIMING}


def test_a_failed_arm_is_recorded_the_others_finish_and_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small(tmp_path, monkeypatch, arms=3)
    broken = study.cells[1].run
    broken.path.mkdir(parents=True)
    broken.config.write_text(json.dumps(study.cells[0].config.to_json_dict()))
    outcome = train_study(study, device="cpu", say=lambda _: None)
    assert [cell.arm.name for cell in outcome.failed] == ["ibq_published"]
    assert len(outcome.finished) == 2
    frame = rows.load(study).set_index("arm")
    assert frame.loc["ibq_published", "status"] == "failed"
    assert "holds a run with quantizer." in frame.loc["ibq_published", "reason"]
    broken.config.unlink()
    assert [cell.arm.name for cell in train_study(study, device="cpu", say=lambda _: None).finished] == [
        "ibq_published"
    ]


def test_nan_is_a_final_state_without_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path, monkeypatch, arms=1, **{"optim.lr": 1e30})
    outcome = train_study(study, device="cpu", say=lambda _: None)
    row = outcome.finished[0].run.read_row()
    assert row["status"] == "nan"
    assert "step" in row["reason"]
    assert "perplexity" not in row
    assert train_study(study, device="cpu", say=lambda _: None).skipped == 1


@pytest.mark.usefixtures("loaded_server")
def test_a_time_budget_stops_resumably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path, monkeypatch, arms=1, steps=100_000)
    outcome = train_study(study, device="cpu", time_budget_s=6, say=lambda _: None)
    assert outcome.seconds < 60
    assert [cell.arm.name for cell in outcome.unfinished] == ["vq_published"]
    run = outcome.unfinished[0].run
    assert not run.finished
    assert run.read_attempts()[-1]["event"] == "stopped"
    assert (run.checkpoint / "meta.json").is_file()
    assert rows.state(outcome.unfinished[0]) == "stopped"


@pytest.mark.usefixtures("loaded_server")
def test_a_claimed_run_is_left_to_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path, monkeypatch, arms=1)
    run = study.cells[0].run
    run.path.mkdir(parents=True)
    with FileLock(run.lock):
        assert rows.state(study.cells[0]) == "running"
        outcome = train_study(study, device="cpu", time_budget_s=4, say=lambda _: None)
    assert outcome.finished == []
    assert run.read_attempts() == []


@pytest.mark.processes
def test_trainers_die_with_a_killed_driver_and_the_run_goes_on_later(tmp_path: Path) -> None:
    environment = os.environ | {"IBQ_RUNS": str(tmp_path), "IBQ_REPORTS": str(tmp_path / "reports")}
    command = [sys.executable, "-m", "experiments", "run", "--preset", "smoke", "--set", "steps=100000"]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        runs = wait_for(lambda: [RunDirectory(path.parent) for path in tmp_path.glob("*/history.jsonl")])
        pids = [attempt["pid"] for run in runs for attempt in run.read_attempts()]
        assert pids
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        wait_for(
            lambda: (
                not any(
                    Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids
                )
            )
        )
    finally:
        driver.kill()
    with FileLock(runs[0].lock, timeout=5):
        assert not runs[0].finished


def wait_for(condition: object, seconds: float = 120) -> object:
    """The first truthy value of condition() within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def test_unique_runs_keep_the_first_cell() -> None:
    cells = Study("quick").cells
    doubled = [cells[0], replace(cells[0], arm=cells[1].arm), cells[1]]
    assert unique_runs(doubled) == [cells[0], cells[1]]


@pytest.mark.processes
@pytest.mark.usefixtures("loaded_server")
def test_a_hung_trainer_is_killed_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path, monkeypatch, arms=1, steps=100_000)
    freezer = threading.Thread(target=lambda: os.kill(wait_for(lambda: started_pid(study)), signal.SIGSTOP))
    freezer.start()
    outcome = train_study(study, device="cpu", hang_s=8, say=lambda _: None)
    freezer.join()
    assert [cell.arm.name for cell in outcome.failed] == ["vq_published"]
    attempt = study.cells[0].run.read_attempts()[-1]
    assert attempt["event"] == "timeout"
    assert "no sign of life for" in attempt["reason"]
    assert rows.state(study.cells[0]) == "failed"


@pytest.mark.processes
def test_a_trainer_told_to_stop_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path, monkeypatch, arms=2, steps=400)
    stopper = threading.Thread(target=lambda: os.kill(wait_for(lambda: started_pid(study)), signal.SIGTERM))
    stopper.start()
    outcome = train_study(study, device="cpu", slots=2, say=lambda _: None)
    stopper.join()
    assert [cell.arm.name for cell in outcome.finished] == ["ibq_published"]
    assert [cell.arm.name for cell in outcome.unfinished] == ["vq_published"]
    assert study.cells[0].run.read_attempts()[-1]["event"] == "stopped"


def test_a_failed_arm_ends_the_command_with_the_right_count_and_no_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small(tmp_path, monkeypatch, arms=3)
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    study.cells[1].run.path.mkdir(parents=True)
    study.cells[1].run.config.write_text("{")
    monkeypatch.setattr(Study, "cells", study.cells)
    result = CliRunner().invoke(app, ["run", "--preset", "smoke", "--set", "steps=4", "--device", "cpu"])
    assert result.exit_code == 1
    assert "1 failed, 0 unfinished; the same command goes on from here" in result.output
    assert not list((tmp_path / "reports").rglob("*.ipynb"))


def started_pid(study: Study) -> int | None:
    run = study.cells[0].run
    return run.read_attempts()[-1]["pid"] if run.heartbeat.exists() else None


@pytest.mark.processes
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_within_ten_seconds_resumably(tmp_path: Path, signum: signal.Signals) -> None:
    environment = os.environ | {"IBQ_RUNS": str(tmp_path / "runs"), "IBQ_REPORTS": str(tmp_path / "reports")}
    command = [sys.executable, "-m", "experiments", "run", "--preset", "smoke", "--set", "steps=100000"]
    heed = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs inherit that Ctrl-C is ignored
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as driver:
        try:
            wait_for(lambda: list(tmp_path.glob("runs/*/history.jsonl")))
            started = time.monotonic()
            driver.send_signal(signum)
            _, stderr = driver.communicate(timeout=900)
        finally:
            driver.kill()
    assert time.monotonic() - started < 10
    assert driver.returncode == 130
    assert stderr.strip() == "stopped; the same command goes on from here"
    runs = [RunDirectory(path.parent) for path in tmp_path.glob("runs/*/history.jsonl")]
    assert all(run.read_attempts()[-1]["event"] == "stopped" for run in runs)
    assert all((run.checkpoint / "meta.json").is_file() for run in runs)


@pytest.mark.processes
def test_two_drivers_share_a_study_and_train_nothing_twice(tmp_path: Path) -> None:
    environment = os.environ | {"IBQ_RUNS": str(tmp_path / "runs"), "IBQ_REPORTS": str(tmp_path / "reports")}
    code = (
        "from experiments.study import Study; from experiments.runner.sweep import train_study\n"
        "if __name__ == '__main__':\n"
        "    study = Study('smoke', overrides={'steps': 30}); o = train_study(study.only(study.cells[:5]), "
        "device='cpu')\n"
        "    assert not o.failed and not o.unfinished, o"
    )
    script = tmp_path / "driver.py"
    script.write_text(code)
    drivers = [
        subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [driver.wait(300) for driver in drivers] == [0, 0]
    runs = [RunDirectory(path) for path in (tmp_path / "runs").glob("*/")]
    assert len(runs) == 5
    for run in runs:
        assert run.finished
        assert [a["event"] for a in run.read_attempts()].count("started") == 1


def test_running_out_of_memory_says_what_was_asked() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    event, reason, _ = worker.classify(caught.value)
    assert event == "oom"
    assert str(4 * 2**50) in reason
    assert worker.classify(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))[0] == "oom"
