"""Training one recipe in the foreground: it ends with a row, stops resumably, and holds the claim of a sweep's
trainers."""

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
from experiments.status import time_left
from experiments.study import ROOT
from ibq.errors import DataError
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


@pytest.mark.processes
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
    out, err = process.communicate(timeout=900)
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


def test_what_cannot_be_trained_is_one_sentence_and_leaves_nothing(pictures: Path, tmp_path: Path) -> None:
    arguments = [*command(pictures, tmp_path / "run", 3), "--set", "batch_size=32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: batch_size=32 exceeds the 16 training images")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert events(RunDirectory(tmp_path / "run")) == ["started", "error"], (
        "a folder that was there stays, and tells what was tried"
    )


def test_weights_that_are_not_there_leave_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(_: str) -> None:
        raise DataError("vgg16.pth is not there")

    monkeypatch.setattr("ibq.losses.backbone_weights", absent)
    result = CliRunner().invoke(app, [*command(pictures, tmp_path / "run", 3), "--set", "loss.perceptual=lpips-vgg"])
    assert (result.exit_code, result.stderr) == (2, "error: vgg16.pth is not there\n")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_of_another_config_is_not_taken_for_this_one(pictures: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, command(pictures, tmp_path / "run", 2)).exit_code == 0
    result = CliRunner().invoke(app, command(pictures, tmp_path / "run", 3))
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'run'} holds a run with steps=2, not 3; pass another directory\n"


def test_a_folder_that_is_not_a_runs_is_left_alone(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for out, words in {
        tmp_path / "file": "is a file; name a new folder",
        pictures: f"lies inside {pictures}, the folder of the images",
        pictures / "train" / "run": f"lies inside {pictures}, the folder of the images",
        tmp_path / "folder": "holds other files than a run's; name a new folder",
    }.items():
        result = CliRunner().invoke(app, command(pictures, out, 3))
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: --out {out} {words}")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.tex"]
    assert sorted(path.name for path in pictures.iterdir()) == ["train", "val"]


def test_time_left_is_said_in_a_unit_that_suits_it() -> None:
    assert [time_left(seconds) for seconds in (9, 600, 360_000)] == [
        "about 9 s left",
        "about 10.0 min left",
        "about 100.0 h left",
    ]
