"""The process that trains one run. Imported once by the server that forks these, so that an arm starts with torch already loaded."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
import traceback
from multiprocessing.synchronize import Event
from typing import Any

import torch
from filelock import FileLock, Timeout

from ibq.config import parse_train_config
from ibq.run_directory import RunDirectory, append_line
from ibq.train_tokenizer import NonFiniteError, Runtime, StopRequested, train_tokenizer

BUSY = 75
"""Exit code: another process holds this run."""


def train(config: dict[str, Any], folder: str, runtime: Runtime, threads: int, stop: Event) -> None:
    """Train one run to its row; record the attempt and how it ended in attempts.jsonl.

    The claim on the run is a lock of the operating system, which dies with this process; this process dies with its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides what it means
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    run = RunDirectory(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run.lock, timeout=2):
            raise SystemExit(_attempt(run, config, runtime, stop))
    except Timeout:
        raise SystemExit(BUSY) from None


def _attempt(run: RunDirectory, config: dict[str, Any], runtime: Runtime, stop: Event) -> int:
    started = time.time()
    append_line(run.attempts, {"event": "started", "time": started, "pid": os.getpid(), "host": socket.gethostname()})
    code, reason = 0, None
    try:
        for _ in train_tokenizer(parse_train_config(config), run.path, runtime, stop.is_set):
            pass
        event = "finished"
    except StopRequested as stopped:
        event, reason = "stopped", str(stopped)
    except NonFiniteError as error:
        event, reason = "nan", str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        event, reason, code = "oom", " ".join(str(error).split())[:500] or "out of memory", 1
    except Exception as error:  # the boundary of the process: whatever went wrong is recorded, and the other arms go on
        event, reason, code = "error", f"{type(error).__name__}: {' '.join(str(error).split())}", 1
        (run.path / "traceback.txt").write_text(traceback.format_exc())
    append_line(run.attempts, {"event": event, "time": time.time(), "seconds": time.time() - started, "reason": reason})
    return code


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
