"""Trainer process of one run. Imported once by the server that forks these, so that an arm starts with torch already
loaded."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from ibq.config import RunConfig, TrainConfig, TransformerTrainConfig
from ibq.data import data_hash_of
from ibq.distributed import exit_with_parent, is_writer, peers, resolve_device
from ibq.errors import ConfigError, DataError, NonFiniteError, PeerLostError
from ibq.models.tokenizer import Tokenizer, load_tokenizer
from ibq.run_directory import RunDirectory, append_line, write_json
from ibq.training.interventions import Asked
from ibq.training.row import row_of, write_lost
from ibq.training.runtime import LogEvent, Runtime, StopRequested
from ibq.training.tokenizer import train_tokenizer
from ibq.training.transformer import train_transformer

UNFIT, UNWRITABLE, DISK_FULL, BUSY = 2, 73, 74, 75
"""Exit codes: the run cannot be trained as given, its folder cannot be written so that not even that is recorded,
nothing more can be written, or another process holds this run. 0 is finished or stopped, 1 any other recorded
failure."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_INT = -1, -3, 2**31 - 1
"""glibc's names of options, in bytes; their largest value."""

HEARTBEAT_S = 1.0
"""Least time between two signs of life."""


class Ended(NamedTuple):
    """End of an attempt: the event and the one-line reason that attempts.jsonl records, and a trainer's exit code."""

    event: str
    reason: str | None = None
    code: int = 0


def train(
    config: RunConfig,
    run: RunDirectory,
    runtime: Runtime,
    threads: int,
    tokenizer: RunDirectory | None = None,
    seen: Callable[[LogEvent], None] = lambda event: None,
    grace_s: float = 0.0,
) -> None:
    """Train one run to its row, a transformer's on the tokens of the finished run `tokenizer`; record the attempt and
    how it ended in attempts.jsonl.

    The claim on the run is a lock of the operating system, which dies with this process; this process dies with its
    parent, `grace_s` seconds after it, in which it may write a checkpoint. SIGTERM asks it to stop; nothing is shared
    with other trainers, so that killing one can block no other.
    """
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides what it means
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    exit_with_parent(stop.set, grace_s)
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with FileLock(run.lock, timeout=2):  # another driver may have finished it while this process started
            raise SystemExit(0 if run.finished else attempt(run, config, runtime, stop.is_set, seen, tokenizer).code)
    except Timeout:
        raise SystemExit(BUSY) from None
    except OSError as error:  # even the attempt could not be noted
        raise SystemExit(DISK_FULL if is_disk_full(error) else UNWRITABLE) from None


