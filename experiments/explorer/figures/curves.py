"""Curves over training steps: a line a run, marks where it was changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.explorer.figures.parts import REFERENCE, color, finite, mark_interventions, say
from experiments.explorer.view import View
from experiments.report.figures.theme import MARKERS

Curve = Callable[[View], pd.Series]
DECADE = 10
WAITING = "Nothing yet: the first log step is still to come."


class Panel(NamedTuple):
    """A plot: its title and unit, a run's curve, that of indifference (dashed, once for each K), a second one of the
    run (dashed), and what to say where no run has the curve."""

    title: str
    unit: str
    curve: Curve
    reference: Curve | None = None
    second: Curve | None = None
    absent: str = "Not in the history of this run."
    log: bool = False
    least: float | None = 0.0
    most: float | None = None


def column(name: str, factor: float = 1.0) -> Curve:
    """A column of the history; NaN where a run has none."""

    def curve(view: View) -> pd.Series:
        if name not in view.history:
            return pd.Series(math.nan, index=view.history.index)
        return view.history[name].astype(float) * factor

    return curve


def share_of_codes(name: str) -> Curve:
    """A column that counts codes, in per cent of K."""
    return lambda view: column(name, 100 / view.config.quantizer.codebook_size)(view)


def constant(value: Callable[[View], float]) -> Curve:
    return lambda view: pd.Series(value(view), index=view.history.index)


USAGE = Panel("Codes used", "% of K", column("usage", 100), column("uniform_usage", 100), most=104)
PERPLEXITY = Panel("Perplexity", "% of K", share_of_codes("perplexity"), share_of_codes("uniform_perplexity"), most=104)
REACH = Panel(
    "Effective gradient reach",
    "% of K",
    share_of_codes("reach_effective"),
    absent="No gradient reaches a codebook here: its codes are fixed, or set without one.",
)
GAP = Panel(
    "Gap",
    "distance / variance of z",
    column("gap"),
    absent="No gap is logged: features do not vary.",
    log=True,
)


def draw_overview(figure: Figure, views: Sequence[View]) -> None:
    error = Panel("Reconstruction error", "pixel term, mean", column("pixel_mean"))
    norms = Panel("Norms", "codes solid, features dashed", column("code_norm"), second=column("feature_norm"), log=True)
    _draw(figure, views, [USAGE, PERPLEXITY, error, GAP, REACH, norms])


def draw_geometry(figure: Figure, views: Sequence[View]) -> None:
    unit = "distance / variance of z"
    _draw(
        figure,
        views,
        [
            Panel("Norm of codes", "mean over all codes", column("code_norm"), log=True),
            Panel("Norm of features", "mean over tokens", column("feature_norm"), log=True),
            Panel("Quantization error", "error / variance of z", column("quantization_error"), log=True),
            GAP,
            Panel("Gap, codes in use", unit, column("gap_used"), absent="No gap of codes in use is logged.", log=True),
            Panel(
                "Gap, codes not in use",
                unit,
                column("gap_dead"),
                absent="No gap of dead codes: all are in use, or none was logged.",
                log=True,
            ),
        ],
    )


def draw_assignment(figure: Figure, views: Sequence[View]) -> None:
    entropy_off = "No pull: the entropy penalty is off."
    _draw(
        figure,
        views,
        [
            Panel("Spread of logits", "std over codes", column("logit_spread"), log=True),
            Panel(
                "Largest probability",
                "softmax at T = 1 (dashed: 1/K)",
                column("max_probability"),
                constant(lambda view: 1 / view.config.quantizer.codebook_size),
                most=1.04,
            ),
            Panel(
                "Assignment entropy",
                "nats (dashed: log K)",
                column("assignment_entropy"),
                constant(lambda view: math.log(view.config.quantizer.codebook_size)),
                absent="No assignment entropy is logged.",
            ),
            REACH,
            Panel(
                "Gradient above Adam's eps", "% of codes", column("reach_above_eps", 100), absent=REACH.absent, most=104
            ),
            Panel(
                "Pull of the entropy term",
                "gradient / all other terms'",
                column("entropy_pull"),
                absent=entropy_off,
                log=True,
            ),
        ],
    )


def draw_losses(figure: Figure, views: Sequence[View]) -> None:
    names = list(
        dict.fromkeys(
            name for view in views for name in view.history if name.startswith("loss_") and name != "loss_mean"
        )
    )
    terms = [
        Panel(
            name.removeprefix("loss_").replace("_", " ").capitalize(),
            _unit(name),
            column(name),
            second=_weighted(name),
            least=None,
        )
        for name in names
    ]
    total = Panel("Total", "sum of weighted terms", column("loss"), least=None)
    gradient = Panel("Gradient", "norm, all parameters", column("gradient_norm"))
    rate = Panel("Learning rate", "of the update", column("lr"))
    _draw(figure, views, [total, *terms, gradient, rate][:12])


def _unit(name: str) -> str:
    return "nats" if name.endswith("entropy") else "mean"


def _weighted(name: str) -> Curve:
    """The weighted term where it differs from the raw one."""
    raw, weighted = column(name), column(name.replace("loss_", "weighted_", 1))
    return lambda view: weighted(view).where((weighted(view) - raw(view)).abs() > 1e-9)


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
    shown = [view for view in views if finite(panel.curve(view))]
    if not shown:
        say(axis, panel.absent if any(len(view.history) for view in views) else WAITING)
        return
    for view in shown:
        steps = view.history["step"]
        end = [len(steps) - 1]
        axis.plot(steps, panel.curve(view), color=color(view), lw=1.6, marker=MARKERS[view.slot], ms=4.5, markevery=end)
        if panel.second:
            axis.plot(steps, panel.second(view), color=color(view), lw=1.2, ls=(0, (4, 2)))
    if panel.reference:
        for view in {view.config.quantizer.codebook_size: view for view in shown}.values():
            axis.plot(view.history["step"], panel.reference(view), color=REFERENCE, lw=1, ls="--", zorder=1.5)
    axis.set_xlim(0, max(1.0, 1.03 * max(view.step for view in views)))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_ylabel(panel.unit)
    if panel.log and _spans_a_decade(axis):
        axis.set_yscale("log")
    elif panel.least is not None:
        axis.set_ylim(panel.least, panel.most)
    mark_interventions(axis, views)


def _spans_a_decade(axis: Axes) -> bool:
    """Whether a logarithmic axis can show all lines, and shows more than a linear one."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    values = values[np.isfinite(values)]
    return bool(values.min() > 0 and values.max() > DECADE * values.min())
