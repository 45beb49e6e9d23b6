"""Figures of codebooks at the end of training, and of reconstructions."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors.torch import load_file

from experiments.ablations import Ablation
from experiments.analysis.projections import Projection, moments, project
from experiments.report.figures.theme import COLORS, arm_colors, arm_label, finished_cells, panel_grid
from experiments.study import Study

FEATURES, USED, DEAD = "0.7", COLORS[0], COLORS[3]


def code_frequency(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Rank plot on the test split at seed 0, with what uniform sampling of as many tokens would give."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.arm.focal and cell.seed == 0]
    if not cells:
        return None
    colors = arm_colors(ablation)
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for cell in cells:
        counts_K = load_file(cell.run.evaluation)["counts_K"]
        label = f"{arm_label(ablation, cell.arm)}: {int((counts_K == 0).sum())} of {len(counts_K)} dead"
        axis.plot(*ranks(counts_K), color=colors[cell.arm.name], label=label)
    tokens, K = int(counts_K.sum()), len(counts_K)
    axis.plot(*uniform_ranks(tokens, K), color="0.2", ls="--", lw=1, label=f"uniform sampling of {tokens:,} tokens")
    axis.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="share of tokens")
    axis.legend(loc="lower left", frameon=True, framealpha=1)
    return figure


def ranks(counts_K: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the codes in use, from 1, and their shares of the tokens, largest first."""
    used = counts_K[counts_K > 0].sort(descending=True).values.numpy()
    return np.arange(1, len(used) + 1), used / used.sum()


def uniform_ranks(tokens: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """As `ranks`, of so many tokens drawn uniformly from K codes."""
    return ranks(torch.from_numpy(np.random.default_rng(0).multinomial(tokens, np.full(K, 1 / K))))


def code_map(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Codes and features of the mapped arms at seed 0 in one projection each."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.seed == 0 and cell.arm in ablation.mapped]
    found = [
        (cell, project(cell.run, study.preset.projection, cell.run.snapshot_steps()[-1:], compute=False))
        for cell in cells
    ]
    projected = [(cell, projections[0]) for cell, projections in found if projections]
    if not projected:
        return None
    figure, axes = panel_grid(len(projected), 4, 2.15)
    for axis, (cell, projection) in zip(axes, projected, strict=True):
        draw_map(axis, projection)
        axis.set_title(arm_label(ablation, cell.arm))
    map_legend(figure)
    return figure


def map_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A row an arm that is followed, a column a moment."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.seed == 0 and cell.arm.followed]
    found = [(cell, project(cell.run, study.preset.projection, moments(cell.run), compute=False)) for cell in cells]
    projected = [(cell, projections) for cell, projections in found if projections]
    if not projected:
        return None
    columns = max(len(projections) for _, projections in projected)
    figure, axes = panel_grid(columns * len(projected), columns, 2.15)
    for i, (cell, projections) in enumerate(projected):
        for axis, projection in zip(axes[i * columns :], projections, strict=False):
            draw_map(axis, projection)
            axis.set_title(f"step {projection.step}")
        axes[i * columns].set_ylabel(arm_label(ablation, cell.arm))
    map_legend(figure)
    return figure


def draw_map(axis: Axes, projection: Projection, size: float = 5) -> None:
    """Codes among features; `size` of a code's mark in points squared."""
    dead, used = projection.codes[~projection.used], projection.codes[projection.used]
    axis.scatter(
        projection.features[:, 0], projection.features[:, 1], s=size / 2, color=FEATURES, linewidths=0, rasterized=True
    )
    axis.scatter(dead[:, 0], dead[:, 1], s=size, color=DEAD, marker="x", linewidths=0.5, rasterized=True)
    axis.scatter(used[:, 0], used[:, 1], s=size, color=USED, linewidths=0, rasterized=True)
    axis.set(xticks=[], yticks=[])


def map_legend(figure: Figure) -> None:
    style: dict[str, Any] = {"ls": "", "ms": 5}
    handles = [
        Line2D([], [], color=FEATURES, marker="o", label="features", **style),
        Line2D([], [], color=USED, marker="o", label="codes in use", **style),
        Line2D([], [], color=DEAD, marker="x", label="codes not in use", **style),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def reconstructions(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """The first test images and what each focal arm makes of them at seed 0 (averaged weights)."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.arm.focal and cell.seed == 0]
    if not cells:
        return None
    pictures = [load_file(cell.run.evaluation) for cell in cells]
    strips = [("original", pictures[0]["images_BCHW"])]
    strips += [
        (arm_label(ablation, cell.arm), picture["reconstructions_BCHW"])
        for cell, picture in zip(cells, pictures, strict=True)
    ]
    figure, axes = plt.subplots(len(strips), 1, figsize=(7.0, 1.1 * len(strips)), squeeze=False)
    for axis, (name, images_BCHW) in zip(axes[:, 0], strips, strict=True):
        draw_strip(axis, images_BCHW)
        axis.set_title(name, loc="left", pad=3)
        sns.despine(ax=axis, left=True, bottom=True)
    return figure


def draw_strip(axis: Axes, images_BCHW: torch.Tensor) -> None:
    """Images of uint8 side by side."""
    strip_HWC = torch.cat(list(images_BCHW), dim=2).permute(1, 2, 0).numpy()
    axis.imshow(strip_HWC.repeat(3, axis=2) if strip_HWC.shape[2] == 1 else strip_HWC, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
