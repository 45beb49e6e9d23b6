"""The process that draws, so that the notebook's kernel never waits for matplotlib.

`python -m experiments.explorer.painting FD` is started by `experiments.explorer.painter`, which it talks to over the
connection FD, and ends with it. Requests name a figure and the folders of runs; this process reads those folders
itself, and of several requests that wait it draws the newest alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection

import torch

from experiments.explorer.figures import draw
from experiments.explorer.painter import Painting, Request
from experiments.explorer.view import read_view
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory

DOTS_PER_INCH = 130
NICENESS = 5
"""Drawing waits for the interface."""


def paint(request: Request) -> tuple[bytes, dict[int, int]]:
    """The PNG of a request, from the folders it names, and the newest step of each place; a run that has been removed
    is left out."""
    views = []
    for folder, slot in request.shown:
        with suppress(ConfigError):
            views.append(read_view(RunDirectory(folder), slot))
    picture = BytesIO()
    draw(request.name, views, request.size).savefig(picture, format="png", dpi=DOTS_PER_INCH)
    return picture.getvalue(), {view.slot: view.step for view in views}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupting a cell ends no painter
    os.nice(NICENESS)
    torch.set_num_threads(1)
    owner = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):
        paint(Request("overview", (), (2.0, 2.0)))  # loads fonts and libraries
        while True:
            request = owner.recv()
            while owner.poll():
                request = owner.recv()
            started = time.perf_counter()
            try:
                (png, steps), problem = paint(request), ""
            except (
                Exception
            ) as error:  # one figure that fails must not end the others; it is said where the figure would be
                png, steps, problem = (
                    b"",
                    {},
                    f"the figure {request.name!r} could not be drawn: {type(error).__name__}: {error}",
                )
            owner.send(Painting(request, png, steps, problem, time.perf_counter() - started))
    os._exit(0)


if __name__ == "__main__":
    main()
