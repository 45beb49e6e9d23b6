"""Arms against each other: rate and distortion, main effects, searches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from experiments.ablations import Ablation, Axis
from experiments.analysis import metrics
from experiments.analysis.effects import RATE_AND_DISTORTION, effects
from experiments.report.figures.labels import Labels
from experiments.report.figures.points import Points
from experiments.report.figures.theme import BOTH, axis_label, method_colors, panel_grid
from experiments.report.tables import chosen_value, searches
from experiments.study import Study
from ibq.metrics import METRICS


def rate_distortion(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Every arm and seed: bits per token against L1; letters name the arms."""
    finished = rows[(rows["status"] == "ok") & rows["arm"].isin([arm.name for arm in ablation.arms])]
    if finished.empty:
        return None
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    points = Points(ablation, finished)
    limit = float(np.log2(finished["codebook_size"].astype(float).max()))
    for row in finished.to_dict("records"):
        beside = (-11, -3) if limit - row["bits"] < 0.3 else (5, 3)  # clear of the dashed line
        points.draw(axis, row["arm"], row["bits"], row["l1"], beside)
    axis.axvline(limit, color="0.3", ls="--", lw=1)
    of_largest = "log2 K" if finished["codebook_size"].nunique() == 1 else "log2 of the largest K"
    axis.set(
        xlabel=f"rate: {METRICS['bits'].axis} (dashed: {of_largest} = {limit:g})",
        ylabel=f"distortion: {METRICS['l1'].axis} on the test split, [-1, 1]",
    )
    figure.legend(handles=points.handles(), loc="outside right upper", frameon=False)
    return figure


