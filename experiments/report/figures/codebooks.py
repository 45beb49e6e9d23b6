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


def code_frequency(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Rank plot on the test split at seed 0, with what uniform sampling of as many tokens would give."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.arm.focal and cell.seed == 0]
    if not cells:
        return None
    colors = arm_colors(ablation)
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for cell in cells:
        counts_K = load_file(cell.run.evaluation)["counts_K"].sort(descending=True).values.numpy()
        used = counts_K[counts_K > 0]
        label = f"{arm_label(ablation, cell.arm)}: {len(counts_K) - len(used)} of {len(counts_K)} dead"
        axis.plot(np.arange(1, len(used) + 1), used / used.sum(), color=colors[cell.arm.name], label=label)
    tokens, K = int(counts_K.sum()), len(counts_K)
    uniform = np.sort(np.random.default_rng(0).multinomial(tokens, np.full(K, 1 / K)))[::-1]
    uniform = uniform[uniform > 0]
    axis.plot(
        np.arange(1, len(uniform) + 1),
        uniform / tokens,
        color="0.2",
        ls="--",
        lw=1,
        label=f"uniform sampling of {tokens:,} tokens",
    )
    axis.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="share of tokens")
    axis.legend(loc="lower left", frameon=True, framealpha=1)
    return figure


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
        _draw_map(axis, projection)
        axis.set_title(arm_label(ablation, cell.arm))
    _map_legend(figure)
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
            _draw_map(axis, projection)
            axis.set_title(f"step {projection.step}")
        axes[i * columns].set_ylabel(arm_label(ablation, cell.arm))
    _map_legend(figure)
    return figure


def _draw_map(axis: Axes, projection: Projection) -> None:
    dead, used = projection.codes[~projection.used], projection.codes[projection.used]
    axis.scatter(
        projection.features[:, 0], projection.features[:, 1], s=2.5, color="0.7", linewidths=0, rasterized=True
    )
    axis.scatter(dead[:, 0], dead[:, 1], s=5, color=COLORS[3], marker="x", linewidths=0.5, rasterized=True)
    axis.scatter(used[:, 0], used[:, 1], s=5, color=COLORS[0], linewidths=0, rasterized=True)
    axis.set(xticks=[], yticks=[])


def _map_legend(figure: Figure) -> None:
    style: dict[str, Any] = {"ls": "", "ms": 5}
    handles = [
        Line2D([], [], color="0.7", marker="o", label="features", **style),
        Line2D([], [], color=COLORS[0], marker="o", label="codes in use", **style),
        Line2D([], [], color=COLORS[3], marker="x", label="codes not in use", **style),
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
        strip_HWC = torch.cat(list(images_BCHW), dim=2).permute(1, 2, 0).numpy()
        axis.imshow(strip_HWC.repeat(3, axis=2) if strip_HWC.shape[2] == 1 else strip_HWC, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_title(name, loc="left", pad=3)
        sns.despine(ax=axis, left=True, bottom=True)
    return figure
