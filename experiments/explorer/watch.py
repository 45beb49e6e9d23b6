"""Watch of the kernel on a run's folder, twice a second: what has changed, and new lines of its history; no
tensors."""

from __future__ import annotations

import json
import os
from typing import Any

from experiments.explorer.live_umap import LIVE_UMAP
from experiments.explorer.trainer import LIVE
from ibq.run_directory import RunDirectory

PACE_LINES = 20
"""Lines over which the pace is taken."""


class Watch:
    """The history of one run, read as it grows, each line once.

    Args:
        run: its directory, which may be absent.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.records: list[dict[str, Any]] = []
        self._inode, self._offset = -1, 0

    def signature(self) -> tuple[tuple[int, int], ...]:
        """Signature that changes whenever a figure of this run would."""
        run = self.run
        return tuple(
            map(_stamp, (run.history, run.path / LIVE, run.interventions, run.path / LIVE_UMAP, run.evaluation))
        )

    def refresh(self) -> bool:
        """Read what has been written since the last time; whether that was anything. A history that is shorter than it
        was, or another file, is read anew: the run was begun again, or went on from a checkpoint."""
        try:
            with open(self.run.history, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self.records, self._inode, self._offset = [], status.st_ino, 0
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            changed = bool(self.records)
            self.records, self._inode, self._offset = [], -1, 0
            return changed
        self._offset += len(whole) + len(newline)
        self.records += [record for line in whole.splitlines() if (record := _parsed(line))]
        return bool(newline)

    @property
    def last(self) -> dict[str, Any]:
        return self.records[-1] if self.records else {}

    def seconds_left(self, steps: int) -> float | None:
        """At the pace of the last lines; None while there is none."""
        recent = self.records[-PACE_LINES:]
        if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
            return None
        pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
        return float(pace * (steps - recent[-1]["step"]))


def _stamp(path: os.PathLike[str]) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) and "seconds" in record else None
