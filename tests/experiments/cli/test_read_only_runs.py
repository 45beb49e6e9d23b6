"""Runs of a colleague: a folder that can be read alone, with a finished, an unfinished and a running run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from plain_user import as_user, closed

from experiments import status
from experiments.runner.sweep import train_study
from experiments.study import Study
from ibq.run_directory import RunDirectory

pytestmark = pytest.mark.processes
GRID = ("--preset", "smoke", "--set", "steps=2", "--grid", "optim.lr=1e-3,2e-3,3e-3", "--base", "vq_vs_ibq/vq_fair")


@pytest.fixture(scope="module")
def colleague(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of three runs: one finished, one without its row, one whose lock this process holds."""
    runs = tmp_path_factory.mktemp("colleague") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQ_RUNS", str(runs))
        study = Study("smoke", (), 1, {"steps": 2}, {"optim.lr": [1e-3, 2e-3, 3e-3]}, ("vq_vs_ibq/vq_fair",))
        train_study(study, device="cpu", say=lambda line: None)
    for cell in study.cells[1:]:
        cell.run.row.unlink()
    with FileLock(study.cells[2].run.lock), closed(runs):
        yield runs


def command(runs: Path, reports: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    done = as_user("-m", "experiments", *words, *GRID, IBQ_RUNS=str(runs), IBQ_REPORTS=str(reports))
    return done.returncode, done.stdout, done.stderr


def test_status_reads(colleague: Path, tmp_path: Path) -> None:
    code, out, err = command(colleague, tmp_path, "status")
    assert (code, err) == (0, "")
    assert [line.split()[5] for line in out.splitlines()] == ["ok", "pending", "running"]
    assert "finished" not in out


@pytest.mark.parametrize("name", ["plan", "report"])
def test_plan_and_report_read(colleague: Path, tmp_path: Path, name: str) -> None:
    code, out, err = command(colleague, tmp_path, name)
    assert (code, err) == (0, "")
    assert ("3 runs, 1 finished" if name == "plan" else "index.html") in out


def test_run_says_at_once_that_the_folder_cannot_be_written(colleague: Path, tmp_path: Path) -> None:
    code, out, err = command(colleague, tmp_path, "run")
    assert code == 2
    assert out == "1 of 3 runs are finished already\n"
    assert err.startswith(f"error: the folder {colleague}/vq-s0-")
    assert err.endswith(
        "cannot be written; 2 runs have no row yet; copy the runs into a folder of your own and name that by IBQ_RUNS\n"
    )
    assert err.count("\n") == 1


def test_evaluate_says_so_before_it_evaluates(colleague: Path, tmp_path: Path) -> None:
    code, out, err = command(colleague, tmp_path, "evaluate", "--metric", "full_test")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot be written; copy the runs" in err


def test_a_report_that_cannot_be_written_names_the_variable(colleague: Path) -> None:
    code, _, err = command(colleague, colleague, "report")
    assert code == 2
    remedy = "name a folder of your own for reports by IBQ_REPORTS"
    assert err == f"error: the folder {colleague} cannot be written; {remedy}\n"


def test_a_lock_that_cannot_be_asked_is_judged_by_the_sign_of_life(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.lock.symlink_to(run.lock)  # opens for nobody, not even for root
    assert not status.is_held(run)
    run.heartbeat.touch()
    assert status.is_held(run)
    os.utime(run.heartbeat, (0, 0))
    assert not status.is_held(run)
    shutil.rmtree(tmp_path)
