"""Training step of every quantizer against that of VQ: time and memory at two codebook sizes.

Command: python -m experiments bench quantizer-step   (2 CPU cores: about 5 minutes)
Each method in a process of its own, its steps and VQ's in turns on the same features, without encoder and decoder.
Cells are kept under runs/benchmarks/; the same command measures only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.ablations import ABLATIONS
from experiments.ablations.quantizers import CONTROL
from experiments.benchmarks import cells
from experiments.report import figures
from ibq.distributed import resolve_device

NAME = "quantizer-step"
CODES, TOKENS = (1024, 16384), 2048
CAPTION = (
    f"A training step of each quantizer alone (forward, backward, Adam) on {TOKENS:,} tokens of 64 dimensions, or of "
    "those that the method has, against a step of VQ (Euclidean search, straight-through copy): median of seven "
    "pairs of steps, taken in turns in one process. Memory: the most that a first step takes above what stands still, "
    "each in a process of its own."
)


def run(
    device_name: str = "auto", codes: tuple[int, ...] = (), small: bool = False, say: Callable[[str], None] = print
) -> pd.DataFrame:
    """Measure what is missing of the grid and return its rows.

    Args:
        device_name: auto, cpu, cuda or cuda:N.
        codes: K; none: 1,024 and 16,384.
        small: three methods with 64 codes, to try the benchmark itself.
    """
    device = resolve_device(device_name)
    folder = cells.folder(NAME, device, "quantizer_step_cell.py", "ibq/quantizers", "ibq/ops")
    arms = [arm for arm in ABLATIONS["quantizers"].arms if arm.levels["family"] != CONTROL]
    arms = [arm for arm in arms if arm.name in ("vq", "fsq", "ibq")] if small else arms
    grid = [(arm, K) for K in ((64,) if small else codes or CODES) for arm in arms]
    rows = []
    for i, (arm, K) in enumerate(grid, 1):
        cell: dict[str, Any] = {"device": str(device), "arm": arm.name, "K": K, "N": TOKENS}
        row = cell | {"method": arm.levels["method"]} | cells.facts(device)
        row |= cells.cached(folder, cell, "experiments.benchmarks.quantizer_step_cell")
        rows.append(row | {"device": device.type})
        said = f"{row['times_vq']:.2f} × VQ's step" if row["status"] == "ok" else row["status"]
        say(f"{i}/{len(grid)}  {arm.name}, K = {K:,}: {said}")
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a method, time and memory over VQ's at each K."""
    lines: dict[str, dict[str, str]] = {}
    memory_of_vq = rows[rows["arm"] == "vq"].set_index("K")["peak_gib"]
    for row in rows.to_dict("records"):
        line = lines.setdefault(row["arm"], {"arm": row["arm"], "method": row["method"]})
        known = row["status"] == "ok"
        line[f"ms, K = {row['K']:,}"] = f"{1000 * row['seconds']:.3g}" if known else row["status"]
        line[f"time / VQ's, K = {row['K']:,}"] = f"{row['times_vq']:.2f}" if known else ""
        line[f"memory / VQ's, K = {row['K']:,}"] = f"{row['peak_gib'] / memory_of_vq[row['K']]:.2f}" if known else ""
    return pd.DataFrame(list(lines.values())).fillna("")


def figure(rows: pd.DataFrame) -> Figure:
    """Time of a step over VQ's, a bar a method and K."""
    figures.theme()
    sizes, arms = list(rows["K"].unique()), list(rows["arm"].unique())[::-1]
    drawn, axis = plt.subplots(figsize=(6.5, 0.9 + 0.3 * len(arms)))
    for place, K in enumerate(sizes):
        mine = rows[rows["K"] == K].set_index("arm").reindex(arms)
        at = [i - (place - (len(sizes) - 1) / 2) * 0.36 for i in range(len(arms))]
        ratios = mine["times_vq"] if "times_vq" in mine else [0.0] * len(arms)
        axis.barh(at, ratios, 0.33, color=figures.LINE_COLORS[place], label=f"K = {K:,}")
    axis.axvline(1, color="0.3", ls="--", lw=1)
    axis.set_yticks(range(len(arms)), arms)
    axis.set(xlabel="time of a training step over VQ's (log scale)", xscale="log")
    drawn.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(sizes), frameon=False)
    return drawn


def write(rows: pd.DataFrame, publish: bool = False) -> Path:
    """The report, as `cells.write_report` says."""
    return cells.write_report(NAME, rows, table(rows), CAPTION, figure(rows), publish)
