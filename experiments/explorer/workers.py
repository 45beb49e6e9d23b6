"""Trainers of the explorer: the sweep's pool, kept by a thread so that the notebook's kernel never waits.

Runs are steered by their control.jsonl (`ibq.training.control`) and watched by reading their directories; what is kept
here is which of them have a process.
"""

from __future__ import annotations

import atexit
import multiprocessing.forkserver
import shutil
import threading
from contextlib import suppress

from experiments.explorer import trainer
from experiments.runner.pool import GRACE_S, Pool, cores
from experiments.runner.worker import note
from ibq.config import TrainConfig
from ibq.run_directory import RunDirectory
from ibq.training.runtime import Runtime

TICK_S = 0.05
MOST_RUNS = 4
"""Runs that are trained side by side: what the cores are shared by."""


class Workers:
    """Pool of trainers, started when it is first wanted; safe to call from any thread.

    Args:
        device: that runs train on, as `Runtime` has it.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._warm = threading.Event()
        self._asked: dict[str, TrainConfig] = {}
        """Configs of runs to be started, once their process of before has ended."""
        self._running: set[str] = set()
        self._removed: set[str] = set()
        """Runs whose process is to be killed, and whose folder is then to be removed."""

    def warm(self) -> None:
        """Begin to load what training needs, where that has not been done."""
        with self._lock:
            if self._thread is None or self._ended.is_set():
                self._ended, self._warm = threading.Event(), threading.Event()
                of = (self._thread, self._ended, self._warm)
                self._thread = threading.Thread(target=self._serve, args=of, daemon=True, name="workers")
                self._thread.start()

    @property
    def is_warm(self) -> bool:
        """True once a run begins to train at once."""
        return self._warm.is_set()

    def close(self, timeout_s: float = 0.0) -> None:
        """Stop all runs, resumably, and end all processes; wait for that at most so long."""
        with self._lock:
            self._asked.clear()
            self._ended.set()
            self._warm = threading.Event()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def train(self, run: RunDirectory, config: TrainConfig) -> None:
        """Start a run's trainer, once one that it still has has ended."""
        with self._lock:
            self.warm()
            self._asked[str(run.path)] = config

    def train_no_more(self, run: RunDirectory) -> None:
        """Start no other trainer of a run once the one that it has has ended."""
        with self._lock:
            if str(run.path) in self._running:
                self._asked.pop(str(run.path), None)

    def remove(self, run: RunDirectory) -> bool:
        """Kill a run's trainer and remove its folder; False where this kernel trains no such run."""
        with self._lock:
            self._asked.pop(str(run.path), None)
            if str(run.path) not in self._running:
                return False
            self._removed.add(str(run.path))
            return True

    def trains(self, run: RunDirectory) -> bool:
        """True while a run has a process, or is to have one."""
        with self._lock:
            return str(run.path) in self._asked.keys() | self._running

    def removes(self, run: RunDirectory) -> bool:
        """True while a run's folder is still to be removed."""
        with self._lock:
            return str(run.path) in self._removed

    def _serve(self, before: threading.Thread | None, ended: threading.Event, warm: threading.Event) -> None:
        """Start and reap trainers until `ended` is set; only this thread touches the pool, since starting a process
        waits for the server that forks it, which loads torch for seconds."""
        if before is not None:
            before.join()  # there is one server in a process
        threads = max(1, cores() // MOST_RUNS)  # of the machine alone: sums depend on it in their last bits
        pool = Pool(Runtime(device=self.device), threads, trainer.train)
        with suppress(OSError, EOFError):  # said where a run is to be started
            pool.warm()
        warm.set()
        with pool:
            while not ended.wait(0 if len(pool) else TICK_S):
                self._start(pool)
                with self._lock:
                    for path in self._removed:
                        pool.kill(RunDirectory(path))
                self._reap(pool, TICK_S)
        self._reap(pool, 0.0)
        with suppress(ChildProcessError):  # it had ended by itself
            # the server is kept by Python for the whole process, and would stay
            multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]

    def _start(self, pool: Pool) -> None:
        with self._lock:
            ready = [path for path in self._asked if path not in self._running]
            to_start = {path: self._asked.pop(path) for path in ready}
            self._running |= to_start.keys()
        for path, config in to_start.items():
            try:
                pool.start(RunDirectory(path), config)
            except (OSError, EOFError) as error:
                words = (
                    f"the process that starts trainers does not answer ({type(error).__name__}); train the run again"
                )
                note(RunDirectory(path), "error", words)
                with self._lock:
                    self._running.discard(path)

    def _reap(self, pool: Pool, timeout_s: float) -> None:
        for run, _ in pool.reap(timeout_s):
            with self._lock:
                if str(run.path) in self._removed:
                    shutil.rmtree(run.path, ignore_errors=True)
                self._removed.discard(str(run.path))
                self._running.discard(str(run.path))


WORKERS = Workers()
"""Those of this process; none is started before it is wanted."""
atexit.register(WORKERS.close, GRACE_S + 2)
