"""The painter as the notebook's kernel sees it: figures are asked for and come as PNGs, and nothing here waits.

`experiments.explorer.painting` is the process itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

from experiments.study import ROOT


class Shown(NamedTuple):
    """A run to draw: its folder, and its place among those side by side."""

    folder: str
    slot: int


class Request(NamedTuple):
    name: str
    shown: tuple[Shown, ...]
    size: tuple[float, float]


class Painting(NamedTuple):
    """A drawn figure as a PNG, or why there is none; how far each run was in it, by place; and the seconds that it took."""

    request: Request
    png: bytes
    steps: dict[int, int]
    problem: str
    seconds: float


class Painter:
    """The kernel's side: one process, started when it is first wanted; nothing here waits."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self.busy = False
        """Whether a request is on its way."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def warm(self) -> None:
        """Begin to load what drawing needs, where that has not been done."""
        if self._process is not None:
            return
        self._connection, theirs = Pipe()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.explorer.painting", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": path, "MPLBACKEND": "agg"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def request(self, name: str, shown: Sequence[Shown], size: tuple[float, float]) -> None:
        """Ask for a figure; `poll` brings it."""
        self.warm()
        try:
            self._connection.send(Request(name, tuple(shown), size))
            self.busy = True
        except OSError:
            self._lose()

    def poll(self) -> Painting | None:
        """The figure that was asked for, once it is there; a painter that has died is let go, and started anew by the next request."""
        if self._process is None:
            return None
        try:
            if not self._connection.poll():
                return None
            painting: Painting = self._connection.recv()
        except (EOFError, OSError):
            self._lose()
            return None
        self.busy = False
        return painting

    def close(self, timeout_s: float = 2.0) -> None:
        """End the process; the next request starts another."""
        process = self._process
        self._lose()
        if process is not None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)

    def _lose(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.poll()
        self._process, self.busy = None, False
