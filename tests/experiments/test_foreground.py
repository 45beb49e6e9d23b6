"""Training one recipe in the foreground: it ends with a row, stops resumably, and holds the claim of a sweep's trainers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.study import ROOT
from experiments.sweep import time_left
from ibq.run_directory import RunDirectory

FIELDS = {
    "data.crop": "center",
    "data.resolution": "32",
    "model.base_channels": "4",
    "model.norm_groups": "4",
    "model.res_blocks": "1",
    "model.z_channels": "8",
    "model.attention_resolutions": "[]",
    "loss.perceptual": "none",
    "loss.adversarial.channels": "8",
    "loss.adversarial.layers": "2",
    "quantizer.codebook_size": "16",
    "quantizer.code_dim": "8",
    "batch_size": "8",
    "accumulate": "2",
    "precision": "fp32",
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen pictures in train/, eight in val/."""
    for split, count in (("train", 16), ("val", 8)):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        for i in range(count):
            noise_HWC = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
            Image.fromarray(noise_HWC.numpy()).save(tmp_path / "pictures" / split / f"{i}.png")
    return tmp_path / "pictures"


def command(pictures: Path, out: Path, steps: int) -> list[str]:
    fields = FIELDS | {"steps": str(steps)}
    changes = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    return ["train", "imagenet256_ibq_1024", "--data", str(pictures), "--out", str(out), "--device", "cpu", *changes]


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


def test_two_processes_train_one_run_with_one_writer(pictures: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*torchrun, *command(pictures, run.path, 3)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("training 3 steps of 8 images") == 1
    assert done.stdout.count("step 3 of 3: loss ") == 1
    assert events(run) == ["started", "finished"]
    row = run.read_row()
    assert (row["status"], row["protocol.n_images"]) == ("ok", 8)
    assert [line["step"] for line in run.read_history()] == [3]
