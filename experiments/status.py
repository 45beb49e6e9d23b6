"""Status of a run, read from its directory alone: state, step, time left, and why it has no result."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experiments.analysis import diagnoses
from ibq.run_directory import RunDirectory

State = Literal["ok", "nan", "running", "interrupted", "oom", "failed", "stopped", "pending"]
SPEED_LINES = 20
"""Lines of the log over which the speed of a run is taken."""
ALIVE_S = 60.0
"""Age of a sign of life up to which a trainer counts as alive where its lock cannot be asked."""


@dataclass(frozen=True)
class Status:
    """Snapshot of a run.

    Attributes:
        state: "ok" or "nan" with a row; "running" while a process holds its lock; "interrupted" where a trainer died
            without a word; "oom" or "failed", of which `reason` says why; "stopped" resumably; "pending" before the
            first attempt.
        reason: why a row gives no result, or why the last attempt ended without a row; empty where there was none or
            it is still going on.
        recent: the newest lines of history.jsonl, oldest first.
    """

    state: State
    reason: str
    recent: tuple[dict[str, Any], ...]

    @property
    def step(self) -> int:
        """The newest logged step, 0 before the first."""
        return int(self.recent[-1]["step"]) if self.recent else 0

    @property
    def last(self) -> dict[str, Any]:
        """The newest line of the log, {} before the first."""
        return self.recent[-1] if self.recent else {}

    def seconds_left(self, steps: int) -> float | None:
        """Seconds to the end of a run of `steps`, at the speed of the recent lines; None where it is not known."""
        return seconds_left(self.recent, steps)


def of(run: RunDirectory) -> Status:
    """The status of a run.

    Raises:
        ConfigError: row.json is damaged.
    """
    recent = tuple(run.read_recent(SPEED_LINES))
    if run.finished:
        row = run.read_row()
        return Status(row["status"], row.get("reason") or "", recent)
    attempts = [attempt for attempt in run.read_attempts() if attempt["event"] != "damaged"]
    event = attempts[-1]["event"] if attempts else ""
    reason = "" if event in ("", "started", "finished") else attempts[-1].get("reason") or event
    return Status(_state(run, event), reason, recent)


def _state(run: RunDirectory, event: str) -> State:
    if is_held(run):
        return "running"
    ended: dict[str, State] = {"started": "interrupted", "oom": "oom", "stopped": "stopped"}
    ended |= dict.fromkeys(("error", "killed", "lost", "timeout"), "failed")
    return ended.get(event, "pending")


def is_held(run: RunDirectory) -> bool:
    """True while a process trains the run: its claim is a lock of the operating system, which dies with it.

    The lock is only asked, on a descriptor that reads, so that runs of others can be looked at without leave to write.
    Where it cannot be asked at all, the last sign of life decides.
    """
    try:
        descriptor = os.open(run.lock, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return _shows_life(run)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # of another user on a file system without locks
        return _shows_life(run)
    finally:
        os.close(descriptor)


def _shows_life(run: RunDirectory) -> bool:
    try:
        return time.time() - run.heartbeat.stat().st_mtime < ALIVE_S
    except OSError:
        return False


def share_done(run: RunDirectory, steps: int) -> float:
    """Share of a run's steps that are done, 1 with a row."""
    if run.finished:
        return 1.0
    recent = run.read_recent(1)
    return recent[-1]["step"] / steps if recent else 0.0


def seconds_left(recent: Sequence[dict[str, Any]], steps: int) -> float | None:
    """Seconds from the last of some lines of a log to step `steps`, at the speed between the first and the last."""
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    per_step = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
    return float(per_step * (steps - recent[-1]["step"]))


def time_left(seconds: float | None) -> str:
    """Seconds as a phrase in the unit that suits them."""
    if seconds is None:
        return "time left not known yet"
    if seconds > 2 * 3600:
        return f"about {seconds / 3600:.1f} h left"
    return f"about {seconds / 60:.1f} min left" if seconds > 45 else f"about {seconds:.0f} s left"


def result_of(row: dict[str, Any]) -> str:
    """Result of a finished run in a phrase, or why it has none, and the diagnosis of its history, if there is one."""
    if row["status"] != "ok":
        return f"{row['reason']}{diagnoses.phrase(row)}"
    if "bits_per_image" in row:
        result = f"bits/image {row['bits_per_image']:.0f}, of uniform tokens {row['uniform_bits_per_image']:.0f}"
        if "fid[fashion-cnn]" in row:
            result += f", FID[fashion-cnn] {row['fid[fashion-cnn]']:.3g} at guidance {row['guidance']:g}"
    else:
        result = f"perplexity {row['perplexity']:.0f} of {row['codebook_size']}, " if "perplexity" in row else ""
        if "dimension_used" in row:
            result += f"{row['dimension_used']:.1f} of {row['code_dim']} dimensions, "
        result += f"L1 {row['l1']:.4f}"
    return f"{result}, {row['train_seconds']:.0f} s{diagnoses.phrase(row)}"
