"""Processes of the explorer: nothing leaks, nothing is left behind, and what a process cannot do any more is said by
those that can."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from explorer_runs import LONG, PATIENCE_S, config_of, training, until
from safetensors.torch import load_file

from experiments.explorer.live_umap import read_live_umap
from experiments.explorer.run import ExplorerRun, Workers, new_run
from experiments.explorer.trainer import LIVE
from experiments.study import ROOT
from ibq.run_directory import RunDirectory


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
        return len(process.children(recursive=True)), process.num_fds(), process.num_threads()

    before_all = held(me)
    cycle()
    until(lambda: workers.is_warm, "warm workers")
    assert workers._server is not None
    server = psutil.Process(workers._server.pid)
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
    workers.close(PATIENCE_S)
    assert held(me) == before_all
    cycle()  # once more, from nothing
    workers.close(PATIENCE_S)
    assert held(me) == before_all


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
    assert len(mine) == 4  # parent, server, two trainers
    if how == "server killed":
        server = next(process for process in mine if process.ppid() == parent.pid)
        server.kill()
        until(lambda: len(processes_with(str(tmp_path))) == 1, "the end of the trainers")
        parent.kill()
    else:
        parent.send_signal(how)
    parent.wait(PATIENCE_S)
    parent.stdout.close()
    until(lambda: not processes_with(str(tmp_path)), "the end of every process")
    runs = [RunDirectory(path) for path in sorted((tmp_path / "explore").iterdir())]
    assert [run.read_attempts()[-1]["event"] for run in runs] == ["stopped", "stopped"]


def test_a_server_that_cannot_start_says_why(
    make_run: Callable[..., ExplorerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    run = make_run()
    run.workers = Workers(device="cpu")
    run.train()
    assert run.wait(PATIENCE_S)
    run.workers.close(PATIENCE_S)
    assert run.state == "failed"
    assert run.reason == "the process that starts trainers has ended: it said nothing; train the run again"


@pytest.mark.processes
def test_umap_of_a_run_that_trains(make_run: Callable[..., ExplorerRun]) -> None:
    run = training(make_run())
    assert read_live_umap(run.directory) is None
    run.project_umap()
    until(lambda: read_live_umap(run.directory) is not None, "the projection")
    projected = read_live_umap(run.directory)
    assert projected is not None
    until(lambda: run.workers.projection(run.directory) == "", "the word that it is there")
    assert projected.codes.shape == (run.config.quantizer.codebook_size, 2)
    assert len(projected.features) == len(load_file(run.directory.path / LIVE)["features"])
    assert projected.step >= 1
    assert run.state == "training"
    run.stop()
    assert run.wait(PATIENCE_S)
    (run.directory.path / LIVE).unlink()  # as in a run of the study, of which the newest snapshot is projected
    run.project_umap()
    until(lambda: run.workers.projection(run.directory) == "", "the projection of a snapshot")
    projected = read_live_umap(run.directory)
    assert projected is not None
    assert projected.step == run.directory.snapshot_steps()[-1]


def test_a_umap_without_codes_is_refused_in_a_sentence_and_one_whose_process_is_killed_too(
    make_run: Callable[..., ExplorerRun],
) -> None:
    run = make_run()
    workers = run.workers
    refused = "it has no codes yet; press UMAP again when it has its first point"
    run.project_umap()
    until(lambda: workers.projection(run.directory) == refused, "a sentence")
    assert workers._server is not None
    (projector,) = psutil.Process(workers._server.pid).children()
    training(run)
    run.project_umap()
    assert workers.projection(run.directory) is None
    projector.kill()
    until(lambda: workers.projection(run.directory) is not None, "another sentence")
    assert (
        workers.projection(run.directory) == "the process that computes it has ended (exit code -9); press UMAP again"
    )
    assert run.state == "training"
    run.reset()
    assert run.wait(PATIENCE_S)
    run.project_umap()  # by another process
    until(lambda: workers.projection(run.directory) == refused, "a sentence again")