def usage_against_dimension(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Every arm, means over seeds with a bar from the least to the largest: perplexity against d_99 of the codes in
    use. A line joins arms that differ in the factor of the filling alone."""
    finished = rows[(rows["status"] == "ok") & rows["arm"].isin([arm.name for arm in ablation.arms])]
    if not {"perplexity", "dimension99_used"} <= set(finished.columns):
        return None
    finished = finished.dropna(subset=["perplexity", "dimension99_used"])
    if finished.empty:
        return None
    seeds = {name: mine[["perplexity", "dimension99_used"]].astype(float) for name, mine in finished.groupby("arm")}
    means = {str(name): tuple(mine.mean()) for name, mine in seeds.items()}
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    axis.set_xscale("log")
    points = Points(ablation, finished)
    for name, mine in seeds.items():
        x, y = means[str(name)]
        color = points.style(str(name))["color"]
        axis.hlines(y, *mine["perplexity"].agg(["min", "max"]), color=color, lw=0.8)
        axis.vlines(x, *mine["dimension99_used"].agg(["min", "max"]), color=color, lw=0.8)
        axis.plot([x], [y], ls="", ms=5.8, zorder=3, **points.style(str(name)))
    for one, other in _refilled(ablation, list(means)):
        ends = zip(means[one], means[other], strict=True)
        axis.plot(*ends, color=points.style(one)["color"], lw=0.8, ls=":", zorder=2)
    axis.set_ylim(0, None)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.minorticks_off()
    labels = Labels(axis, 7.5)
    for name, (x, y) in means.items():
        labels.put(ablation.letter(name), x, y)
    axis.set(xlabel=f"{METRICS['perplexity'].axis} (log scale)", ylabel=METRICS["dimension99_used"].axis)
    figure.legend(handles=points.handles(), loc="outside right upper", frameon=False)
    return figure


def _refilled(ablation: Ablation, names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of arms that differ in the factor of the filling alone, in the order of its levels."""
    if not ablation.fill:
        return []
    sets: dict[tuple[str, ...], list[str]] = {}
    for arm in ablation.arms:
        if arm.name in names:
            others = tuple(level for factor, level in arm.levels.items() if factor != ablation.fill)
            sets.setdefault(others, []).append(arm.name)
    return [(one, other) for arms in sets.values() for one, other in pairwise(arms)]


SCALING = ("usage", "share", "dimension_used", "l1", "fid")
"""Metrics that a figure of scaling shows."""


def scaling(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Usage and quality against the size that an ablation varies: a point a seed, a line through the means, arms of one
    size left out.

    A size at which no run has a result is marked on the lower edge, in the colour of its line.
    """
    if ablation.axis is None or rows["status"].ne("ok").all():
        return None
    lines, colors = _by_size(ablation, ablation.axis, rows), method_colors(ablation)
    panels = [name for name in SCALING if metrics.measured(rows, name)]
    ticks = sorted({size for _, mine in lines for size in mine["size"]})
    figure, axes = panel_grid(len(panels), 2, 3.1)
    for axis, name in zip(axes, panels, strict=True):
        for method, mine in lines:
            known = mine[(mine["status"] == "ok") & metrics.values(mine, name).notna()]
            values = metrics.values(known, name)
            means = values.groupby(known["x"]).mean()
            axis.plot(means.index, means, color=colors[method], lw=1.3)
            axis.scatter(known["x"], values, color=colors[method], s=16, zorder=3)
            lost = mine[~mine["arm"].isin(mine[mine["status"] == "ok"]["arm"])]["x"]
            axis.scatter(
                lost,
                [0.03] * len(lost),
                color=colors[method],
                marker="x",
                transform=axis.get_xaxis_transform(),
                zorder=4,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axis.minorticks_off()
        axis.set(xlabel=ablation.axis.label, ylabel=METRICS[name].axis)
        if METRICS[name].unit == "%":
            axis.set_ylim(-3, 103)
    handles = [
        Line2D([], [], color=colors[method], marker="o", ms=4, label=method)
        for method in dict.fromkeys(m for m, _ in lines)
    ]
    if any(mine["status"].ne("ok").any() for _, mine in lines):
        handles.append(Line2D([], [], ls="", marker="x", color="0.4", label="no result"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _by_size(ablation: Ablation, axis: Axis, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Method and rows of each set of arms that differ in size alone; x is the size, a little apart, so that no set
    hides another."""
    method = ablation.factors[0].name
    known = [(arms[0].levels[method], rows[rows["arm"].isin([arm.name for arm in arms])]) for arms in ablation.sizes()]
    known = [(method, mine) for method, mine in known if mine["arm"].nunique() > 1]
    apart = [1.04 ** (i - (len(known) - 1) / 2) for i in range(len(known))]
    sizes = [mine[axis.column].astype(int) for _, mine in known]
    return [
        (method, mine.assign(size=size, x=size * by))
        for (method, mine), size, by in zip(known, sizes, apart, strict=True)
    ]


def search(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Error of the search over the values tried, a line an arm in the colour of its method; a ring marks the choice."""
    lines = [(arm, mine[mine["status"] == "ok"], chosen_value(mine)) for arm, mine in searches(rows)]
    lines = [line for line in lines if not line[1].empty]
    if not lines:
        return None
    colors, method = method_colors(ablation), ablation.factors[0]
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    for arm, mine, chosen in lines:
        color = colors[ablation.arm(arm).levels[method.name]]
        values, losses = mine["search.value"].astype(float), mine["search.loss"].astype(float)
        axis.plot(values, losses, color=color, marker=".", lw=1)
        axis.annotate(
            ablation.letter(arm),
            (values.iloc[-1], losses.iloc[-1]),
            xytext=(5, -2),
            textcoords="offset points",
            fontsize=7,
        )
        axis.scatter(
            values[values == chosen], losses[values == chosen], s=60, facecolor="none", edgecolor=color, linewidth=1.2
        )
    axis.set(xscale="log", xlabel=ablation.adaptive.tuned, ylabel="reconstruction error on training batches")
    tried = sorted({value for _, mine, _ in lines for value in mine["search.value"]})
    axis.set_xticks(tried, [f"{value:g}" for value in tried])
    axis.minorticks_off()
    shown = {ablation.arm(arm).levels[method.name] for arm, _, _ in lines}
    handles = [Line2D([], [], color=colors[name], marker=".", label=name) for name in method.levels if name in shown]
    handles.append(Line2D([], [], ls="", marker="o", ms=8, mfc="none", color="0.4", label="chosen"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def main_effects(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Effect of each change of a factor on rate and distortion: a point a pair and seed, a bar at the mean over
    pairs."""
    table = effects(ablation, rows)
    if table.empty:
        return None
    changes, colors = list(dict.fromkeys(table["change"])), method_colors(ablation)
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.55 * len(changes) + 1.3), sharey=True)
    for axis, outcome in zip(axes, RATE_AND_DISTORTION, strict=True):
        axis.axvline(0, color="0.3", lw=1)
        for y, change in enumerate(changes):
            group = table[table["change"] == change]
            means = group.groupby("pair")[outcome].mean()
            axis.plot([means.mean()] * 2, [y - 0.36, y + 0.36], color="0.1", lw=2.5, solid_capstyle="butt", zorder=2)
            for i, (pair, points) in enumerate(group.groupby("pair", sort=False)):
                offset = (i - (len(means) - 1) / 2) * 0.2
                color = colors[points["surrounding"].iloc[0]]
                axis.scatter(points[outcome], [y + offset] * len(points), color=color, s=18, zorder=3)
                if outcome == "bits":
                    axis.annotate(
                        str(pair),
                        (points[outcome].max(), y + offset),
                        xytext=(5, 0),
                        textcoords="offset points",
                        fontsize=6.5,
                        va="center",
                        bbox={"fc": "white", "ec": "none", "pad": 0.6},
                    )
        axis.set(xlabel=axis_label(outcome, "x", change=True), yticks=range(len(changes)), yticklabels=changes)
        axis.margins(x=0.16)
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axes[0].invert_yaxis()
    handles = [
        Line2D([], [], ls="", marker="o", ms=5, color=colors[name], label=f"within {name}")
        for name in ablation.factors[0].levels
    ]
    handles.append(
        Line2D([], [], ls="", marker="o", ms=5, color=BOTH, label=f"between levels of {ablation.factors[0].name}")
    )
    handles.append(Line2D([], [], color="0.1", lw=2.5, label="mean over pairs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure
