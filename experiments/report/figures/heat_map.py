"""A grid from the command line: maps of two fields, or lines over one."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from experiments.ablations import Ablation
from experiments.ablations.grid import GRID_COLUMNS, numbers, strips, varied
from experiments.analysis import metrics
from experiments.report.figures.theme import method_colors
from experiments.study import Study
from ibq.metrics import METRICS

ABOVE: dict[str, Any] = {
    "xycoords": "axes fraction",
    "textcoords": "offset points",
    "fontsize": 8,
    "annotation_clip": False,
}
MOST_STRIPS, WIDEST = 12, 24
"""Maps below each other, and cells beside each other."""
LONGEST_LEVEL = 18
CLOSEST_TICKS = 0.09
"""A field's values are its ticks where no two of them are closer than this share of the axis."""


def heat_map(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Maps of the first two fields that vary, or lines over the one that does."""
    finished = rows[rows["status"] == "ok"]
    if finished.empty:
        return None
    sizes = rows["codebook_size"].nunique()  # at one K bits say what perplexity / K says
    shown = [name for name in GRID_COLUMNS if metrics.measured(finished, name) and (name != "bits" or sizes > 1)]
    return _lines(ablation, rows, shown) if len(varied(ablation)) == 1 else _maps(ablation, rows, shown)


def _maps(ablation: Ablation, rows: pd.DataFrame, shown: list[str]) -> Figure:
    """A row of maps for every base and combination of the fields beyond the second; a column an outcome, with one
    scale."""
    down, across, *others = varied(ablation)
    names = [ablation.factors[0].name, down.name, across.name, *(field.name for field in others)]
    arms = {tuple(arm.levels[name] for name in names): rows[rows["arm"] == arm.name] for arm in ablation.arms}
    every_strip, bases = strips(ablation), ablation.factors[0].levels
    of_one_base = len(every_strip) // len(bases)
    drawn = [strip for i, strip in enumerate(every_strip) if i % of_one_base < max(1, MOST_STRIPS // len(bases))][
        :MOST_STRIPS
    ]
    if len(shown) * len(across.levels) > WIDEST:
        shown = [outcome for outcome in shown if outcome != "bits"]  # the table has them
    titles = [
        ", ".join([base, *(f"{of.name}={_short(at)}" for of, at in zip(others, rest, strict=True))])
        for base, *rest in drawn
    ]
    longest = max(len(_short(level)) for level in across.levels)
    width, height = max(0.53, 0.075 * longest), 0.36
    size = (
        len(shown) * (width * len(across.levels) + 0.25) + 1.5,
        len(drawn) * (height * len(down.levels) + 0.32) + 1.5,
    )
    size = (max(size[0], 5.0, 0.066 * max(map(len, titles)) + 1.2), size[1])
    figure, axes = plt.subplots(len(drawn), len(shown), figsize=size, squeeze=False, sharex=True, sharey=True)
    for column, outcome in enumerate(shown):
        means = [values_of(mine, outcome).mean() for mine in arms.values() if len(values_of(mine, outcome))]
        colors = ScalarMappable(scale(means), colormap(outcome))
        for axis, (base, *rest) in zip(axes[:, column], drawn, strict=True):
            for y, at_y in enumerate(down.levels):
                for x, at_x in enumerate(across.levels):
                    draw_cell(axis, x, y, outcome, arms[(base, at_y, at_x, *rest)], colors)
            axis.set(xlim=(-0.5, len(across.levels) - 0.5), ylim=(len(down.levels) - 0.5, -0.5))
            axis.grid(False)
        bar = figure.colorbar(
            colors, ax=list(axes[:, column]), location="top", aspect=30 * width * len(across.levels) / 2, pad=0.02
        )
        bar.set_label(METRICS[outcome].axis, fontsize=9)
        bar.ax.tick_params(labelsize=7)
        bar.ax.xaxis.set_major_locator(MaxNLocator(min(6, max(2, int(size[0] / len(shown) / 0.6)))))
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_title(
            " ", fontsize=8
        )  # takes the height; the words may reach over the next columns, which a title must not
        words = axis.annotate(title.replace("$", r"\$"), (0, 1), xytext=(0, 5), **ABOVE)
        words.set_in_layout(False)
        axis.set_yticks(range(len(down.levels)), [_short(level) for level in down.levels], fontsize=7.5)
    for axis in axes[-1]:
        axis.set_xticks(range(len(across.levels)), [_short(level) for level in across.levels], fontsize=7.5)
    figure.supxlabel(across.name, fontsize=8.5)
    figure.supylabel(down.name, fontsize=8.5)
    if len(drawn) < len(every_strip):
        figure.suptitle(f"{len(drawn)} of {len(every_strip)} maps; the table has all", fontsize=8.5)
    return figure


def draw_cell(axis: Axes, x: int, y: int, outcome: str, mine: pd.DataFrame, colors: ScalarMappable) -> None:
    """One arm: its mean over seeds in its colour, or why it has none on hatched grey."""
    values = values_of(mine, outcome)
    if values.empty:
        draw_hatched(axis, x, y, _why(mine))
        return
    color = colors.to_rgba(values.mean())
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
    words = f"{values.mean():.{METRICS[outcome].digits}f}" + (
        f"\n{len(values)} of {len(mine)}" if len(values) < len(mine) else ""
    )
    ink = "black" if float(np.dot(color[:3], (0.299, 0.587, 0.114))) > 0.5 else "white"
    axis.text(x, y, words, ha="center", va="center", fontsize=6.5, color=ink)


def draw_hatched(axis: Axes, x: int, y: int, words: str = "") -> None:
    """A cell without a number, and why."""
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="0.93", edgecolor="0.72", hatch="////", linewidth=0))
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor="white", linewidth=0.6))
    if words:
        box = {"boxstyle": "round,pad=0.15", "facecolor": "0.93", "edgecolor": "none"}
        axis.text(x, y, words, ha="center", va="center", fontsize=6, color="0.15", bbox=box)


def _lines(ablation: Ablation, rows: pd.DataFrame, shown: list[str]) -> Figure:
    """A panel an outcome: a point a seed, a line a base through the means; an arm without a result is named at the
    foot."""
    field, (bases, *_) = varied(ablation)[0], ablation.factors
    colors, sizes = method_colors(ablation), numbers(field.levels)
    xs = sizes or [float(i) for i in range(len(field.levels))]
    log = sizes is not None and min(sizes) > 0 and max(sizes) >= 10 * min(sizes)
    places = np.log10(xs) if log else np.array(xs)
    room = 0.3 * float(np.ptp(places)) or 1.0
    ends = np.array([places.min() - room, places.max() + room])
    figure, axes = plt.subplots(1, len(shown), figsize=(2.9 * len(shown) + 0.6, 3.3), squeeze=False)
    for axis, outcome in zip(axes[0], shown, strict=True):
        lost = 0
        for row, base in enumerate(bases.levels):
            along = _along(ablation, rows, base, xs)
            axis.plot(
                xs, [values_of(mine, outcome).mean() for _, mine in along], color=colors[base], lw=1.3
            )  # a gap where there is none
            for x, mine in along:
                values = values_of(mine, outcome)
                axis.scatter([x] * len(values), values, color=[colors[base]], s=16, zorder=3)
                if values.empty:
                    why, height = _why(mine).replace("/\n", "/").replace("\n", " "), 0.02 + 0.065 * row
                    axis.text(
                        x,
                        height,
                        f"× {why}",
                        transform=axis.get_xaxis_transform(),
                        color=colors[base],
                        fontsize=7,
                        ha="center",
                    )
                    lost += 1
        axis.set(xlabel=field.name, ylabel=METRICS[outcome].axis, xscale="log" if log else "linear")
        axis.margins(y=0.1)
        axis.set_xlim(10.0**ends if log else ends)
        if lost:
            low, high = axis.get_ylim()
            axis.set_ylim(low - 0.075 * len(bases.levels) * (high - low), high)
        if sizes is None or _apart(places):
            axis.set_xticks(xs, [_short(level) for level in field.levels], fontsize=7.5)
            axis.minorticks_off()
    handles = [
        Line2D([], [], color=colors[base], marker="o", ms=4, label=base.replace("$", r"\$")) for base in bases.levels
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _along(ablation: Ablation, rows: pd.DataFrame, base: str, xs: list[float]) -> list[tuple[float, pd.DataFrame]]:
    """The rows of a base's arms, level by level of the one field that varies."""
    field, first = varied(ablation)[0], ablation.factors[0].name
    arms = {arm.levels[field.name]: arm.name for arm in ablation.arms if arm.levels[first] == base}
    return [(x, rows[rows["arm"] == arms[level]]) for x, level in zip(xs, field.levels, strict=True)]


def values_of(mine: pd.DataFrame, outcome: str) -> pd.Series:
    """An outcome of one arm, seed by seed, where there is one."""
    return metrics.values(mine[mine["status"] == "ok"], outcome).dropna()


def colormap(outcome: str) -> Colormap:
    """Perceptually uniform, told apart with any colour vision; brighter where more codes are in use or the error is
    lower."""
    return mpl.colormaps["viridis_r" if METRICS[outcome].better == "lower" else "viridis"]


def scale(values: list[float]) -> Normalize:
    """From the least to the greatest; one value alone stands in the middle."""
    least, greatest = min(values), max(values)
    room = 0.0 if greatest > least else max(abs(greatest), 1e-9) / 10
    return Normalize(least - room, greatest + room)


def _apart(ascending: np.ndarray) -> bool:
    return len(ascending) == 1 or bool(np.diff(ascending).min() >= CLOSEST_TICKS * np.ptp(ascending))


def _why(mine: pd.DataFrame) -> str:
    """The state of an arm without a number, in two words."""
    if (mine["status"] == "ok").any():
        return "not\nmeasured"
    return "/\n".join(sorted(set(mine["status"]))) or "pending"


def _short(level: str) -> str:
    return level if len(level) <= LONGEST_LEVEL else level[: LONGEST_LEVEL - 1] + "…"
