"""Figures of an ablation, in one theme, from rows and run directories alone; each is None while it has no data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from safetensors.torch import load_file

from experiments.ablations import Ablation, Arm
from experiments.effects import effects
from experiments.projections import project
from experiments.study import Cell, Study
from experiments.tables import chosen_value, searches

COLORS = sns.color_palette("colorblind")
LINE_COLORS = [COLORS[i] for i in (3, 0, 1, 2, 4, 5, 6, 8, 9)]
BOTH = COLORS[7]
OTHER = "0.75"
MARKERS = ("o", "s", "^", "D", "v", "P")

Curve = Callable[[dict[str, Any], Cell], float]
Panel = tuple[str, Curve, Curve | None]
"""Label of the y axis, the value of a history line, and what uniform sampling would give, where that has a meaning."""


def theme() -> None:
    """The one look of every figure."""
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font="DejaVu Sans")
    plt.rcParams.update(
        {"figure.constrained_layout.use": True, "savefig.dpi": 200, "pdf.fonttype": 42, "figure.dpi": 100, "axes.titlesize": 9}
    )


def _finished(study: Study, ablation: Ablation) -> list[Cell]:
    cells = [cell for cell in study.cells if cell.ablation.name == ablation.name and cell.run.finished and not cell.search]
    return [cell for cell in cells if cell.run.read_row()["status"] == "ok"]


def _colors(ablation: Ablation) -> dict[str, Any]:
    focal = [arm.name for arm in ablation.arms if arm.focal]
    return {name: LINE_COLORS[i % len(LINE_COLORS)] for i, name in enumerate(focal)}


def _method_colors(ablation: Ablation) -> dict[str, Any]:
    """Colour of each method (the levels of the first factor), and of comparisons between methods."""
    methods = ablation.factors[0].levels
    return {method: LINE_COLORS[i % len(LINE_COLORS)] for i, method in enumerate(methods)} | {"both": BOTH}


def _label(ablation: Ablation, arm: Arm) -> str:
    name = " ".join(arm.name.split()).replace("$", r"\$")  # no mathematics in names
    return f"{ablation.letter(arm.name)}  {name if len(name) <= 40 else name[:39] + '…'}"


def _curves(study: Study, ablation: Ablation, panels: dict[str, Panel], log: bool) -> Figure | None:
    """Training curves: focal arms in colour, a line per seed; all others grey behind them."""
    cells = sorted(_finished(study, ablation), key=lambda cell: cell.arm.focal)
    if not cells:
        return None
    colors, seen = _colors(ablation), set()
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels) + 1.8, 3.1), squeeze=False)
    for axis, (title, (unit, value, uniform)) in zip(axes[0], panels.items(), strict=True):
        for cell in cells:
            history = cell.run.read_history()
            ys = [value(line, cell) for line in history]
            axis.plot([line["step"] for line in history], ys, color=colors.get(cell.arm.name, OTHER), lw=1.3 if cell.arm.focal else 0.8)
            seen.add(cell.arm.name)
        if uniform:
            axis.plot([line["step"] for line in history], [uniform(line, cell) for line in history], color="0.2", ls="--", lw=1)
        axis.set(title=title, xlabel="training step", ylabel=unit)
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, None)
    handles = [
        Line2D([], [], color=colors[arm.name], label=_label(ablation, arm))
        for arm in ablation.arms
        if arm.name in colors and arm.name in seen
    ]
    if seen - colors.keys():
        handles.append(Line2D([], [], color=OTHER, label="other arms"))
    if any(uniform for _, _, uniform in panels.values()):
        handles.append(Line2D([], [], color="0.2", ls="--", lw=1, label="uniform sampling"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def usage_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    panels: dict[str, Panel] = {
        "Codes used": ("share of codes used, %", lambda line, cell: 100 * line["usage"], lambda line, cell: 100 * line["uniform_usage"]),
        "Perplexity": (
            "perplexity / K, %",
            lambda line, cell: 100 * line["perplexity"] / cell.config.quantizer.codebook_size,
            lambda line, cell: 100 * line["uniform_perplexity"] / cell.config.quantizer.codebook_size,
        ),
    }
    return _curves(study, ablation, panels, log=False)


def usage_of_each(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A panel an arm, seed 0: codes used and perplexity over training; all other arms grey behind."""
    cells = [cell for cell in _finished(study, ablation) if cell.seed == 0]
    if not cells:
        return None
    histories = [pd.DataFrame(cell.run.read_history()) for cell in cells]
    shares = [100 * history["perplexity"] / cell.config.quantizer.codebook_size for cell, history in zip(cells, histories, strict=True)]
    figure, axes = _grid(len(cells), 5, 1.75)
    for axis, cell, history, share in zip(axes, cells, histories, shares, strict=True):
        for other, its_share in zip(histories, shares, strict=True):
            axis.plot(other["step"], its_share, color="0.88", lw=0.6)
        axis.plot(history["step"], 100 * history["usage"], color=COLORS[1], lw=1.2, ls=":")
        axis.plot(history["step"], share, color=COLORS[0], lw=1.4)
        axis.set(title=_label(ablation, cell.arm), ylim=(0, 103), xticks=[0, cell.config.steps], yticks=[0, 50, 100])
        axis.title.set_fontsize(7.5)
        axis.tick_params(labelsize=7)
    handles = [
        Line2D([], [], color=COLORS[0], lw=1.4, label="perplexity / K, %"),
        Line2D([], [], color=COLORS[1], lw=1.2, ls=":", label="codes used, %"),
        Line2D([], [], color="0.88", lw=0.8, label="perplexity of the other arms"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _grid(panels: int, columns: int, size: float) -> tuple[Figure, list[Any]]:
    """A figure of so many panels, row by row."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns + 0.4, size * rows + 0.4), squeeze=False)
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, list(axes.flat[:panels])


def geometry(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    panels: dict[str, Panel] = {
        "Codes": ("mean norm of all codes", lambda line, cell: line["code_norm"], None),
        "Features": ("mean norm of features", lambda line, cell: line["feature_norm"], None),
        "Distance": ("quantization error / variance of z", lambda line, cell: line["quantization_error"], None),
    }
    return _curves(study, ablation, panels, log=True)


def gradient_reach(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    panels: dict[str, Panel] = {
        "Effective gradient reach": ("codes (exp. entropy of norms)", lambda line, cell: line["reach_effective"], None),
        "RMS gradient above Adam's eps (1e-8)": ("share of codes, %", lambda line, cell: 100 * line["reach_above_eps"], None),
    }
    return _curves(study, ablation, panels, log=False)


def code_frequency(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Rank plot on the test split at seed 0, with what uniform sampling of as many tokens would give."""
    cells = [cell for cell in _finished(study, ablation) if cell.arm.focal and cell.seed == 0]
    if not cells:
        return None
    colors = _colors(ablation)
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for cell in cells:
        counts_K = load_file(cell.run.evaluation)["counts_K"].sort(descending=True).values.numpy()
        used = counts_K[counts_K > 0]
        label = f"{_label(ablation, cell.arm)}: {len(counts_K) - len(used)} of {len(counts_K)} dead"
        axis.plot(np.arange(1, len(used) + 1), used / used.sum(), color=colors[cell.arm.name], label=label)
    tokens, K = int(counts_K.sum()), len(counts_K)
    uniform = np.sort(np.random.default_rng(0).multinomial(tokens, np.full(K, 1 / K)))[::-1]
    uniform = uniform[uniform > 0]
    axis.plot(np.arange(1, len(uniform) + 1), uniform / tokens, color="0.2", ls="--", lw=1, label=f"uniform sampling of {tokens:,} tokens")
    axis.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="share of tokens")
    axis.legend(loc="lower left", frameon=True, framealpha=1)
    return figure


def code_map(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Codes and features of the mapped arms at seed 0 in one projection each."""
    projected = []
    for cell in _finished(study, ablation):
        shown = cell.seed == 0 and cell.arm in ablation.mapped
        projection = project(cell.run, study.preset.projection, compute=False) if shown else None
        if projection is not None:
            projected.append((cell, projection))
    if not projected:
        return None
    figure, axes = _grid(len(projected), 4, 2.15)
    for axis, (cell, projection) in zip(axes, projected, strict=True):
        axis.scatter(*projection.features.T, s=2.5, color="0.7", linewidths=0, rasterized=True)
        axis.scatter(*projection.codes[~projection.used].T, s=5, color=COLORS[3], marker="x", linewidths=0.5, rasterized=True)
        axis.scatter(*projection.codes[projection.used].T, s=5, color=COLORS[0], linewidths=0, rasterized=True)
        axis.set(title=_label(ablation, cell.arm), xticks=[], yticks=[])
    style: dict[str, Any] = {"ls": "", "ms": 5}
    handles = [
        Line2D([], [], color="0.7", marker="o", label="features", **style),
        Line2D([], [], color=COLORS[0], marker="o", label="codes in use", **style),
        Line2D([], [], color=COLORS[3], marker="x", label="codes not in use", **style),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def rate_distortion(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Every arm and seed: bits a token against L1; letters name the arms."""
    finished = rows[(rows["status"] == "ok") & rows["arm"].isin([arm.name for arm in ablation.arms])]
    if finished.empty:
        return None
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    method, colors = ablation.factors[0], _method_colors(ablation)
    shapes = ablation.factor(ablation.marker).levels if ablation.marker else ("",)
    fills = ablation.factor(ablation.fill).levels[::-1] if ablation.fill else ("",)
    limit = float(np.log2(finished["codebook_size"].astype(float).max()))
    for row in finished.to_dict("records"):
        color = colors[row[f"factor.{method.name}"]]
        marker = MARKERS[shapes.index(row[f"factor.{ablation.marker}"])] if ablation.marker else "o"
        face = color if not ablation.fill or row[f"factor.{ablation.fill}"] == fills[0] else "white"
        axis.scatter(row["bits"], row["l1"], marker=marker, edgecolor=color, facecolor=face, s=34, linewidth=1.2, zorder=3)
        beside = (-11, -3) if limit - row["bits"] < 0.3 else (5, 3)  # clear of the dashed line
        axis.annotate(ablation.letter(row["arm"]), (row["bits"], row["l1"]), xytext=beside, textcoords="offset points", fontsize=7.5)
    axis.axvline(limit, color="0.3", ls="--", lw=1)
    axis.set(xlabel=f"rate: bits a token (dashed: log2 K = {limit:g})", ylabel="distortion: L1 on the test split, [-1, 1]")
    style: dict[str, Any] = {"ls": "", "mew": 1.2, "ms": 6}
    handles = [Line2D([], [], marker="o", color=colors[name], label=name, **style) for name in method.levels]
    if ablation.marker:
        shown = zip(MARKERS, shapes, strict=False)
        handles += [Line2D([], [], marker=marker, color="0.4", label=f"{ablation.marker} {name}", **style) for marker, name in shown]
    if ablation.fill:
        faces = ["0.4", *["white"] * (len(fills) - 1)]
        shades = zip(fills, faces, strict=True)
        handles += [Line2D([], [], marker="o", color="0.4", mfc=face, label=f"{ablation.fill} {name}", **style) for name, face in shades]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def search(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """What decided over the values tried, a line an arm in the colour of its method; a ring marks the choice."""
    lines = [(arm, mine[mine["status"] == "ok"], chosen_value(mine)) for arm, mine in searches(rows)]
    lines = [line for line in lines if not line[1].empty]
    if not lines or ablation.tuning is None:
        return None
    colors, method = _method_colors(ablation), ablation.factors[0]
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    for arm, mine, chosen in lines:
        color = colors[ablation.arm(arm).levels[method.name]]
        values, losses = mine["search.value"].astype(float), mine["search.loss"].astype(float)
        axis.plot(values, losses, color=color, marker=".", lw=1)
        axis.annotate(ablation.letter(arm), (values.iloc[-1], losses.iloc[-1]), xytext=(5, -2), textcoords="offset points", fontsize=7)
        axis.scatter(values[values == chosen], losses[values == chosen], s=60, facecolor="none", edgecolor=color, linewidth=1.2)
    axis.set(xscale="log", xlabel=ablation.tuning.field, ylabel="reconstruction error on training batches")
    tried = sorted({value for _, mine, _ in lines for value in mine["search.value"]})
    axis.set_xticks(tried, [f"{value:g}" for value in tried])
    axis.minorticks_off()
    shown = {ablation.arm(arm).levels[method.name] for arm, _, _ in lines}
    handles = [Line2D([], [], color=colors[name], marker=".", label=name) for name in method.levels if name in shown]
    handles.append(Line2D([], [], ls="", marker="o", ms=8, mfc="none", color="0.4", label="chosen"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def main_effects(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Effect of each change of a factor on rate and distortion: a point a pair and seed, a bar at the mean over pairs."""
    table = effects(ablation, rows)
    if table.empty:
        return None
    changes, colors = list(dict.fromkeys(table["change"])), _method_colors(ablation)
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.42 * len(changes) + 1.3), sharey=True)
    panels = {"bits": "rate: change of bits a token", "l1": "distortion: change of L1 (left is better)"}
    for axis, (outcome, label) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color="0.3", lw=1)
        for y, change in enumerate(changes):
            group = table[table["change"] == change]
            means = group.groupby("pair")[outcome].mean()
            axis.plot([means.mean()] * 2, [y - 0.32, y + 0.32], color="0.1", lw=2.5, solid_capstyle="butt", zorder=2)
            for i, (pair, points) in enumerate(group.groupby("pair", sort=False)):
                offset = (i - (len(means) - 1) / 2) * 0.16
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
        axis.set(xlabel=label, yticks=range(len(changes)), yticklabels=changes)
        axis.margins(x=0.16)
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axes[0].invert_yaxis()
    handles = [Line2D([], [], ls="", marker="o", ms=5, color=colors[name], label=f"within {name}") for name in ablation.factors[0].levels]
    handles.append(Line2D([], [], ls="", marker="o", ms=5, color=BOTH, label=" against ".join(ablation.factors[0].levels)))
    handles.append(Line2D([], [], color="0.1", lw=2.5, label="mean over pairs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def reconstructions(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """The first test images and what each focal arm makes of them at seed 0 (averaged weights)."""
    cells = [cell for cell in _finished(study, ablation) if cell.arm.focal and cell.seed == 0]
    if not cells:
        return None
    pictures = [load_file(cell.run.evaluation) for cell in cells]
    strips = [("original", pictures[0]["images_BCHW"])]
    strips += [(_label(ablation, cell.arm), picture["reconstructions_BCHW"]) for cell, picture in zip(cells, pictures, strict=True)]
    figure, axes = plt.subplots(len(strips), 1, figsize=(7.0, 1.1 * len(strips)), squeeze=False)
    for axis, (name, images_BCHW) in zip(axes[:, 0], strips, strict=True):
        strip_HWC = torch.cat(list(images_BCHW), dim=2).permute(1, 2, 0).numpy()
        axis.imshow(strip_HWC.repeat(3, axis=2) if strip_HWC.shape[2] == 1 else strip_HWC, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_title(name, loc="left", pad=3)
        sns.despine(ax=axis, left=True, bottom=True)
    return figure


FIGURES: dict[str, tuple[Callable[[Study, Ablation, pd.DataFrame], Figure | None], str]] = {
    "usage_over_training": (
        usage_over_training,
        "Codes used and perplexity over training, counted on the training tokens between two log steps (dashed: as many uniform tokens); "
        "a line a seed.",
    ),
    "search": (
        search,
        "The search before the comparison: reconstruction error on the training batches of the last third of each short run; rings mark "
        "what the arms were then trained with.",
    ),
    "usage_of_each": (
        usage_of_each,
        "Perplexity and codes used over training, a panel an arm, seed 0, counted on the training tokens between two log steps.",
    ),
    "main_effects": (
        main_effects,
        "Main effects. A point is a pair of arms that differ in the named factor alone, at one seed (letters: the arms); "
        "bars are means over pairs.",
    ),
    "rate_distortion": (
        rate_distortion,
        "Rate against distortion on the test split, every arm and seed; more codes in use need not mean a lower error.",
    ),
    "code_frequency": (
        code_frequency,
        "Share of the test split's tokens by rank of the code; codes without a token are counted in the legend.",
    ),
    "code_map": (
        code_map,
        "Codes (at most 1,024) and test features of each arm in one projection ({projection}) at the end of training, raw weights, seed 0; "
        "in use: by a training token since the snapshot before.",
    ),
    "geometry": (
        geometry,
        "Norms of codes and features, and how far apart they are: squared distance of a feature to its code over the variance of features, "
        "at single training steps.",
    ),
    "gradient_reach": (
        gradient_reach,
        "How many codes the gradient of the whole loss reaches at a step; 'non-zero' would say nothing of a softmax.",
    ),
    "reconstructions": (reconstructions, "Test images and their reconstructions, seed 0."),
}


def draw(name: str, study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """One figure by name, in the theme."""
    theme()
    return FIGURES[name][0](study, ablation, rows[rows["ablation"] == ablation.name])


def caption(name: str, study: Study) -> str:
    method = "UMAP, 15 neighbours, fixed random state" if study.preset.projection == "umap" else "PCA"
    return FIGURES[name][1].format(projection=method)


def save(figure: Figure, folder: Path, name: str) -> None:
    """PNG and PDF (embedded fonts, no dates: equal figures are equal files)."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    plt.close(figure)
