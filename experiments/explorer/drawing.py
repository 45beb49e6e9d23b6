"""Figures of runs as PNGs, drawn from the runs' directories; called in a process of its own
(`experiments.explorer.background`)."""

from __future__ import annotations

import time
from contextlib import suppress
from io import BytesIO
from typing import NamedTuple

from experiments.explorer.view import read_view
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory

DOTS_PER_INCH = 130


class Shown(NamedTuple):
    """A run to draw: its folder, and its place among those side by side."""

    folder: str
    slot: int


class Seen(NamedTuple):
    """A run as a figure shows it: its newest step, and the diagnosis in sentences."""

    step: int
    findings: list[str]


class Drawn(NamedTuple):
    """A figure as a PNG, or the sentence why there is none; the runs in it by folder; the seconds that it took."""

    name: str
    png: bytes
    seen: dict[str, Seen]
    problem: str
    seconds: float


def draw_png(name: str, shown: tuple[Shown, ...], size: tuple[float, float]) -> Drawn:
    """One figure of `experiments.explorer.tabs.TABS`.

    Args:
        name: of the figure.
        shown: its runs; one that has been removed meanwhile is left out.
        size: width and height in inches.
    """
    from experiments.explorer.figures import draw  # here, since the interface's kernel does without matplotlib

    started, views = time.perf_counter(), {}
    for folder, slot in shown:
        with suppress(ConfigError):
            views[folder] = read_view(RunDirectory(folder), slot)
    picture, problem = BytesIO(), ""
    try:
        draw(name, list(views.values()), size).savefig(picture, format="png", dpi=DOTS_PER_INCH)
    except Exception as error:  # one figure that fails must not end the others; it is said where it would be
        problem = f"the figure {name!r} could not be drawn: {type(error).__name__}: {error}"
    seen = {folder: Seen(view.step, [each.sentence for each in view.findings]) for folder, view in views.items()}
    return Drawn(name, b"" if problem else picture.getvalue(), seen, problem, time.perf_counter() - started)
