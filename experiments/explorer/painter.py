"""The painter as the notebook's kernel sees it: figures are asked for and come as PNGs, and nothing here waits.

`experiments.explorer.painting` is the process itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

from experiments.study import ROOT

TRIES = 2
"""How often a figure is asked for when the process dies over it."""


class Shown(NamedTuple):
    """A run to draw: its folder, and its place among those side by side."""

    folder: str
    slot: int


class Request(NamedTuple):
    name: str
    shown: tuple[Shown, ...]
    size: tuple[float, float]


class Painting(NamedTuple):
    """A drawn figure as a PNG, or why there is none; how far each run was in it, by place; and the seconds that it
    took."""

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
        self._request: Request | None = None
        self._tries, self._asked = 0, 0.0

    @property
    def busy(self) -> bool:
        """Whether a request is on its way."""
        return self._request is not None

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
        self._request, self._tries, self._asked = Request(name, tuple(shown), size), 0, time.monotonic()
        self._try()

    def poll(self) -> Painting | None:
        """The figure that was asked for, once it is there; a process that has died over it is started anew, and the
        second time that is the figure's problem."""
        try:
            if self._process is not None and self._connection.poll():
                painting: Painting = self._connection.recv()
                self._request = None
                return painting
        except (EOFError, OSError):
            self._lose()
        if self._process is not None or (request := self._request) is None:
            return None
        if self._tries < TRIES:
            self._try()
            return None
        self._request = None
        words = (
            f"the figure {request.name!r} could not be drawn: the process that draws has ended; it is tried again "
            f"when a run has more"
        )
        return Painting(request, b"", {}, words, time.monotonic() - self._asked)

    def close(self, timeout_s: float = 2.0) -> None:
        """End the process; the next request starts another."""
        process, self._request = self._process, None
        self._lose()
        if process is not None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)

    def _try(self) -> None:
        self._tries += 1
        try:
            self.warm()
            self._connection.send(self._request)
        except OSError:
            self._lose()

    def _lose(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.poll()
        self._process = None
