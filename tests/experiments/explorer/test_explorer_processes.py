"""Processes of the explorer: nothing leaks, nothing is left behind, and what a process cannot do any more is said by
those that can."""

from __future__ import annotations

import gc
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest
from explorer_runs import LONG, PATIENCE_S, config_of, training, until
from safetensors.torch import load_file

from experiments.explorer.background import Background
from experiments.explorer.live import project_runs, read_live_umap
from experiments.explorer.run import ExplorerRun, Workers, new_run
from experiments.explorer.trainer import LIVE
from experiments.study import ROOT
from ibq.run_directory import RunDirectory


def processes_of(process: psutil.Process) -> list[psutil.Process]:
    """Children, theirs included, but for Python's tracker of shared memory: it sleeps as long as its process lives."""
    children = process.children(recursive=True)
    return [child for child in children if not any("resource_tracker" in word for word in child.cmdline())]


@pytest.mark.processes
def test_ten_starts_and_stops_leak_nothing(folders: Path) -> None:
    me = psutil.Process()
    workers = Workers(device="cpu")

    def cycle() -> None:
        run = new_run(config_of(LONG, batch_size=2), workers)
        run.train()
        until(lambda: run.state == "training", "the first point")
        run.stop()
        assert run.wait(PATIENCE_S)
        assert run.state == "stopped"

    def held(process: psutil.Process) -> tuple[int, int, int]:
        gc.collect()
        return len(processes_of(process)), process.num_fds(), process.num_threads()

    def closed() -> tuple[int, int, int]:
        workers.close(PATIENCE_S)
        return held(me)

    cycle()
    before_all = closed()
    cycle()
    (server,) = processes_of(me)
    before, memory = (
        [held(process) for process in (me, server)],
        [process.memory_info().rss for process in (me, server)],
    )
    for _ in range(10):
        cycle()
    grown = [(process.memory_info().rss - then) / 2**20 for process, then in zip((me, server), memory, strict=True)]
    after = [held(process) for process in (me, server)]
    print(f"ten cycles: children, descriptors, threads of kernel and server {before} -> {after}, MiB more {grown}")
    for now, then in zip(after, before, strict=True):
        assert all(n <= t for n, t in zip(now, then, strict=True))
    assert max(grown) < 10
    assert closed() == before_all
    assert before_all[0] == 0
    cycle()  # once more, from nothing
    assert closed() == before_all


KERNEL = """
import sys, time
from experiments.explorer.run import WORKERS, new_run
from experiments.recipes import get_preset, tokenizer

config = tokenizer(get_preset("smoke"), {"method": "vq"}).with_fields(steps=100_000)
runs = [new_run(config) for _ in range(2)]
for run in runs:
    run.train()
while not all(run.step for run in runs):
    time.sleep(0.01)
print("training", flush=True)
time.sleep(1000)
"""


def processes_with(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("IBQ_EXPLORER_TOKEN") == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, "server killed"])
def test_a_parent_that_is_gone_leaves_no_process_and_runs_that_go_on(
    tmp_path: Path, workers: Workers, how: Any
) -> None:
    environment = os.environ | {"IBQ_RUNS": str(tmp_path), "IBQ_EXPLORER_TOKEN": str(tmp_path), "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", KERNEL], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "training\n"
    mine = processes_with(str(tmp_path))
    assert len(mine) == 5  # parent, Python's tracker of shared memory, server, two trainers
    if how == "server killed":
        (server,) = [process for process in processes_of(psutil.Process(parent.pid)) if process.ppid() == parent.pid]
        server.kill()
        until(lambda: len(processes_with(str(tmp_path))) == 2, "the end of the trainers")
        parent.kill()
    else:
        parent.send_signal(how)
    parent.wait(PATIENCE_S)
    parent.stdout.close()
    until(lambda: not processes_with(str(tmp_path)), "the end of every process")
    runs = [RunDirectory(path) for path in sorted((tmp_path / "explore").iterdir())]
    assert [run.read_attempts()[-1]["event"] for run in runs] == ["stopped", "stopped"]


@pytest.mark.processes
def test_a_server_that_cannot_start_says_why(
    make_run: Callable[..., ExplorerRun], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    workers.close(PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.spawn, "_python_exe", b"/bin/false")
        run.train()
        assert run.wait(PATIENCE_S)
        assert run.state == "failed"
        assert run.reason.startswith("the process that starts trainers does not answer (")
        assert run.reason.endswith("); train the run again")
    training(run)  # by another server
    workers.warm()


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


@pytest.mark.processes
def test_umap_of_a_run_that_trains(make_run: Callable[..., ExplorerRun], background: Background) -> None:
    run = training(make_run())
    folder = str(run.directory.path)
    assert read_live_umap(run.directory) is None
    assert background.submit(project_runs, [folder]).result(PATIENCE_S) == {folder: ""}
    projected = read_live_umap(run.directory)
    assert projected is not None
    assert projected.codes.shape == (run.config.quantizer.codebook_size, 2)
    assert len(projected.features) == len(load_file(run.directory.path / LIVE)["features"])
    assert projected.step >= 1
    assert run.state == "training"
    run.stop()
    assert run.wait(PATIENCE_S)
    (run.directory.path / LIVE).unlink()  # as in a run of the study, of which the newest snapshot is projected
    assert background.submit(project_runs, [folder]).result(PATIENCE_S) == {folder: ""}
    projected = read_live_umap(run.directory)
    assert projected is not None
    assert projected.step == run.directory.snapshot_steps()[-1]


def test_a_umap_without_codes_is_refused_in_a_sentence(tmp_path: Path) -> None:
    refused = "it has no codes yet; press UMAP again when it has its first point"
    assert project_runs([str(tmp_path)]) == {str(tmp_path): refused}


@pytest.mark.processes
def test_a_process_that_is_killed_is_said_and_replaced(background: Background) -> None:
    sleeping = background.submit(time.sleep, PATIENCE_S)
    until(lambda: background.pids, "a process")
    os.kill(background.pids[0], signal.SIGKILL)
    assert isinstance(sleeping.exception(PATIENCE_S), BrokenProcessPool)
    assert background.submit(abs, -1).result(PATIENCE_S) == 1  # by another one
    (pid, *_) = background.pids
    sleeping = background.submit(time.sleep, PATIENCE_S)
    background.close()
    with pytest.raises((BrokenProcessPool, CancelledError)):
        sleeping.result(PATIENCE_S)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "its end")
    assert background.pids == []
