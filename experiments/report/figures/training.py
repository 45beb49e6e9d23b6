"""Figures over training: usage, effective dimension, geometry, gradient reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.ablations import Ablation
from experiments.cells import Cell
from experiments.report.figures.panels import (
    ABOVE_EPS,
    ADVERSARIAL,
    CODE_NORM,
    DIMENSION99_USED,
    DIMENSION_CODES,
    DIMENSION_FEATURES,
    DIMENSION_USED,
    FEATURE_NORM,
    GAP,
    GAP_ANGULAR,
    GAP_DEAD,
    GAP_USED,
    LOGIT_FAKE,
    LOGIT_REAL,
    LOGIT_SPREAD,
    MAX_PROBABILITY,
    NEXT_TOKEN,
    PERPLEXITY,
    QUANTIZATION_ERROR,
    REACH,
    USAGE,
    Line,
    Panel,
)
from experiments.report.figures.theme import COLORS, OTHER, arm_colors, arm_label, finished_cells, panel_grid
from experiments.study import Study
from ibq.metrics import METRICS
from ibq.training.logging import GAPS

DRAWN_OF_EACH = ["step", "dimension_used", "dimension_features"]


def usage_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    return _curves(study, ablation, [USAGE, PERPLEXITY])


def usage_of_each(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A panel an arm, seed 0: codes used and perplexity over training; all other arms grey behind."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.seed == 0]
    if not cells:
        return None
    histories = [pd.DataFrame(cell.run.read_history()) for cell in cells]
    shares = [
        100 * history["perplexity"] / cell.config.quantizer.codebook_size
        for cell, history in zip(cells, histories, strict=True)
    ]
    figure, axes = panel_grid(len(cells), 5, 1.75)
    for axis, cell, history, share in zip(axes, cells, histories, shares, strict=True):
        for other, its_share in zip(histories, shares, strict=True):
            axis.plot(other["step"], its_share, color="0.88", lw=0.6)
        axis.plot(history["step"], 100 * history["usage"], color=COLORS[1], lw=1.2, ls=":")
        axis.plot(history["step"], share, color=COLORS[0], lw=1.4)
        axis.set(title=arm_label(ablation, cell.arm), ylim=(0, 103), xticks=[0, cell.config.steps], yticks=[0, 50, 100])
        axis.title.set_fontsize(7.5)
        axis.tick_params(labelsize=7)
    handles = [
        Line2D([], [], color=COLORS[0], lw=1.4, label=METRICS["share"].axis),
        Line2D([], [], color=COLORS[1], lw=1.2, ls=":", label="codes used, %"),
        Line2D([], [], color="0.88", lw=0.8, label="perplexity of the other arms"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def dimension_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    return _curves(study, ablation, [DIMENSION_USED, DIMENSION99_USED, DIMENSION_CODES, DIMENSION_FEATURES])


def dimension_of_each(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A panel an arm, seed 0: effective dimension of features and of codes in use over training; all other arms grey
    behind. Runs whose log has neither have no panel."""
    cells = [cell for cell in finished_cells(study, ablation) if cell.seed == 0]
    histories = [(cell, pd.DataFrame(cell.run.read_history(), columns=DRAWN_OF_EACH)) for cell in cells]
    shown = [(cell, history) for cell, history in histories if history["dimension_features"].notna().any()]
    if not shown:
        return None
    most = max(history[DRAWN_OF_EACH[1:]].max(axis=None) for _, history in shown)
    figure, axes = panel_grid(len(shown), 5, 1.75)
    for axis, (cell, history) in zip(axes, shown, strict=True):
        for _, other in shown:
            axis.plot(other["step"], other["dimension_used"], color="0.88", lw=0.6)
        axis.plot(history["step"], history["dimension_features"], color=COLORS[1], lw=1.2, ls=":")
        axis.plot(history["step"], history["dimension_used"], color=COLORS[0], lw=1.4)
        axis.set(title=arm_label(ablation, cell.arm), ylim=(0, 1.03 * most), xticks=[0, cell.config.steps])
        axis.title.set_fontsize(7.5)
        axis.tick_params(labelsize=7)
    handles = [
        Line2D([], [], color=COLORS[0], lw=1.4, label="codes in use"),
        Line2D([], [], color=COLORS[1], lw=1.2, ls=":", label="features"),
        Line2D([], [], color="0.88", lw=0.8, label="codes of the other arms"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def geometry(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    return _curves(study, ablation, [CODE_NORM, FEATURE_NORM, QUANTIZATION_ERROR])


def logits_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    return _curves(study, ablation, [LOGIT_SPREAD, MAX_PROBABILITY._replace(log=True)], dashed="1/K")


def gap_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """At the moments of the snapshots."""
    return _curves(
        study, ablation, [GAP._replace(title="Gap, all codes"), GAP_ANGULAR, GAP_USED, GAP_DEAD], lines=_gaps
    )


def _gaps(cell: Cell) -> list[Line]:
    """A line a snapshot; nothing has been counted before the first step, so which codes are in use is not known
    there."""
    lines = []
    for step in cell.run.snapshot_steps():
        snapshot = cell.run.read_snapshot(step)
        shown = [name for name in GAPS if name in snapshot and (step or name in GAPS[:2])]
        lines.append({"step": step} | dict.fromkeys(GAPS, math.nan) | {name: snapshot[name].item() for name in shown})
    return lines


def gradient_reach(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    return _curves(study, ablation, [REACH, ABOVE_EPS])


def discriminator_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Arms without a discriminator have no line."""
    return _curves(study, ablation, [LOGIT_REAL, LOGIT_FAKE, ADVERSARIAL])


def loss_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Of transformers."""
    return _curves(study, ablation, [NEXT_TOKEN], dashed="log K: uniform tokens")


def _curves(
    study: Study,
    ablation: Ablation,
    panels: Sequence[Panel],
    lines: Callable[[Cell], list[Line]] = lambda cell: cell.run.read_history(),
    dashed: str = "uniform sampling",
) -> Figure | None:
    """Training curves: focal arms in colour, a line per seed; all others grey behind them."""
    cells = sorted(finished_cells(study, ablation), key=lambda cell: cell.arm.focal)
    histories = [(cell, lines(cell)) for cell in cells]
    drawn = [panel for panel in panels if any(_has_a_point(panel, *each) for each in histories)]
    if not drawn:
        return None
    histories = [each for each in histories if any(_has_a_point(panel, *each) for panel in drawn)]
    by_size = {cell.config.quantizer.codebook_size: history for cell, history in histories}
    colors, seen = arm_colors(ablation), {cell.arm.name for cell, _ in histories}
    figure, axes = plt.subplots(1, len(drawn), figsize=(3.6 * len(drawn) + 1.8, 3.1), squeeze=False)
    for axis, panel in zip(axes[0], drawn, strict=True):
        for cell, history in histories:
            K = cell.config.quantizer.codebook_size
            style = {"color": colors.get(cell.arm.name, OTHER), "lw": 1.3 if cell.arm.focal else 0.8}
            axis.plot([line["step"] for line in history], [panel.curve(line, K) for line in history], **style)
        if panel.reference:
            for K, history in by_size.items():
                values = [panel.reference(line, K) for line in history]
                axis.plot([line["step"] for line in history], values, color="0.2", ls="--", lw=1)
        axis.set(title=panel.title, xlabel="training step", ylabel=panel.label)
        if panel.log:
            axis.set_yscale("log")
        elif panel.least is not None:
            axis.set_ylim(panel.least, None)
    handles = [
        Line2D([], [], color=colors[arm.name], label=arm_label(ablation, arm))
        for arm in ablation.arms
        if arm.name in colors and arm.name in seen
    ]
    if seen - colors.keys():
        handles.append(Line2D([], [], color=OTHER, label="other arms"))
    if any(panel.reference for panel in drawn):
        handles.append(Line2D([], [], color="0.2", ls="--", lw=1, label=dashed))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _has_a_point(panel: Panel, cell: Cell, history: list[Line]) -> bool:
    return any(math.isfinite(panel.curve(line, cell.config.quantizer.codebook_size)) for line in history)
