"""Pool of trainer processes: started, watched and stopped, each of them training one run directory."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess

from experiments.runner import worker
from ibq.config import RunConfig
from ibq.run_directory import RunDirectory
from ibq.training.runtime import Runtime

GRACE_S = 8.0
"""Seconds that trainers have to write a checkpoint when asked to stop."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Trainer processes, forked from a server that has torch loaded. Leaving the context stops those that still run.

    Args:
        runtime: device and cadences of all runs.
        threads: of torch in each process.
        train: what a process does; called as `worker.train`.
    """

    def __init__(self, runtime: Runtime, threads: int, train: Callable[..., None] = worker.train) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["experiments.runner.preload"])
        self._stopping = False
        self._runtime, self._threads, self._train = runtime, threads, train
        self._running: dict[ForkServerProcess, RunDirectory] = {}
        self._started: dict[ForkServerProcess, float] = {}
        self._hung: dict[ForkServerProcess, str] = {}

    def __len__(self) -> int:
        """Number of processes that have not been reaped."""
        return len(self._running)

    def warm(self) -> None:
        """Start the server, and wait until it has loaded what trainers need."""
        process = self._context.Process(target=int)
        process.start()
        process.join()

    def start(self, run: RunDirectory, config: RunConfig, tokenizer: RunDirectory | None = None) -> None:
        """Train a run in a process of its own; a transformer's on the tokens of the finished run `tokenizer`."""
        arguments = (config, run, self._runtime, self._threads, tokenizer)
        process = self._context.Process(target=self._train, args=arguments, daemon=False)
        process.start()
        self._running[process], self._started[process] = run, time.time()

    def reap(self, timeout_s: float = 0.0) -> Iterator[tuple[RunDirectory, int]]:
        """Runs whose process has ended, with its exit code; waits at most `timeout_s` for the first of them."""
        multiprocessing.connection.wait([process.sentinel for process in self._running], timeout_s)
        for process in [p for p in self._running if not p.is_alive()]:
            process.join()
            run, code = self._running.pop(process), process.exitcode or 0
            del self._started[process]
            if process in self._hung:
                worker.note(run, "timeout", self._hung.pop(process))
            elif code < 0 and not (self._stopping and -code == signal.SIGTERM):
                worker.note_killed(run, code)
            process.close()  # two descriptors a process, of which a long sweep would run out
            yield run, code

    def kill(self, run: RunDirectory) -> None:
        """Kill the process that trains a run, if there is one."""
        for process in [process for process, its in self._running.items() if its.path == run.path]:
            process.kill()

    def kill_hung(self, hang_s: float) -> None:
        """Kill what has shown no sign of life for `hang_s` seconds."""
        for process, run in self._running.items():
            heartbeat = run.heartbeat.stat().st_mtime if run.heartbeat.exists() else 0.0
            silent_s = time.time() - max(heartbeat, self._started[process])
            if silent_s > hang_s and process.is_alive():
                self._hung[process] = f"no sign of life for {silent_s:.0f} s, killed"
                process.kill()

    def stop(self) -> None:
        """Ask every trainer to write a checkpoint and end; one that has hardly started just ends."""
        if not self._stopping:
            self._stopping = True
            for process in self._running:
                process.terminate()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        deadline = time.monotonic() + GRACE_S
        for process in self._running:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
