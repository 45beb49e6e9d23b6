"""The map of collapse: heat maps over rate and D with the border, lines along the other axes, and how decisive
assignments are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.ablations import Ablation, Arm
from experiments.ablations.collapse_atlas.bisection import COLLAPSE
from experiments.ablations.collapse_atlas.collapse_map import (
    PAPER_DIMENSION,
    PAPER_RATE,
    known_state,
    left_out,
    lines,
    on_map,
    paper_in_words,
    rates_of,
)
from experiments.ablations.collapse_atlas.remedies import TRIED
from experiments.cells import Cell
from experiments.report.figures.heat_map import colormap, draw_cell, draw_hatched, scale, values_of
from experiments.report.figures.labels import Labels
from experiments.report.figures.theme import COLORS, MARKERS, method_colors
from experiments.study import Study
from ibq.metrics import METRICS

OUTCOMES = ("share", "usage", "l1", "fid")
FACTS = ("arm", "seed", "status", "codebook_size", "config.optim.lr", "factor.rate", "factor.K")
DRAWN = (*FACTS, "perplexity_share", "usage", "l1", "fid[fashion-cnn]")
"""The columns that the map goes by."""
BORDER = {"color": COLORS[3], "lw": 2.4, "solid_capstyle": "butt", "zorder": 4}
EDGE = [patheffects.withStroke(linewidth=4.4, foreground="white")]
"""Around the border, so that it stands out from dark cells and from light ones."""


def collapse_map(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A row of maps for every method that has a finished cell, a column an outcome with one scale."""
    rows = rows[[name for name in rows if name in DRAWN]]  # the others would only be copied with every cell
    maps = {method: on_map(ablation, method) for method in ablation.factors[0].levels}
    finished = set(rows[rows["status"] == "ok"]["arm"])
    drawn = {method: arms for method, arms in maps.items() if finished & {arm.name for arm in arms.values()}}
    if not drawn:
        return None
    rates, dimensions = ablation.factor("rate").levels, ablation.factor("D").levels
    lr = rates_of(ablation, rows)
    absent = left_out(ablation, rows)
    states = {
        arm.name: known_state(ablation, rows, arm.name, absent) for arms in drawn.values() for arm in arms.values()
    }
    by_arm = {str(name): mine for name, mine in rows.groupby("arm")}
    of_maps = rows[rows["arm"].isin([arm.name for arms in drawn.values() for arm in arms.values()])]
    outcomes = [outcome for outcome in OUTCOMES if len(values_of(of_maps, outcome))]
    size = (2.3 * len(outcomes) + 0.9, 1.1 * len(drawn) + 1.9)
    figure, axes = plt.subplots(len(drawn), len(outcomes), figsize=size, squeeze=False, sharex=True, sharey=True)
    for column, outcome in enumerate(outcomes):
        colors = _colors(of_maps, outcome)
        for axis, arms in zip(axes[:, column], drawn.values(), strict=True):
            axis.grid(False)
            axis.set(xlim=(-0.5, len(dimensions) - 0.5), ylim=(-0.5, len(rates) - 0.5))
            places = {arm.name: (dimensions.index(D), rates.index(rate)) for (rate, D), arm in arms.items()}
            for name, (x, y) in places.items():
                if name not in absent:
                    draw_cell(axis, x, y, outcome, by_arm[name], colors)
                elif absent[name]:
                    draw_hatched(axis, x, y)
            _border(axis, {place: states[name] for name, place in places.items()})
            if PAPER_DIMENSION in dimensions:
                _paper(axis, dimensions.index(PAPER_DIMENSION), [lr[rate] for rate in rates])
        bar = figure.colorbar(colors, ax=list(axes[:, column]), location="top", aspect=24, pad=0.01)
        bar.set_label(METRICS[outcome].axis, fontsize=9)
        bar.ax.tick_params(labelsize=7)
        if outcome == "fid":
            ticks = [
                float(f"{tick:.2g}") for tick in np.geomspace(colors.norm.vmin or 1, colors.norm.vmax or 1, 6)[1:-1]
            ]
            bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            bar.ax.minorticks_off()
    for axis, method in zip(axes[:, 0], drawn, strict=True):
        axis.set_title(
            " ", fontsize=8
        )  # takes the height; the words may reach over the next column, which a title must not
        words = axis.annotate(
            method, (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=8.5
        )
        words.set_in_layout(False)
        axis.set_yticks(range(len(rates)), [f"{lr[rate]:g}" for rate in rates], fontsize=7.5)
    for axis in axes[-1]:
        axis.set_xticks(range(len(dimensions)), list(dimensions), fontsize=7.5)
        axis.set_xlabel("code dimension D", fontsize=8)
    figure.supylabel("learning rate", fontsize=9)
    figure.legend(handles=_legend(ablation, rows, lr), loc="outside lower center", ncols=2, frameon=False, fontsize=7.5)
    return figure


def collapse_axes(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A panel an axis, usage above and error below: lines of arms that differ in that factor alone."""
    cells = {cell.arm.name: cell for cell in study.cells if cell.ablation is ablation and cell.seed == 0}
    axes_shown = (
        ("K", "codes K", lambda cell: cell.config.quantizer.codebook_size),
        ("tokens a mean", "tokens a mean assignment", _tokens_a_mean),
        ("initial length", "length of initial codes", _initial_length),
    )
    finished = rows[rows["status"] == "ok"]
    found = {
        factor: [line for line in lines(ablation, factor) if _points(line.arms, finished) > 1]
        for factor, *_ in axes_shown
    }
    if not any(found.values()):
        return None
    figure, axes = plt.subplots(
        2, len(axes_shown), figsize=(3.1 * len(axes_shown) + 0.6, 5.6), squeeze=False, sharex="col", sharey="row"
    )
    labels: dict[str, Any] = {}
    for column, (factor, label, size) in enumerate(axes_shown):
        shown: set[float] = set()
        for line in found[factor]:
            known = [arm for arm in line.arms if arm.name in set(finished["arm"])]
            name = _line_name(known[0].levels, factor)
            style = labels.setdefault(
                name, {"color": COLORS[len(labels) % len(COLORS)], "marker": MARKERS[len(labels) % len(MARKERS)]}
            )
            xs = [size(cells[arm.name]) for arm in known]
            shown.update(round(x, 6) for x in xs)
            for axis, outcome in zip(axes[:, column], ("share", "l1"), strict=True):
                axis.plot(
                    xs,
                    [values_of(rows[rows["arm"] == arm.name], outcome).mean() for arm in known],
                    lw=1.2,
                    ms=5,
                    **style,
                )
        axes[1, column].set(xlabel=label, xscale="log")
        axes[1, column].set_xticks(
            sorted(shown), [f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in sorted(shown)], fontsize=7.5
        )
        axes[1, column].minorticks_off()
        axes[0, column].axhline(100 * COLLAPSE, color="0.2", ls="--", lw=1)
    axes[0, 0].set(ylabel=METRICS["share"].axis, ylim=(-3, 103))
    axes[1, 0].set_ylabel(METRICS["l1"].axis)
    handles = [Line2D([], [], lw=1.2, ms=5, label=name, **style) for name, style in labels.items()]
    handles.append(Line2D([], [], color="0.2", ls="--", lw=1, label="below it a codebook has collapsed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=7.5)
    return figure


def saturation(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Perplexity over K against how decisive assignments were, first and last; the arms of remedies by their
    letters."""
    done = rows[rows["status"] == "ok"]
    if done.empty or "first.max_probability" not in done:
        return None
    done = done[done["first.max_probability"].notna()]
    dot_products = [
        method
        for method in ablation.factors[0].levels
        if (done["factor.method"].eq(method) & done["method"].eq("ibq")).any()
    ]
    if not dot_products:
        return None
    colors, dimensions = method_colors(ablation), ablation.factor("D").levels
    named = [remedy.arm for remedy in TRIED]
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 4.0), sharey=True)
    panels = (
        ("first.logit_spread", "logit spread, first logged"),
        ("first.max_probability", "largest probability, first logged"),
        ("last.max_probability", "largest probability, last logged"),
    )
    mine = done[done["factor.method"].isin(dot_products)]
    for axis, (column, label) in zip(axes, panels, strict=True):
        for _, row in mine.iterrows():
            marker = MARKERS[dimensions.index(row["factor.D"])]
            axis.plot(
                row[column],
                100 * row["perplexity_share"],
                ls="",
                marker=marker,
                ms=5.5,
                color=colors[row["factor.method"]],
            )
        axis.axhline(100 * COLLAPSE, color="0.2", ls="--", lw=1)
        axis.margins(x=0.08)
        axis.set(xlabel=label, ylim=(-3, 103))
        if column == "first.logit_spread":
            axis.set_xscale("log")
            decades = math.log10(mine[column].max() / max(mine[column].min(), 1e-9))
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=6))
            axis.xaxis.set_major_formatter(FuncFormatter(_plain))
            axis.xaxis.set_minor_formatter(NullFormatter())
        places = Labels(axis, size=7)
        for _, row in mine[mine["arm"].isin(named)].drop_duplicates("arm").iterrows():
            places.put(ablation.letter(row["arm"]), row[column], 100 * row["perplexity_share"])
    axes[0].set_ylabel(METRICS["share"].axis)
    handles = [Line2D([], [], ls="", marker="o", color=colors[method], label=method) for method in dot_products]
    handles += [
        Line2D([], [], ls="", marker=marker, color="0.4", label=f"D = {D}")
        for marker, D in zip(MARKERS, dimensions, strict=False)
        if mine["factor.D"].eq(D).any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=7.5)
    return figure


