"""Training one recipe in the foreground: it ends with a row, stops resumably, and holds the claim of a sweep's trainers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from recipe_runs import command, write_pictures
from typer.testing import CliRunner

from experiments.cli import app
from experiments.study import ROOT
from experiments.sweep import time_left
from ibq.run_directory import RunDirectory


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def events(run: RunDirectory) -> list[str]:
    return [attempt["event"] for attempt in run.read_attempts()]


def test_a_run_ends_with_a_row_and_is_not_trained_again(pictures: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    result = CliRunner().invoke(app, command(pictures, run.path, 3))
    assert result.exit_code == 0, result.output
    assert "training 3 steps of 8 images" in result.stdout
    assert "step 3 of 3: loss " in result.stdout
    row = run.read_row()
    assert (row["status"], row["config.accumulate"], row["config.averages"]) == ("ok", 2, "local")
    assert events(run) == ["started", "finished"]
    again = CliRunner().invoke(app, command(pictures, run.path, 3))
    assert again.exit_code == 0
    assert "is finished already: perplexity" in again.stdout
    assert events(run) == ["started", "finished"]


def test_sigterm_stops_resumably_and_the_same_command_goes_on(pictures: Path, tmp_path: Path) -> None:
    run, environment = RunDirectory(tmp_path / "run"), os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *command(pictures, run.path, 100_000)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not run.heartbeat.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "stopped at step" in out
    assert "the next run goes on from there" in out
    assert events(run) == ["started", "stopped"]
    assert (run.checkpoint / "meta.json").is_file()
    assert "Traceback" not in err


def test_a_run_that_another_process_trains_is_left_to_it(pictures: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    with FileLock(run.lock):
        result = CliRunner().invoke(app, command(pictures, run.path, 3))
    assert result.exit_code == 2
    assert result.stderr == "error: run run is being trained by another process; stop that one, or pass --out FOLDER\n"


def test_a_run_that_did_not_stay_finite_says_so_and_fails(pictures: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    result = CliRunner().invoke(app, [*command(pictures, run.path, 6), "--set", "optim.lr=1e30"])
    assert result.exit_code == 1
    assert "nan: step " in result.stdout
    assert events(run) == ["started", "nan"]


def test_a_failure_is_recorded_and_its_reason_said(pictures: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    result = CliRunner().invoke(app, [*command(pictures, run.path, 3), "--set", "batch_size=32"])
    assert result.exit_code == 1
    assert "batch_size=32 exceeds the 16 training images" in result.stdout
    assert events(run) == ["started", "error"]


def test_time_left_is_said_in_a_unit_that_suits_it() -> None:
    assert [time_left(seconds) for seconds in (9, 600, 360_000)] == ["about 9 s left", "about 10.0 min left", "about 100.0 h left"]
