"""The one look of every figure, and what figures share: colours, labels, grids of panels."""

from __future__ import annotations

from typing import Any, Literal

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from experiments.ablations import Ablation, Arm
from experiments.cells import Cell
from experiments.study import Study
from ibq.metrics import METRICS

COLORS = sns.color_palette("colorblind")
LINE_COLORS = [COLORS[i] for i in (3, 0, 1, 2, 4, 5, 6, 8, 9)]
BOTH = COLORS[7]
OTHER = "0.75"
MARKERS = ("o", "s", "^", "D", "v", "P")


def theme() -> None:
    """The one look of every figure."""
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font="DejaVu Sans")
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "savefig.dpi": 180,
            "pdf.fonttype": 42,
            "figure.dpi": 100,
            "axes.titlesize": 9,
        }
    )


def finished_cells(study: Study, ablation: Ablation) -> list[Cell]:
    cells = [cell for cell in study.cells if cell.ablation.name == ablation.name and cell.run.finished and cell.is_arm]
    return [cell for cell in cells if cell.run.read_row()["status"] == "ok"]


def arm_colors(ablation: Ablation) -> dict[str, Any]:
    focal = [arm.name for arm in ablation.arms if arm.focal]
    return {name: LINE_COLORS[i % len(LINE_COLORS)] for i, name in enumerate(focal)}


def method_colors(ablation: Ablation) -> dict[str, Any]:
    """Colour of each method (the levels of the first factor), and of comparisons between methods."""
    methods = ablation.factors[0].levels
    return {method: LINE_COLORS[i % len(LINE_COLORS)] for i, method in enumerate(methods)} | {"both": BOTH}


def arm_label(ablation: Ablation, arm: Arm) -> str:
    name = " ".join(arm.name.split()).replace("$", r"\$")  # no mathematics in names
    return f"{ablation.letter(arm.name)}  {name if len(name) <= 40 else name[:39] + '…'}"


def axis_label(name: str, side: Literal["x", "y"], change: bool = False) -> str:
    """A metric, or a change of it, with the direction that is better, e.g. "FID[fashion-cnn] (lower is better)"."""
    metric = METRICS[name]
    label = metric.change if change else metric.axis
    along = {"lower": "left", "higher": "right"} if side == "x" else {"lower": "lower", "higher": "higher"}
    return f"{label} ({along[metric.better]} is better)" if metric.better else label


def panel_grid(panels: int, columns: int, size: float) -> tuple[Figure, list[Any]]:
    """A figure of so many panels, row by row."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns + 0.4, size * rows + 0.4), squeeze=False)
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, list(axes.flat[:panels])
