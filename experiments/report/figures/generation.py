"""Transformers: samples, guidance, bits against distortion, depth. What has no result is named at the foot of a
figure."""

from __future__ import annotations

import math
import textwrap

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from safetensors.torch import load_file

from experiments.ablations import Ablation
from experiments.analysis import metrics, transformers
from experiments.cells import Cell
from experiments.report.figures.labels import Labels
from experiments.report.figures.points import Points
from experiments.report.figures.theme import arm_label, axis_label, finished_cells, panel_grid
from experiments.study import Study
from ibq.data.landscapes import CLASSES
from ibq.metrics import METRICS

MOST_ROWS, MOST_COLUMNS = 10, 6
"""Classes and samples of each that a grid of samples shows."""
CLASS_NAMES = {
    "fashion-mnist": (
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    "landscapes": CLASSES,
}


def samples(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A panel an arm in colour, at its best guidance: a row a class."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.arm.focal and cell.seed == 0]
    drawn = [(cell, guidance, grid) for cell in cells for guidance, grid in [_class_grid(cell)] if grid]
    if not drawn:
        return None
    figure, axes = panel_grid(len(drawn), 4, 2.1)
    shape = axes[0].get_gridspec()
    most = max(len(grid) for _, _, grid in drawn)
    figure.set_size_inches(2.1 * shape.ncols + 0.6, shape.nrows * (2.1 * most / MOST_COLUMNS + 0.4) + 0.3)
    for axis, (cell, guidance, grid) in zip(axes, drawn, strict=True):
        picture_HWC = torch.cat([torch.cat(row, dim=2) for row in grid.values()], dim=1).permute(1, 2, 0).numpy()
        axis.imshow(
            picture_HWC.repeat(3, axis=2) if picture_HWC.shape[2] == 1 else picture_HWC, interpolation="nearest"
        )
        side = picture_HWC.shape[0] / len(grid)
        axis.set(xticks=[], yticks=[side * (i + 0.5) for i in range(len(grid))])
        axis.set_yticklabels(grid if axis.get_subplotspec().is_first_col() else [], fontsize=6.5)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.set_title(f"{arm_label(ablation, cell.arm)}\nguidance {guidance:g}", fontsize=7.5)
        sns.despine(ax=axis, left=True, bottom=True)
    _foot(figure, ablation, rows)
    return figure


def _class_grid(cell: Cell) -> tuple[float, dict[str, list[torch.Tensor]]]:
    """The best guidance of a run (the first, where none was found), and its kept samples (C, H, W) at it by the name of
    their class."""
    path = cell.run.path / "eval" / "samples.safetensors"
    kept = load_file(path) if path.is_file() else {}
    guidances = sorted(float(name.removeprefix("images@")) for name in kept if name.startswith("images@"))
    if not guidances:
        return math.nan, {}
    guidance = cell.run.read_row().get("guidance", guidances[0])
    names = CLASS_NAMES.get(cell.config.data.kind, ())
    grid: dict[str, list[torch.Tensor]] = {}
    for image_CHW, number in zip(
        kept[f"images@{guidance:g}"], kept["classes_N"][kept["shown_N"]].tolist(), strict=True
    ):
        row = grid.setdefault(names[number] if number < len(names) else f"class {number}", [])
        if len(row) < MOST_COLUMNS:
            row.append(image_CHW)
    longest = max(len(row) for row in grid.values())
    padded = {name: row + [torch.zeros_like(row[0])] * (longest - len(row)) for name, row in grid.items()}
    return guidance, dict(list(padded.items())[:MOST_ROWS])


def guidance_sweep(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A line an arm and seed along guidance, whose values stand at the points of an arm's first finished seed; a ring
    is the best one."""
    guidances = transformers.guidances(rows)
    if not guidances:
        return None
    finished = rows[rows["status"] == "ok"].dropna(subset=["guidance"])
    points = Points(ablation, finished)
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.2))
    for axis, (x_name, y_name) in zip(axes, (("is", "fid"), ("recall", "precision")), strict=True):
        of_x, of_y = METRICS[x_name].column, METRICS[y_name].column
        for row in finished.to_dict("records"):
            x, y = ([row[f"{name}@{guidance:g}"] for guidance in guidances] for name in (of_x, of_y))
            axis.plot(x, y, lw=1.1, ms=4.2, **points.style(row["arm"]))
            axis.scatter(row[of_x], row[of_y], s=75, facecolor="none", edgecolor="0.2", linewidth=0.9, zorder=4)
        axis.set(xlabel=axis_label(x_name, "x"), ylabel=axis_label(y_name, "y"))
        axis.margins(0.1)
        if y_name == "fid":
            _plain_log(axis)
        _name_guidances(
            axis, ablation, finished[finished["seed"] == finished.groupby("arm")["seed"].transform("min")], of_x, of_y
        )
    handles = [*points.handles(), Line2D([], [], ls="", marker="o", ms=8, mfc="none", color="0.2", label="lowest FID")]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    _foot(figure, ablation, rows)
    return figure


def _name_guidances(axis: Axes, ablation: Ablation, finished: pd.DataFrame, of_x: str, of_y: str) -> None:
    """The arm's letter at the first point of a line, then guidances where there is room: the last, the first, those
    between."""
    guidances = transformers.guidances(finished)
    labels = Labels(axis, 6.5)
    for guidance in dict.fromkeys([guidances[0], guidances[-1], *guidances]):
        for row in finished.to_dict("records"):
            letter = f"{ablation.letter(row['arm'])}: " if guidance == guidances[0] else ""
            at = row[f"{of_x}@{guidance:g}"], row[f"{of_y}@{guidance:g}"]
            labels.put(f"{letter}{guidance:g}", *at, must=bool(letter))


def bits_and_distortion(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """The transformer's bits against what its tokenizer loses and against what it generates; letters name the arms."""
    finished = rows[rows["status"] == "ok"]
    shown = [name for name in ("tokenizer_l1", "fid") if metrics.measured(finished, name)]
    if not shown or "bits_per_image" not in finished:
        return None
    points, uniform = Points(ablation, finished), finished["uniform_bits_per_image"].max()
    most = max(uniform, finished["bits_per_image"].max())  # a bad transformer takes more than guessing does
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown) + 1.4, 3.7), squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        axis.axvline(uniform, color="0.3", ls="--", lw=1)
        axis.set(xlabel=f"{METRICS['bits_per_image'].axis}, by the transformer", xlim=(0, 1.05 * most))
        _draw(axis, ablation, points, finished, "bits_per_image", name)
    handles = [*points.handles(), Line2D([], [], color="0.3", ls="--", lw=1, label=f"uniform tokens: {uniform:g} bits")]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    _foot(figure, ablation, rows)
    return figure


def depth_scaling(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Likelihood and quality against parameters: a point a seed, lines through the means of arms that differ in depth
    alone."""
    finished = rows[rows["status"] == "ok"]
    shown = [name for name in ("bits_per_image", "fid", "label_agreement") if metrics.measured(finished, name)]
    if not shown:
        return None
    points, lines = Points(ablation, finished), _by_depth(ablation, finished)
    sizes = sorted(set(pd.concat(lines or [finished])["parameters"]))
    figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown) + 1.4, 3.5), squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        for mine in lines:
            means = metrics.values(mine, name).groupby(mine["parameters"]).mean()
            axis.plot(means.index, means, lw=1.2, color=points.style(mine["arm"].iloc[0])["color"])
        axis.set(xscale="log", xlabel="parameters of the transformer")
        axis.set_xticks(sizes, [f"{size / 1e6:.2g}M" for size in sizes])
        axis.minorticks_off()
        _draw(axis, ablation, points, finished, "parameters", name)
    figure.legend(handles=points.handles(), loc="outside right upper", frameon=False)
    _foot(
        figure,
        ablation,
        rows,
        "" if lines else "Fewer than two depths of one method have a result, so there is no line yet.",
    )
    return figure


def _by_depth(ablation: Ablation, finished: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each set of arms that differ in depth alone, where there are two sizes or more."""
    sets = [finished[finished["arm"].isin([arm.name for arm in arms])] for arms in ablation.sizes()]
    return [mine for mine in sets if mine["parameters"].nunique() > 1]


def _draw(axis: Axes, ablation: Ablation, points: Points, finished: pd.DataFrame, of_x: str, name: str) -> None:
    """A metric over a column: a point a run, and each arm's letter at their mean."""
    known = finished.assign(y=metrics.values(finished, name)).dropna(subset=[of_x, "y"])
    for arm, mine in known.groupby("arm", sort=False):
        axis.plot(mine[of_x], mine["y"], ls="", ms=5.8, zorder=3, **points.style(str(arm)))
    axis.set_ylabel(METRICS[name].axis)
    axis.margins(0.12)
    if name == "fid":
        _plain_log(axis)
    labels = Labels(axis, 7.5)
    for arm, mine in known.groupby("arm", sort=False):
        labels.put(ablation.letter(str(arm)), mine[of_x].mean(), mine["y"].mean())


def _plain_log(axis: Axes) -> None:
    """A logarithmic axis whose ticks are plain numbers: 1, 2, 5 times powers of ten where at least two of them lie
    within its limits."""
    axis.set_yscale("log")
    axis.autoscale_view()
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()


def _foot(figure: Figure, ablation: Ablation, rows: pd.DataFrame, note: str = "") -> None:
    """Names of what is missing, below a figure; the words on one arm stay on one line."""
    if lost := [arm.replace(" ", "\u00a0") for arm in transformers.without_result(ablation, rows)]:
        note = f"{note} No result: {', '.join(lost)}"
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, int(17 * figure.get_figwidth()))), fontsize=7.5, color="0.3")