def _colors(rows: pd.DataFrame, outcome: str) -> ScalarMappable:
    """One scale for all maps of an outcome; that of FID is logarithmic, since collapsed codebooks have several times
    that of others."""
    means = [float(values_of(mine, outcome).mean()) for _, mine in rows.groupby("arm") if len(values_of(mine, outcome))]
    norm = LogNorm(min(means), max(means)) if outcome == "fid" and 0 < min(means) < max(means) else scale(means)
    return ScalarMappable(norm, colormap(outcome))


def _border(axis: Axes, states: Mapping[tuple[int, int], bool | None]) -> None:
    """A line between cells of different state that have no known one between them, in the middle of the way where they
    are apart."""
    known = {place: state for place, state in states.items() if state is not None}
    for along in (0, 1):
        for across in {place[1 - along] for place in known}:
            row = sorted(place for place in known if place[1 - along] == across)
            for one, other in pairwise(row):
                if known[one] != known[other]:
                    middle = (one[along] + other[along]) / 2
                    ends = (across - 0.5, across + 0.5)
                    xs, ys = ([middle, middle], ends) if along == 0 else (ends, [middle, middle])
                    axis.plot(xs, ys, path_effects=EDGE, **BORDER)


def _paper(axis: Axes, x: int, rates: list[float]) -> None:
    """A triangle at the edge beyond which the paper's rate lies, or a star in the nearest cell."""
    ascending = sorted(rates)
    style: dict[str, Any] = {
        "ls": "",
        "color": "white",
        "mec": "black",
        "mew": 0.8,
        "ms": 5.5,
        "zorder": 5,
        "clip_on": False,
    }
    if ascending[0] > PAPER_RATE:
        axis.plot(x, rates.index(ascending[0]) - 0.5, marker="v", **style)
    elif ascending[-1] < PAPER_RATE:
        axis.plot(x, rates.index(ascending[-1]) + 0.5, marker="^", **style)
    else:
        nearest = min(rates, key=lambda rate: abs(math.log(rate / PAPER_RATE)))
        axis.plot(x + 0.36, rates.index(nearest) + 0.3, marker="*", **style)


