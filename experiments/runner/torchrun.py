"""Training of one run in the foreground: by hand, under a scheduler, or in each process that torchrun starts.

The first process holds the claim on the run, records the attempt as the trainers of a sweep do and prints; the others
train along.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments import status
from experiments.runner import worker
from experiments.runner.sweep import REPORT_S
from experiments.study import runs_folder
from ibq.config import RunConfig
from ibq.data import data_hash_of
from ibq.distributed import copy_of_first, is_first_here, is_writer, process_group, rank, shared_errors
from ibq.errors import ConfigError, DataError
from ibq.models.tokenizer import Tokenizer
from ibq.run_directory import RunDirectory
from ibq.training.claim import check_config
from ibq.training.runtime import LogEvent, Runtime

STOPPED = 130
"""Exit code of a run that was asked to stop, and goes on when it is called again."""
PEER_LOST = "a process was lost"
"""Key of `is_first_here` for a lost process: whichever was lost, one of the others tells of it."""
BOOKKEEPING = {".lock", "attempts.jsonl", "heartbeat"}
"""Files that a run's folder holds before anything is trained."""


def train(
    config: RunConfig,
    runtime: Runtime,
    out: Path | None = None,
    say: Callable[[str], None] = print,
    tokenizer: Tokenizer | RunDirectory | None = None,
) -> None:
    """Train a run to its row, or go on with it; SIGTERM and Ctrl-C stop it resumably at its next step.

    Args:
        config: what to train.
        runtime: device and cadences; under torchrun each process has the GPU of its local rank.
        out: the run's directory; None: its id in the runs folder (IBQ_RUNS, else runs/ in the repository).
        say: receives one line at a time: of the first process, and of another one what befell that one alone.
        tokenizer: that of a transformer's config, or the finished run that it is of.

    Raises:
        SystemExit: the run has no row of status "ok": STOPPED, `worker.DISK_FULL`, 1 any other failure. The reason has
            been said and stands in attempts.jsonl.
        ConfigError: another process trains this run, or it cannot be trained as given (the weights of its perceptual
            term are absent, say), or not into `out`.
        DataError: the data are not there. Either leaves no folder behind that this call has made.
    """
    with _stopping() as stop, process_group(runtime.device) as processes, ExitStack() as claims:
        runtime = replace(runtime, device=str(processes.device))
        run, made = _claim(config, out, claims)
        if copy_of_first(run.finished):
            if is_writer():
                say(f"{run.path} is finished already: {status.result_of(run.read_row())}")
            return
        if is_writer():
            say(f"training {config.steps:,} steps of {config.batch_size} images into {run.path}")
        seen = _Progress(run, say) if is_writer() else lambda event: None
        ended = worker.attempt(run, config, runtime, stop.is_set, seen, tokenizer)
        if ended.code == worker.UNFIT:
            if made and {path.name for path in run.path.iterdir()} <= BOOKKEEPING:
                shutil.rmtree(run.path)
            raise ConfigError(ended.reason)
        if code := _conclude(run, ended, say):
            raise SystemExit(code)  # leaves the group without waiting for the others


def _claim(config: RunConfig, out: Path | None, claims: ExitStack) -> tuple[RunDirectory, bool]:
    """Directory of the run, locked by the first process until `claims` is closed, and whether this process
    has made it."""
    path, made = out, False
    with shared_errors(ConfigError, DataError):
        if is_writer():
            if out:
                _require_own_folder(out, config)
            path = out or runs_folder() / config.run_id(data_hash_of(config.data))
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            try:
                claims.enter_context(FileLock(RunDirectory(path).lock, timeout=2))
            except Timeout:
                raise ConfigError(
                    f"run {path.name} is being trained by another process; stop that one, or pass --out FOLDER"
                ) from None
            check_config(RunDirectory(path), config)  # before a finished run is taken for this one
    return RunDirectory(copy_of_first(path) or ""), made


def _require_own_folder(out: Path, config: RunConfig) -> None:
    """ConfigError: `out` is a file, lies among the pictures, or holds something else than a run."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a new folder, or that of a run")
    if config.data.folder and out.resolve().is_relative_to(Path(config.data.folder).resolve()):
        raise ConfigError(
            f"--out {out} lies inside {config.data.folder}, the folder of the images; name a folder outside"
        )
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not RunDirectory(out).config.is_file() and not names <= BOOKKEEPING:
        raise ConfigError(f"--out {out} holds other files than a run's; name a new folder, or that of a run")


def _conclude(run: RunDirectory, ended: worker.Ended, say: Callable[[str], None]) -> int:
    """Exit code; the end is said by the first process, that of another alone by itself, and the loss of one by
    whichever of the others finds it first."""
    if is_writer() and run.finished:
        row = run.read_row()
        say(("" if row["status"] == "ok" else f"{row['status']}: ") + status.result_of(row))
        return int(row["status"] != "ok")
    if ended.event != "lost" or is_first_here(PEER_LOST):
        if is_writer():
            say(str(ended.reason))
        elif ended.event not in ("finished", "nan", "stopped"):  # which befall all processes alike
            say(f"process {rank()}: {ended.reason}")
    return {"finished": 0, "stopped": STOPPED}.get(ended.event, ended.code or 1)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once."""
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
    """Line at the first log event, then one every half minute, and one at the last: where the run is and what is left
    of it."""

    def __init__(self, run: RunDirectory, say: Callable[[str], None]) -> None:
        self._run, self._say, self._last = run, say, float("-inf")

    def __call__(self, event: LogEvent) -> None:
        now, ends = time.monotonic(), event.step == event.steps
        if now - self._last < REPORT_S and not ends:
            return
        self._last = now
        left = status.time_left(status.seconds_left(self._run.read_recent(status.SPEED_LINES), event.steps))
        numbers = _numbers(event.record)
        self._say(f"step {event.step:,} of {event.steps:,}: {numbers}" + ("" if ends else f"; {left}"))


def _numbers(record: dict[str, Any]) -> str:
    """Loss and perplexity of a log step: a tokenizer's of its codes, a transformer's of its predictions, exp(loss)."""
    if "perplexity" in record:
        return f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.0f}"
    return f"loss {record['loss']:.4f} nats a token, perplexity {math.exp(record['loss']):.0f}"
