"""Train one run in the foreground: by hand, under a scheduler, or in each of the processes that torchrun starts.

The first process holds the claim on the run, records the attempt as the trainers of a sweep do and prints; the others train along.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from experiments import worker
from experiments.study import ROOT
from experiments.sweep import HEARTBEAT_S, failure_reason, time_left
from ibq.config import TrainConfig
from ibq.data import DataError, data_hash_of
from ibq.distributed import copy_of_first, is_first_here, is_writer, peers, process_group, rank, shared_errors
from ibq.errors import ConfigError, NonFiniteError
from ibq.run_directory import RunDirectory
from ibq.train_tokenizer import LogEvent, Runtime, StopRequested, train_tokenizer

STOPPED = 130
"""Exit code of a run that was asked to stop, and goes on when it is called again."""
PEER_LOST = "a process was lost"
"""What `is_first_here` is asked about: whichever was lost, one of the others tells of it."""


def train(config: TrainConfig, runtime: Runtime, out: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Train a run to its row, or go on with it; SIGTERM and Ctrl-C stop it resumably at its next step.

    Args:
        config: what to train.
        runtime: device and cadences; under torchrun each process has the GPU of its local rank.
        out: the run's directory; None: its id in the runs folder (IBQ_RUNS, else runs/ in the repository).
        say: receives one line at a time: of the first process, and of another one what befell that one alone.

    Raises:
        SystemExit: the run has no row of status "ok": STOPPED, `worker.DISK_FULL`, 1 any other failure. The reason has been said and
            stands in attempts.jsonl.
        ConfigError: another process trains this run.
        DataError: the data is not there.
    """
    with _stopping() as stop, process_group(runtime.device) as processes, ExitStack() as claims:
        runtime = replace(runtime, device=str(processes.device))
        run = _claim(config, out, claims)
        if copy_of_first(run.finished):
            if is_writer():
                say(f"{run.path} is finished already: {_result(run)}")
            return
        code = (_lead if is_writer() else _follow)(config, run, runtime, stop, say)
        if code:
            raise SystemExit(code)  # which leaves the group without waiting for the others


def _claim(config: TrainConfig, out: Path | None, claims: ExitStack) -> RunDirectory:
    """The run's directory, which the first process holds the lock of until `claims` is closed."""
    path = out
    with shared_errors(ConfigError, DataError):
        if is_writer():
            path = out or Path(os.environ.get("IBQ_RUNS") or ROOT / "runs") / config.run_id(data_hash_of(config.data))
            path.mkdir(parents=True, exist_ok=True)
            try:
                claims.enter_context(FileLock(RunDirectory(path).lock, timeout=2))
            except Timeout:
                raise ConfigError(f"run {path.name} is being trained by another process; stop that one, or pass --out FOLDER") from None
    return RunDirectory(copy_of_first(path) or "")


def _lead(config: TrainConfig, run: RunDirectory, runtime: Runtime, stop: threading.Event, say: Callable[[str], None]) -> int:
    """Train as the process that records and prints. Returns the exit code."""
    say(f"training {config.steps:,} steps of {config.batch_size} images into {run.path}")
    code = worker.attempt(run, config.to_json_dict(), runtime, stop, _Progress(say))
    if run.finished:
        say(_result(run))
        return int(run.read_row()["status"] != "ok")
    if run.read_attempts()[-1]["event"] != "lost" or is_first_here(PEER_LOST):
        say(failure_reason(run))
    return code or STOPPED


def _follow(config: TrainConfig, run: RunDirectory, runtime: Runtime, stop: threading.Event, say: Callable[[str], None]) -> int:
    """Train along with the first process, which records how it ends; what fails here alone is said here. Returns the exit code."""
    try:
        with peers():
            for _ in train_tokenizer(config, run.path, runtime, stop.is_set):
                pass
    except StopRequested:
        return STOPPED
    except (NonFiniteError, ConfigError, DataError):  # on all processes alike
        return 1
    except Exception as error:
        event, reason = worker.classify(error)
        if event != "lost" or is_first_here(PEER_LOST):
            say(f"process {rank()}: {reason}")
        return 1
    return 0


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A line at the first log event, then one every half minute, and one at the last: where the run is and what is left of it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._last = say, float("-inf")
        self._first: tuple[int, float] | None = None

    def __call__(self, event: LogEvent) -> None:
        now = time.monotonic()
        self._first = self._first or (event.step, now)
        if now - self._last < HEARTBEAT_S and event.step < event.steps:
            return
        self._last = now
        steps, seconds = event.step - self._first[0], now - self._first[1]
        left = time_left((event.steps - event.step) * seconds / steps) if steps else "time left not known yet"
        numbers = f"loss {event.record['loss']:.4f}, perplexity {event.record['perplexity']:.0f}"
        self._say(f"step {event.step:,} of {event.steps:,}: {numbers}" + (f"; {left}" if event.step < event.steps else ""))


def _result(run: RunDirectory) -> str:
    row = run.read_row()
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    return f"perplexity {row['perplexity']:.0f} of {row['codebook_size']}, L1 {row['l1']:.4f}, {row['train_seconds']:.0f} s of training"
