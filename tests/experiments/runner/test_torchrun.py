"""The command in real processes of torchrun: asked to stop, killed, given something wrong; the same command goes on and
ends the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipe_runs import command, tiny_tokenizer, transformer_command, write_pictures
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.cli import app
from experiments.study import ROOT
from ibq.run_directory import RunDirectory

pytestmark = pytest.mark.processes

STEPS = 200
REPEATABLE = {"averages": "global", "loss.adversarial.norm": "group", "model.norm_groups": "2", "optim.lr": "1e-5"}
REPEATABLE |= {"optim.warmup": "0.5"}  # Adam's first step goes by the sign of a gradient alone, which may be rounding
"""Fields with which one process and two train alike, at a rate at which Adam amplifies rounding little."""
TRANSFORMER_STEPS = 400
WITHOUT_DROPOUT = {f"model.{name}_dropout": "0" for name in ("token", "attention", "ffn", "class")} | {
    "optim.lr": "1e-5"
}
"""The same of a transformer: every process draws what it drops."""
PATIENCE_S = 240


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_pictures(tmp_path_factory.mktemp("torchrun") / "pictures")


class Torchrun:
    """torchrun with two workers, started; `end` waits for it."""

    def __init__(self, arguments: list[str]) -> None:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "experiments",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [*launcher, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def workers(self) -> list[int]:
        """Their process ids."""
        of_torchrun = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in of_torchrun if "experiments" in _command_line(int(pid))]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        """Exit code, what was said, and standard error."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err


def _command_line(pid: int) -> str:
    """Empty once the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def events(run: RunDirectory) -> list[str]:
    return [attempt["event"] for attempt in run.read_attempts()]


def trains(run: RunDirectory, attempts: int) -> bool:
    """So many attempts have been begun, and the last trains."""
    begun = [attempt for attempt in run.read_attempts() if attempt["event"] == "started"]
    return len(begun) == attempts and run.heartbeat.exists() and run.heartbeat.stat().st_mtime > begun[-1]["time"]


def test_two_processes_train_one_run_with_one_writer(pictures: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    code, out, err = Torchrun(command(pictures, run.path, 3)).end()
    assert code == 0, out + err
    assert out.count("training 3 steps of 8 images") == 1
    assert out.count("step 3 of 3: loss ") == 1
    assert events(run) == ["started", "finished"]
    row = run.read_row()
    assert (row["status"], row["protocol.n_images"]) == ("ok", 8)
    assert [line["step"] for line in run.read_history()] == [3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.rate=1", "there is no field 'optim.rate'"),
        ("batch_size=32", "batch_size=32 exceeds the 16 training images"),
    ],
    ids=["before the group", "in the trainers"],
)
def test_a_users_error_is_said_once(pictures: Path, tmp_path: Path, change: str, words: str) -> None:
    code, _, err = Torchrun([*command(pictures, tmp_path / "run", 3), "--set", change]).end()
    assert code == 1  # torchrun's own
    assert err.count(f"error: {words}") == 1
    assert "exitcode  : 2" in err
    assert "experiments/cli" not in err, "no traceback of ours"
    assert not (tmp_path / "run").exists()


def test_stopped_then_killed_it_goes_on_with_any_number_of_processes_and_ends_the_same(
    pictures: Path, tmp_path: Path
) -> None:
    run, whole = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "whole")
    arguments = command(pictures, run.path, STEPS, **REPEATABLE)

    # ---- SIGTERM at torchrun: one checkpoint, at one step
    torchrun = Torchrun(arguments)
    torchrun.wait_for(lambda: trains(run, 1))
    torchrun.process.send_signal(signal.SIGTERM)
    code, out, err = torchrun.end()
    assert code != 0
    assert (
        len(re.findall(rf"^stopped at step \d+ of {STEPS}; the next run goes on from there$", out, re.MULTILINE)) == 1
    ), out + err
    assert events(run) == ["started", "stopped"]
    assert (run.checkpoint / "meta.json").is_file()

    # ---- SIGKILL of the second process, then of the first
    for attempt, victim in ((2, "second"), (3, "first")):
        torchrun = Torchrun(arguments)
        torchrun.wait_for(lambda attempt=attempt: trains(run, attempt))
        workers, first = torchrun.workers, run.read_attempts()[-1]["pid"]
        assert len(workers) == 2
        assert first in workers
        os.kill(first if victim == "first" else next(pid for pid in workers if pid != first), signal.SIGKILL)
        killed = time.monotonic()
        code, out, err = torchrun.end()
        assert time.monotonic() - killed < 30
        assert code != 0
        assert out.count("another process of this run has ended or does not answer (") == 1, out + err
        assert out.count("the same command goes on from the last checkpoint") == 1
        assert not any("experiments" in _command_line(pid) for pid in workers), "a process is left"
        assert events(run)[-1] == ("started" if victim == "first" else "lost")
        assert not run.finished

    # ---- the same command, alone, ends as the run that nothing befell
    for folder in (run, whole):
        result = CliRunner().invoke(app, command(pictures, folder.path, STEPS, **REPEATABLE))
        assert result.exit_code == 0, result.output
    averaged, expected = load_file(run.model), load_file(whole.model)
    assert averaged.keys() == expected.keys()
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-5)
    assert [line["step"] for line in run.read_history()] == [line["step"] for line in whole.read_history()]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_transformer_whose_process_was_killed_goes_on_by_the_same_command_and_ends_the_same(
    tmp_path: Path, sharding: str
) -> None:
    pictures = write_pictures(tmp_path / "pictures", classes=2, side=64)
    tiny_tokenizer().save(tmp_path / "tokenizer")
    run, whole = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "whole")

    def arguments(folder: RunDirectory) -> list[str]:
        usual = transformer_command(pictures, tmp_path / "tokenizer", folder.path, TRANSFORMER_STEPS, **WITHOUT_DROPOUT)
        return [*usual, "--sharding", sharding]

    # ---- SIGTERM once it has logged a step: a checkpoint, whole whatever the sharding
    torchrun = Torchrun(arguments(run))
    torchrun.wait_for(lambda: bool(run.read_history()))
    torchrun.process.send_signal(signal.SIGTERM)
    code, out, err = torchrun.end()
    assert code != 0
    assert out.count("the next run goes on from there") == 1, out + err
    step = json.loads((run.checkpoint / "meta.json").read_text())["step"]
    assert step >= 100

    # ---- SIGKILL of the second process
    torchrun = Torchrun(arguments(run))
    torchrun.wait_for(lambda: trains(run, 2))
    workers, first = torchrun.workers, run.read_attempts()[-1]["pid"]
    os.kill(next(pid for pid in workers if pid != first), signal.SIGKILL)
    code, out, err = torchrun.end()
    assert code != 0
    assert out.count("the same command goes on from the last checkpoint") == 1, out + err
    assert not any("experiments" in _command_line(pid) for pid in workers), "a process is left"
    assert not run.finished

    # ---- the same command goes on from the checkpoint and ends as one process does that nothing befell
    code, out, err = Torchrun(arguments(run)).end()
    assert code == 0, out + err
    assert [attempt["event"] for attempt in run.read_attempts()] == [
        "started",
        "stopped",
        "started",
        "lost",
        "started",
        "finished",
    ]
    assert CliRunner().invoke(app, arguments(whole)).exit_code == 0
    weights, expected = load_file(run.model), load_file(whole.model)
    assert weights.keys() == expected.keys()
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    assert [line["step"] for line in run.read_history()] == [line["step"] for line in whole.read_history()]
    assert run.read_row()["cross_entropy"] == pytest.approx(whole.read_row()["cross_entropy"], abs=1e-5)
