"""Figures over training: usage, geometry, gradient reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.ablations import Ablation
from experiments.cells import Cell
from experiments.report.figures.theme import COLORS, OTHER, arm_colors, arm_label, finished_cells, panel_grid
from experiments.study import Study
from ibq.metrics import METRICS
from ibq.training.logging import GAPS

Line = dict[str, Any]
Curve = Callable[[Line, Cell], float]
Panel = tuple[str, Curve, Curve | None]
"""Label of the y axis, the value of a line, and that of indifference (uniform sampling), where it has one, drawn once
for each K."""


def usage_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    panels: dict[str, Panel] = {
        "Codes used": (
            "share of codes used, %",
            lambda line, cell: 100 * line["usage"],
            lambda line, cell: 100 * line["uniform_usage"],
        ),
        "Perplexity": (
            METRICS["share"].axis,
            lambda line, cell: 100 * line["perplexity"] / cell.config.quantizer.codebook_size,
            lambda line, cell: 100 * line["uniform_perplexity"] / cell.config.quantizer.codebook_size,
        ),
    }
    return _curves(study, ablation, panels, log=False)


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


def geometry(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    panels: dict[str, Panel] = {
        "Codes": ("mean norm of all codes", lambda line, cell: line["code_norm"], None),
        "Features": ("mean norm of features", lambda line, cell: line["feature_norm"], None),
        "Distance": ("quantization error / variance of z", lambda line, cell: line["quantization_error"], None),
    }
    return _curves(study, ablation, panels, log=True)


def logits_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    panels: dict[str, Panel] = {
        "Spread": ("std of a token's logits", lambda line, cell: line.get("logit_spread", math.nan), None),
        "Decision": (
            "largest probability of a token",
            lambda line, cell: line.get("max_probability", math.nan),
            lambda line, cell: 1 / cell.config.quantizer.codebook_size,
        ),
    }
    return _curves(study, ablation, panels, log=True, dashed="1/K")


def gap_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """At the moments of the snapshots."""
    label = "Fréchet distance / variance of z"
    panels: dict[str, Panel] = {
        "All codes": (label, lambda line, cell: line["gap"], None),
        "Codes in use": (label, lambda line, cell: line["gap_used"], None),
        "Codes not in use": (label, lambda line, cell: line["gap_dead"], None),
    }
    return _curves(study, ablation, panels, log=True, lines=_gaps)


def _gaps(cell: Cell) -> list[Line]:
    """A line a snapshot; nothing has been counted before the first step, so which codes are in use is not known
    there."""
    lines = []
    for step in cell.run.snapshot_steps():
        snapshot = cell.run.read_snapshot(step)
        shown = [name for name in GAPS if name in snapshot and (step or name == "gap")]
        lines.append({"step": step} | dict.fromkeys(GAPS, math.nan) | {name: snapshot[name].item() for name in shown})
    return lines


def gradient_reach(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    panels: dict[str, Panel] = {
        "Effective gradient reach": ("codes (exp. entropy of norms)", lambda line, cell: line["reach_effective"], None),
        "RMS gradient above Adam's eps (1e-8)": (
            "share of codes, %",
            lambda line, cell: 100 * line["reach_above_eps"],
            None,
        ),
    }
    return _curves(study, ablation, panels, log=False)


def discriminator_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Arms without a discriminator have no line."""
    panels: dict[str, Panel] = {
        "Real": ("mean logit of training images", lambda line, cell: line.get("logit_real", math.nan), None),
        "Reconstructed": ("mean logit of reconstructions", lambda line, cell: line.get("logit_fake", math.nan), None),
        "Generator": ("weighted adversarial term", lambda line, cell: line.get("weighted_adversarial", math.nan), None),
    }
    return _curves(study, ablation, panels, log=False, signed=True)


def loss_over_training(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """Of transformers."""
    panels: dict[str, Panel] = {
        "Next token": (
            "cross-entropy, nats a token",
            lambda line, cell: line.get("loss", math.nan),
            lambda line, cell: math.log(cell.config.quantizer.codebook_size),
        )
    }
    return _curves(study, ablation, panels, log=False, dashed="log K: uniform tokens")


def _curves(
    study: Study,
    ablation: Ablation,
    panels: dict[str, Panel],
    log: bool,
    lines: Callable[[Cell], list[Line]] = lambda cell: cell.run.read_history(),
    dashed: str = "uniform sampling",
    signed: bool = False,
) -> Figure | None:
    """Training curves: focal arms in colour, a line per seed; all others grey behind them. Where nothing is below 0,
    axes begin there."""
    cells = sorted(finished_cells(study, ablation), key=lambda cell: cell.arm.focal)
    if not cells:
        return None
    histories = [(cell, lines(cell)) for cell in cells]
    drawn = {
        title: panel
        for title, panel in panels.items()
        if any(math.isfinite(panel[1](*at)) for at in _points(histories))
    }
    if not drawn:
        return None
    histories = [
        (cell, history)
        for cell, history in histories
        if any(_has_a_point(panel, cell, history) for panel in drawn.values())
    ]
    by_size = {cell.config.quantizer.codebook_size: (cell, history) for cell, history in histories}.values()
    colors, seen = arm_colors(ablation), {cell.arm.name for cell, _ in histories}
    figure, axes = plt.subplots(1, len(drawn), figsize=(3.6 * len(drawn) + 1.8, 3.1), squeeze=False)
    for axis, (title, (unit, value, uniform)) in zip(axes[0], drawn.items(), strict=True):
        for cell, history in histories:
            style = {"color": colors.get(cell.arm.name, OTHER), "lw": 1.3 if cell.arm.focal else 0.8}
            axis.plot([line["step"] for line in history], [value(line, cell) for line in history], **style)
        if uniform:
            for cell, history in by_size:
                axis.plot(
                    [line["step"] for line in history],
                    [uniform(line, cell) for line in history],
                    color="0.2",
                    ls="--",
                    lw=1,
                )
        axis.set(title=title, xlabel="training step", ylabel=unit)
        if log:
            axis.set_yscale("log")
        elif not signed:
            axis.set_ylim(0, None)
    handles = [
        Line2D([], [], color=colors[arm.name], label=arm_label(ablation, arm))
        for arm in ablation.arms
        if arm.name in colors and arm.name in seen
    ]
    if seen - colors.keys():
        handles.append(Line2D([], [], color=OTHER, label="other arms"))
    if any(uniform for _, _, uniform in drawn.values()):
        handles.append(Line2D([], [], color="0.2", ls="--", lw=1, label=dashed))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _has_a_point(panel: Panel, cell: Cell, history: list[Line]) -> bool:
    return any(math.isfinite(panel[1](line, cell)) for line in history)


def _points(histories: list[tuple[Cell, list[Line]]]) -> Iterator[tuple[Line, Cell]]:
    return ((line, cell) for cell, history in histories for line in history)