def _legend(ablation: Ablation, rows: pd.DataFrame, lr: Mapping[str, float]) -> list[Any]:
    inside = min(lr.values()) <= PAPER_RATE <= max(lr.values())
    marker = "*" if inside else "v" if min(lr.values()) > PAPER_RATE else "^"
    border = {name: value for name, value in BORDER.items() if name != "zorder"}
    return [
        Line2D([], [], label="border of collapse (halfway where cells are apart)", **border),
        Patch(
            facecolor="0.93",
            edgecolor="0.6",
            hatch="////",
            lw=0,
            label="left out: its neighbours agree (or no result: why)",
        ),
        Line2D([], [], ls="", marker=marker, color="white", mec="black", mew=0.8, label=paper_in_words(ablation, rows)),
        Patch(facecolor="white", edgecolor="0.8", lw=0.6, label="not asked"),
    ]


def _points(arms: tuple[Arm, ...], finished: pd.DataFrame) -> int:
    return sum(finished["arm"].eq(arm.name).any() for arm in arms)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _tokens_a_mean(cell: Cell) -> float:
    config = cell.config
    return config.batch_size * config.tokens_per_image / config.accumulate


def _initial_length(cell: Cell) -> float:
    """Of codes drawn from N(0, 1) times the factor, in the root of the mean square."""
    quantizer = cell.config.quantizer
    return getattr(quantizer, "init_scale", 1.0) * math.sqrt(quantizer.code_dim)


def _line_name(levels: Mapping[str, str], factor: str) -> str:
    """Levels that the arms of a line have in common, in short."""
    at = ", ".join(f"{name} {levels[name]}" for name in ("rate", "D") if name != factor)
    further = [levels[name] for name in ("remedy",) if levels[name] != "none"]
    return "; ".join([f"{levels['method']} ({at})", *further])
