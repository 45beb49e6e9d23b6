"""Curves over training steps: a line a run, marks where it was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.explorer.figures.parts import REFERENCE, color, mark_interventions, say
from experiments.explorer.view import View
from experiments.report.figures import panels
from experiments.report.figures.panels import Curve, Panel
from experiments.report.figures.theme import MARKERS

DECADE = 10
WAITING = "Nothing yet: the first log step is still to come."
DIMENSION = panels.DIMENSION_USED._replace(label="codes solid, features dashed", second=panels.DIMENSION_FEATURES.curve)
NORMS = panels.CODE_NORM._replace(title="Norms", label="codes solid, features dashed", second=panels.FEATURE_NORM.curve)


def draw_overview(figure: Figure, views: Sequence[View]) -> None:
    codes = [panels.USAGE, panels.PERPLEXITY, DIMENSION, panels.DIMENSION99_USED]
    _draw(figure, views, [*codes, panels.PIXEL_ERROR, panels.GAP, panels.REACH, NORMS])


def draw_geometry(figure: Figure, views: Sequence[View]) -> None:
    all_codes = panels.DIMENSION_CODES._replace(label=DIMENSION.label, second=panels.DIMENSION_FEATURES.curve)
    _draw(figure, views, [NORMS, all_codes, panels.QUANTIZATION_ERROR, panels.GAP, panels.GAP_USED, panels.GAP_DEAD])


def draw_assignment(figure: Figure, views: Sequence[View]) -> None:
    softmax = [panels.LOGIT_SPREAD, panels.MAX_PROBABILITY, panels.ASSIGNMENT_ENTROPY]
    _draw(figure, views, [*softmax, panels.REACH, panels.ABOVE_EPS, panels.ENTROPY_PULL])


def draw_losses(figure: Figure, views: Sequence[View]) -> None:
    logged = dict.fromkeys(name for view in views for line in view.history for name in line)
    terms = [panels.loss_term(name) for name in logged if name.startswith("loss_") and name != "loss_mean"]
    _draw(figure, views, [panels.LOSS, *terms, panels.GRADIENT_NORM, panels.LEARNING_RATE][:12])


def _draw(figure: Figure, views: Sequence[View], panels: Sequence[Panel]) -> None:
    columns = 3 if len(panels) <= 6 else 4
    rows = -(-len(panels) // columns)
    for i, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        _draw_panel(axis, views, panel)
        axis.set_title(panel.title, loc="left", fontweight="bold")
        if i + columns >= len(panels) and axis.lines:
            axis.set_xlabel("training step")


def _draw_panel(axis: Axes, views: Sequence[View], panel: Panel) -> None:
    curves = {view: _values(view, panel.curve) for view in views}
    shown = [view for view, values in curves.items() if any(map(math.isfinite, values))]
    if not shown:
        say(axis, panel.absent if any(view.history for view in views) else WAITING)
        return
    for view in shown:
        end = [len(view.steps) - 1]
        axis.plot(view.steps, curves[view], color=color(view), lw=1.6, marker=MARKERS[view.slot], ms=4.5, markevery=end)
        if panel.second:
            axis.plot(view.steps, _values(view, panel.second), color=color(view), lw=1.2, ls=(0, (4, 2)))
    if panel.reference:
        for view in {view.codebook_size: view for view in shown}.values():
            axis.plot(view.steps, _values(view, panel.reference), color=REFERENCE, lw=1, ls="--", zorder=1.5)
    axis.set_xlim(0, max(1.0, 1.03 * max(view.step for view in views)))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_ylabel(panel.label)
    if panel.log and _spans_a_decade(axis):
        axis.set_yscale("log")
    elif panel.least is not None:
        axis.set_ylim(panel.least, panel.most)
    mark_interventions(axis, views)


def _values(view: View, curve: Curve) -> list[float]:
    return [curve(line, view.codebook_size) for line in view.history]


def _spans_a_decade(axis: Axes) -> bool:
    """True where a logarithmic axis can show all lines, and shows more than a linear one."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    values = values[np.isfinite(values)]
    return bool(values.min() > 0 and values.max() > DECADE * values.min())
