"""Processes that draw figures and project codes, so that the notebook's kernel never waits for either."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from ibq.distributed import exit_with_parent

R = TypeVar("R")
CALLS = 2
"""At a time: a figure is drawn while codes are projected."""
NICENESS = 5
"""The interface and training go before it."""


class Background:
    """Executor whose processes are started when they are first wanted, and anew once one has died; `submit` does not
    wait."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of those that run."""
        return [*self._executor._processes] if self._executor is not None and self._executor._processes else []

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Future of a call of a module's function in one of the processes.

        It raises what the function raises, BrokenProcessPool where a process died meanwhile, and CancelledError after
        `close`.
        """
        try:
            return self._begun().submit(function, *args)
        except BrokenProcessPool:  # since a process has died
            self.close()
            return self._begun().submit(function, *args)

    def close(self) -> None:
        """End the processes, whatever they do; the next call starts others."""
        executor, self._executor = self._executor, None
        if executor is not None:
            for process in list((executor._processes or {}).values()):  # from Python 3.14 on executor.kill_workers
                process.kill()
            executor.shutdown(wait=False, cancel_futures=True)

    def _begun(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(CALLS, mp_context=context, initializer=_begin)
        return self._executor


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupting a cell ends nothing here
    exit_with_parent()
    os.nice(NICENESS)
    torch.set_num_threads(1)
