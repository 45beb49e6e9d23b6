"""Images a second of sampling from a transformer: a cache of keys and values against a full pass for every token;
guidance, compilation.

Command: python -m experiments bench sampling   (2 CPU cores: about 5 minutes; no GPU has been measured yet)
On a CPU size S and 64 tokens; on CUDA sizes B and L and the paper's 256 tokens, also compiled, and beside them what
the memory's bandwidth
would allow. Every cell is measured in a process of its own and kept under runs/benchmarks/; the same command measures
only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.benchmarks import cells
from experiments.report import figures
from ibq.distributed import resolve_device
from ibq.errors import ConfigError

NAME = "sampling"
CELL = ["device", "size", "tokens", "batch", "K", "guidance", "precision"]
GUIDANCES = (1.0, 2.0)
MODES = ("uncached", "cached", "compiled")

CAPTION = (
    "Sampling of class-conditional tokens from transformers with random weights, images a second: a full forward pass "
    "for every token; a cache of keys and values, median of three; the same as one CUDA graph by torch.compile. Each "
    "after a batch to warm up, all in one process. Guidance other than 1 computes two sequences for an image. Of "
    "floor: the fastest, as a share of what the device's memory would allow if each step read every weight once and "
    "keys and values up to its position, at the rate of a copy. Equal: samples whose tokens are all the same with and "
    "without a cache; as neither is computed in float64, a draw at the border of two symbols may differ."
)


def run(
    device_name: str = "auto", batch: int | None = None, small: bool = False, say: Callable[[str], None] = print
) -> pd.DataFrame:
    """Measure what is missing of the grid and return its rows.

    Args:
        device_name: auto, cpu, cuda or cuda:N.
        batch: images that are sampled together; None: 64 on CUDA, 16 elsewhere.
        small: a tiny transformer, to try the benchmark itself.

    Raises:
        ConfigError: a batch below 1, or a device that is not here.
    """
    device = resolve_device(device_name)
    on_gpu = device.type == "cuda"
    batch = (64 if on_gpu else 16) if batch is None else batch
    if batch < 1:
        raise ConfigError(f"a batch of {batch} cannot be measured; batch must be at least 1")
    sizes = ("XXS",) if small else ("B", "L") if on_gpu else ("S",)
    tokens, K = (9, 32) if small else (256 if on_gpu else 64, 16384)
    folder = cells.folder(NAME, device, "sampling_cell.py", "ibq")
    grid = [(size, guidance) for size in sizes for guidance in GUIDANCES]
    rows = []
    for i, (size, guidance) in enumerate(grid, 1):
        values = (str(device), size, tokens, batch, K, guidance, "bf16" if on_gpu else "fp32")
        cell: dict[str, Any] = dict(zip(CELL, values, strict=True))
        row = cell | cells.facts(device)
        row |= cells.cached(folder, cell, "experiments.benchmarks.sampling_cell")
        rows.append(row | {"device": device.type})
        said = ", ".join(f"{mode} {_rate(row, mode)}" for mode in MODES if _rate(row, mode)) + " images/s"
        say(f"{i}/{len(grid)}  {size}, guidance {guidance:g}: {said if row['status'] == 'ok' else row['status']}")
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a size and guidance."""
    lines = []
    for row in rows.to_dict("records"):
        line = {
            "size": row["size"],
            "batch": f"{row['batch']} × {row['tokens']} tokens, {row['precision']}",
            "guidance": f"{row['guidance']:g}",
        }
        line |= {f"{mode} images/s": _rate(row, mode) for mode in _modes(rows)}
        if row["status"] == "ok":
            fastest = max(row[f"{mode}_images_per_second"] for mode in MODES if _rate(row, mode))
            line["cache gains"] = f"{row['cached_images_per_second'] / row['uncached_images_per_second']:.1f} ×"
            line["of floor"] = f"{fastest / row['floor_images_per_second']:.0%}"
            line["equal"] = f"{row['equal_samples']:.0f} of {row['batch']}"
        else:
            line["cache gains"] = row["status"]
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _modes(rows: pd.DataFrame) -> list[str]:
    """Modes that were measured anywhere; on a CPU nothing is compiled."""
    return [mode for mode in MODES if f"{mode}_images_per_second" in rows]


def _rate(row: dict[str, Any], mode: str) -> str:
    """Images a second of a mode; empty where it was not measured."""
    rate = row.get(f"{mode}_images_per_second")
    return "" if rate is None or pd.isna(rate) else f"{rate:.3g}"


def figure(rows: pd.DataFrame) -> Figure:
    """Images a second, a bar a mode, and the floor of memory as a line above them; no bar: not measured, or failed."""
    figures.theme()
    drawn, axis = plt.subplots(figsize=(6.5, 3.2))
    modes = _modes(rows)
    for place, mode in enumerate(modes):
        at = [i + (place - (len(modes) - 1) / 2) * 0.27 for i in range(len(rows))]
        axis.bar(at, rows[f"{mode}_images_per_second"].fillna(0), 0.25, color=figures.LINE_COLORS[place], label=mode)
    if "floor_images_per_second" in rows:
        left, right = ([i + side * 0.42 for i in range(len(rows))] for side in (-1, 1))
        axis.hlines(
            rows["floor_images_per_second"], left, right, color="0.3", ls="--", lw=1, label="bandwidth of memory"
        )
    labels = [f"{size}, guidance {guidance:g}" for size, guidance in zip(rows["size"], rows["guidance"], strict=True)]
    axis.set_xticks(range(len(rows)), labels)
    axis.set(ylabel="images/s")
    drawn.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(modes) + 1, frameon=False)
    return drawn


def write(rows: pd.DataFrame, publish: bool = False) -> Path:
    """The report, as `cells.write_report` says."""
    return cells.write_report(NAME, rows, table(rows), CAPTION, figure(rows), publish)
