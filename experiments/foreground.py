"""Train one run in the foreground: by hand, under a scheduler, or in each of the processes that torchrun starts.

The first process holds the claim on the run, records the attempt as the trainers of a sweep do and prints; the others train along.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from experiments import worker
from experiments.study import ROOT
from experiments.sweep import HEARTBEAT_S, failure_reason, time_left
from ibq.config import TrainConfig
from ibq.data import data_hash_of
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory
from ibq.train_tokenizer import LogEvent, Runtime


def run_directory(config: TrainConfig, out: Path | None = None) -> RunDirectory:
    """Where a config's run lies: `out`, or its id in the runs folder (IBQ_RUNS, else runs/ in the repository).

    Raises:
        DataError: the data, whose content the id hangs on, is not there.
    """
    return RunDirectory(out or Path(os.environ.get("IBQ_RUNS") or ROOT / "runs") / config.run_id(data_hash_of(config.data)))


def train(config: TrainConfig, run: RunDirectory, runtime: Runtime, say: Callable[[str], None] = print) -> int:
    """Train a run to its row, or go on with it; SIGTERM and Ctrl-C stop it resumably at its next step.

    Args:
        config: what to train.
        run: its directory.
        runtime: device and cadences.
        say: receives one line at a time.

    Returns:
        the exit code: 0 finished, 130 stopped, `worker.DISK_FULL`, 1 any other failure, a run that did not stay finite among them; the
        reason has been said and stands in attempts.jsonl.

    Raises:
        ConfigError: another process trains this run.
    """
    if run.finished:
        say(f"{run.path} is finished already: {_result(run)}")
        return 0
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        with _stopping(say) as stop, FileLock(run.lock, timeout=2):
            say(f"training {config.steps:,} steps of {config.batch_size} images into {run.path}")
            code = worker.attempt(run, config.to_json_dict(), runtime, stop, _Progress(say))
    except Timeout:
        raise ConfigError(f"run {run.path.name} is being trained by another process; stop that one, or pass --out FOLDER") from None
    if run.finished:
        say(_result(run))
        return 0 if run.read_row()["status"] == "ok" else 1
    say(failure_reason(run))
    return 130 if stop.is_set() and not code else code


@contextmanager
def _stopping(say: Callable[[str], None]) -> Iterator[threading.Event]:
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
