"""Train one run in the foreground: by hand, under a scheduler, or in each of the processes that torchrun starts.

The first process holds the claim on the run, records the attempt as the trainers of a sweep do and prints; the others
train along.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections import deque
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
from ibq.distributed import copy_of_first, is_first_here, is_writer, peers, process_group, rank, shared_errors
from ibq.errors import ConfigError, DataError, NonFiniteError
from ibq.models.tokenizer import Tokenizer
from ibq.run_directory import RunDirectory
from ibq.training.runtime import LogEvent, Runtime, StopRequested, check_config

STOPPED = 130
"""Exit code of a run that was asked to stop, and goes on when it is called again."""
PEER_LOST = "a process was lost"
"""What `is_first_here` is asked about: whichever was lost, one of the others tells of it."""
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
        ConfigError: another process trains this run, or it cannot be trained as given, or not into `out`.
        DataError: the data, or the weights of the perceptual term, are not there. Either leaves no folder behind that
            this call has made.
    """
    with _stopping() as stop, process_group(runtime.device) as processes, ExitStack() as claims:
        runtime = replace(runtime, device=str(processes.device))
        run, made = _claim(config, out, claims)
        if copy_of_first(run.finished):
            if is_writer():
                say(f"{run.path} is finished already: {status.result_of(run.read_row())}")
            return
        try:
            code = (_lead if is_writer() else _follow)(config, tokenizer, run, runtime, stop, say)
        except (ConfigError, DataError):
            if made and {path.name for path in run.path.iterdir()} <= BOOKKEEPING:
                shutil.rmtree(run.path)
            raise
        if code:
            raise SystemExit(code)  # which leaves the group without waiting for the others


def _claim(config: RunConfig, out: Path | None, claims: ExitStack) -> tuple[RunDirectory, bool]:
    """The run's directory, which the first process holds the lock of until `claims` is closed, and whether this process
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
    if (
        out.is_dir()
        and not RunDirectory(out).config.is_file()
        and not {path.name for path in out.iterdir()} <= BOOKKEEPING
    ):
        raise ConfigError(f"--out {out} holds other files than a run's; name a new folder, or that of a run")


def _lead(
    config: RunConfig,
    tokenizer: Tokenizer | RunDirectory | None,
    run: RunDirectory,
    runtime: Runtime,
    stop: threading.Event,
    say: Callable[[str], None],
) -> int:
    """Train as the process that records and prints. Returns the exit code. ConfigError, DataError: it cannot be trained
    as given."""
    say(f"training {config.steps:,} steps of {config.batch_size} images into {run.path}")
    code = worker.attempt(run, config.to_json_dict(), runtime, stop.is_set, _Progress(say), tokenizer)
    if code == worker.UNFIT:
        raise ConfigError(run.read_attempts()[-1]["reason"])
    if run.finished:
        row = run.read_row()
        lost = row["status"] != "ok"
        say(f"{row['status']}: {status.result_of(row)}" if lost else status.result_of(row))
        return int(lost)
    if run.read_attempts()[-1]["event"] != "lost" or is_first_here(PEER_LOST):
        say(status.of(run).reason)
    return code or STOPPED


def _follow(
    config: RunConfig,
    tokenizer: Tokenizer | RunDirectory | None,
    run: RunDirectory,
    runtime: Runtime,
    stop: threading.Event,
    say: Callable[[str], None],
) -> int:
    """Train along with the first process, which records how it ends; what fails here alone is said here. Returns the
    exit code."""
    try:
        with peers():
            for _ in worker.trained(config, tokenizer, run, runtime, stop.is_set):
                pass
    except StopRequested:
        return STOPPED
    except NonFiniteError:  # on all processes alike, as are the next two
        return 1
    except (ConfigError, DataError):
        raise
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
    """A line at the first log event, then one every half minute, and one at the last: where the run is and what is left
    of it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._last = say, float("-inf")
        self._recent: deque[dict[str, Any]] = deque(maxlen=status.SPEED_LINES)

    def __call__(self, event: LogEvent) -> None:
        self._recent.append(event.record)
        now = time.monotonic()
        if now - self._last < REPORT_S and event.step < event.steps:
            return
        self._last = now
        left = status.time_left(status.seconds_left(self._recent, event.steps))
        numbers = _numbers(event.record)
        self._say(
            f"step {event.step:,} of {event.steps:,}: {numbers}" + (f"; {left}" if event.step < event.steps else "")
        )


def _numbers(record: dict[str, Any]) -> str:
    """Loss and perplexity of a log step: a tokenizer's of its codes, a transformer's of its predictions, exp(loss)."""
    if "perplexity" in record:
        return f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.0f}"
    return f"loss {record['loss']:.4f} nats a token, perplexity {math.exp(record['loss']):.0f}"
