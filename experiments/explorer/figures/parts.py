"""Parts of the explorer's figures: colours and markers of runs, marks of interventions, words in place of data."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from experiments.explorer.colors import RUN_HEX
from experiments.explorer.view import View, in_words
from experiments.report.figures.theme import MARKERS

REFERENCE = "0.2"
MOST_CHANGES = 4
LETTERS_AN_INCH = 15.5
"""Of small text."""


def color(view: View) -> str:
    return RUN_HEX[view.slot]


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure that no window or notebook knows of, so that nothing keeps it."""
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.02, hspace=0.03))
    FigureCanvasAgg(figure)
    return figure


def say(axis: Axes, words: str) -> None:
    """Words in the middle of an empty panel."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_color("0.85")
    text = "\n".join(textwrap.wrap(words, 34))
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="0.35", fontsize=8.5)


def legend(figure: Figure, views: Sequence[View], interventions: bool) -> None:
    """Runs above all panels; below them what was changed and when, if the figure marks it."""
    handles = [
        Line2D([], [], color=color(view), marker=MARKERS[view.slot], ms=5, lw=1.6, label=view.label) for view in views
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(views), 2 if len(views) == 4 else 3),
        frameon=False,
        fontsize=8.5,
    )
    changes = [
        f"{view.letter} {number}: {in_words(each)} from step {each.step}"
        for view in views
        for number, each in enumerate(view.interventions, 1)
    ]
    if interventions and changes:
        earlier = [f"{len(changes) - MOST_CHANGES} earlier"] if len(changes) > MOST_CHANGES else []
        words = "Changed while training.  " + "   ".join(earlier + changes[-MOST_CHANGES:])
        lines = textwrap.wrap(words, int(LETTERS_AN_INCH * figure.get_figwidth()))
        figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left", color="0.25")


def mark_interventions(axis: Axes, views: Sequence[View]) -> None:
    """A dotted line in the run's colour at every change, and its number at the top."""
    for view in views:
        for number, each in enumerate(view.interventions, 1):
            axis.axvline(each.step, color=color(view), lw=1.1, ls=":", zorder=1)
            axis.annotate(
                f"{view.letter}{number}",
                (each.step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2),
                textcoords="offset points",
                va="top",
                fontsize=7,
                color=color(view),
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