def attempt(
    run: RunDirectory,
    config: RunConfig,
    runtime: Runtime,
    should_stop: Callable[[], bool],
    seen: Callable[[LogEvent], None] = lambda event: None,
    tokenizer: Tokenizer | RunDirectory | None = None,
    intervene: Asked | None = None,
) -> Ended:
    """Train a run whose lock is held; of the processes that train it together, the first one records the attempt and
    how it ended in attempts.jsonl.

    Args:
        run: its directory.
        config: what to train.
        runtime: device and cadences.
        should_stop: asked before every step; once true, the run ends resumably.
        seen: receives every log event.
        tokenizer: that of a transformer's run, or the finished run that it is of.
        intervene: of a tokenizer's run: asked before every step what to change, as `train_tokenizer` says.
    """
    started, records = time.time(), is_writer()
    if records:
        where = {"pid": os.getpid(), "host": socket.gethostname(), "threads": torch.get_num_threads()}
        append_line(run.attempts, {"event": "started", "time": started} | where | {"runtime": asdict(runtime)})
        should_stop = _beating(run, should_stop)
    try:
        with peers():
            for logged in trained(config, tokenizer, run, runtime, should_stop, intervene):
                seen(logged)
        ended = Ended("finished")
    except Exception as error:  # the boundary of the process: whatever went wrong is recorded, and the other arms go on
        ended = classify(error)
        if records and ended.event == "error" and not isinstance(error, (ConfigError, DataError, OSError)):
            (run.path / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    if records:
        now = time.time()
        record = {"event": ended.event, "time": now, "seconds": now - started, "reason": ended.reason}
        append_line(run.attempts, record)
    return ended


def trained(
    config: RunConfig,
    tokenizer: Tokenizer | RunDirectory | None,
    run: RunDirectory,
    runtime: Runtime,
    should_stop: Callable[[], bool],
    intervene: Asked | None = None,
) -> Iterator[LogEvent]:
    """Events of the trainer that the config is for; a transformer's wants its tokenizer, or the finished run that
    it is of."""
    if isinstance(config, TrainConfig):
        return train_tokenizer(config, run.path, runtime, should_stop, intervene)
    if isinstance(tokenizer, RunDirectory):
        tokenizer = _tokenizer_of(tokenizer, config, run, runtime)
    assert tokenizer is not None
    return train_transformer(config, tokenizer, run.path, runtime, should_stop)


def _tokenizer_of(
    source: RunDirectory, config: TransformerTrainConfig, run: RunDirectory, runtime: Runtime
) -> Tokenizer:
    """Tokenizer of a finished run; its row is copied into the transformer's run.

    Raises:
        NonFiniteError: it did not stay finite, so that there is no tokenizer, and the transformer's row has been
            written, which says so.
        ConfigError: the run is not finished, or damaged.
    """
    if not source.finished:
        raise ConfigError(
            f"the tokenizer of run {run.path.name} is that of run {source.path.name}, which is not finished; train "
            f"that one first"
        )
    row = source.read_row()
    write_json(run.tokenizer_row, row)
    if row["status"] == "ok":
        return load_tokenizer(source.path)
    write_json(run.config, config.to_json_dict())
    facts = {"data_hash": data_hash_of(config.data), "train_seconds": 0.0}
    facts |= {"reason": f"its tokenizer, run {source.path.name}, did not stay finite: {row['reason']}"}
    raise write_lost(run, row_of(config, "nan", facts, {}, resolve_device(runtime.device)))


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for its next allocations.

    glibc gives large blocks back at once; a training step on the CPU allocates the same ones again, and having them
    mapped anew costs 4 to 5% of its time. Other C libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, LARGEST_INT)


def classify(error: Exception) -> Ended:
    """End of an attempt that an exception stands for; running out of memory says what was asked."""
    text = " ".join(str(error).split())
    code = DISK_FULL if is_disk_full(error) else UNFIT if isinstance(error, (ConfigError, DataError)) else 1
    if isinstance(error, StopRequested):
        return Ended("stopped", str(error))
    if isinstance(error, NonFiniteError):
        return Ended("nan", str(error))
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        asked, remedy = text[:400] or "the system gave no size", "lower batch_size or the number of runs at a time"
        return Ended("oom", f"out of memory: {asked}; {remedy} (--slots)", code)
    if isinstance(error, PeerLostError):
        return Ended("lost", f"{text}; the same command goes on from the last checkpoint", code)
    if isinstance(error, (ConfigError, DataError)):
        return Ended("error", text, code)
    if isinstance(error, OSError) and error.errno is not None:
        return Ended("error", f"{os.strerror(error.errno)}: {error.filename or 'while writing the run'}", code)
    return Ended("error", f"{type(error).__name__}: {text}", code)


def note_killed(run: RunDirectory, code: int) -> None:
    """Record, on behalf of a trainer that could not, which signal ended it."""
    why = " (by hand, or by the system for lack of memory)" if -code == signal.SIGKILL else ""
    note(run, "killed", f"killed by {signal.Signals(-code).name}{why}")


def note(run: RunDirectory, event: str, reason: str) -> None:
    """Record how an attempt ended; a full disk must not keep whoever does it from stopping well."""
    with suppress(OSError):
        append_line(run.attempts, {"event": event, "time": time.time(), "reason": reason})


def is_disk_full(error: BaseException) -> bool:
    """True where no retry helps until space is made: the disk or a quota is full. safetensors reports it as text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC) in str(error)


def _beating(run: RunDirectory, should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """`should_stop`, asked before every step, doubling as the trainer's sign of life."""
    last = 0.0

    def asked() -> bool:
        nonlocal last
        if time.monotonic() - last > HEARTBEAT_S:
            last = time.monotonic()
            run.heartbeat.touch()
        return should_stop()

    return asked
