"""Throughput and memory of training the paper's tokenizer, by codes K, compiled or not, with our operator and with the
N×K matrix.

Command: python -m experiments bench tokenizer-training   (no GPU has been measured yet; on a CPU name small sizes)
Every cell trains a few steps of the method's recipe by the real trainer in a process of its own and is kept under
runs/benchmarks/; the
same command measures only what is missing. rows.csv keeps what former calls measured: `python -m experiments plan
RECIPE` reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.benchmarks import cells
from experiments.benchmarks.training_cell import RECIPE_OF
from experiments.report import figures
from ibq.distributed import resolve_device
from ibq.errors import ConfigError, nearest
from ibq.metrics import METRICS

NAME = "tokenizer_training"
CELL = ["device", "method", "K", "compiled", "operator", "batch", "accumulate", "precision", "small"]
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
CODES = (16384, 262144)
OPERATORS = ("ours", "matrix")
"""The operator of `ibq.ops` as it picks its backend, or the (N, K) matrix of the released formulation
(`ibq.ops.reference`)."""

CAPTION = (
    "Training of the 256×256 tokenizer of the recipes (discriminator and perceptual network included, the latter with "
    "random weights, which cost the same), one process, images from memory: mean over the timed steps after warm-up. A "
    "step: micro-batches × images, precision; several micro-batches need a second forward pass. GiB: the most that was "
    "allocated (on a CPU, resident)."
)


def run(
    device_name: str = "auto",
    codes: tuple[int, ...] = (),
    batch: int = 32,
    dtype: str = "",
    method: str = "ibq",
    accumulate: int = 8,
    small: bool = False,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Measure what is missing of the grid and return its rows.

    Args:
        device_name: auto, cpu, cuda or cuda:N.
        codes: K; empty: CODES.
        batch: images a step; 32 is what the recipes give one of eight GPUs.
        dtype: "float32", or "bfloat16" or "float16" autocast; empty: bfloat16 on CUDA, float32 elsewhere.
        method: "ibq", "vq" or "lfq", as their recipes have them; all but IBQ have one operator alone, which counts as
            ours.
        accumulate: micro-batches of a step; 8 is what the recipes have, and a second forward pass with them.
        small: 32×32 pixels and a network of a thousandth of the size, to try the benchmark itself.

    Raises:
        ConfigError: a size below 1, micro-batches that do not divide a batch, an unknown dtype or method, or a device
            that is not here; the paper's size on a CPU.
    """
    device = resolve_device(device_name)
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in PRECISIONS:
        raise ConfigError(f"dtype={dtype!r} is not known; {nearest(dtype, PRECISIONS)}")
    if method not in RECIPE_OF:
        raise ConfigError(f"method={method!r} is not measured; {nearest(method, RECIPE_OF)}")
    if device.type != "cuda" and not small:
        raise ConfigError(
            f"a step of the 256×256 tokenizer takes minutes on device={str(device)!r}; measure on CUDA, or try --small"
        )
    codes = codes or CODES
    if smallest := [size for size in (*codes, batch, accumulate) if size < 1]:
        raise ConfigError(f"a size of {smallest[0]} cannot be measured; codes, batch and accumulate must be at least 1")
    if batch % accumulate:
        raise ConfigError(
            f"batch={batch} cannot be cut into accumulate={accumulate} micro-batches; choose numbers that divide"
        )
    folder = cells.folder(NAME, device, "training_cell.py", "ibq")
    grid = list(itertools.product(codes, (False, True), OPERATORS if method == "ibq" else OPERATORS[:1]))
    rows = []
    for i, (K, compiled, operator) in enumerate(grid, 1):
        values = (str(device), method, K, compiled, operator, batch, accumulate, PRECISIONS[dtype], small)
        cell: dict[str, Any] = dict(zip(CELL, values, strict=True))
        row = cell | cells.facts(device)
        row |= cells.cached(folder, cell, "experiments.benchmarks.training_cell")
        rows.append(row | {"device": device.type})
        outcome = (
            f"{row['images_per_second']:.1f} images/s, {row['peak_gib']:.3g} GiB"
            if row["status"] == "ok"
            else row["status"]
        )
        say(f"{i}/{len(grid)}  K={K} {operator}{', compiled' if compiled else ''}: {outcome}")
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a size and mode; ours and the matrix stand side by side."""
    lines = []
    for (K, compiled), group in rows.groupby(["K", "compiled"], sort=False):
        first = group.iloc[0]
        step = f"{first['accumulate']} × {first['batch'] // first['accumulate']} images, {first['precision']}"
        line: dict[str, object] = {
            "method": first["method"],
            "K": f"{K:,}",
            "step": step,
            "compiled": "yes" if compiled else "no",
        }
        for row in group.to_dict("records"):
            fits = row["status"] == "ok"
            line[f"{row['operator']} images/s"] = f"{row['images_per_second']:.1f}" if fits else row["status"]
            line[f"{row['operator']} GiB"] = f"{row['peak_gib']:.3g}" if fits else ""
        lines.append(line)
    return pd.DataFrame(lines)


def figure(rows: pd.DataFrame) -> Figure:
    """Images a second and memory against K, a bar a mode; no bar: it does not fit, or failed."""
    figures.theme()
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    modes = list(itertools.product(OPERATORS, (False, True)))
    sizes = sorted(rows["K"].unique())
    for axis, (quantity, label) in zip(
        axes, {"images_per_second": "images/s", "peak_gib": METRICS["peak_memory"].axis}.items(), strict=True
    ):
        for place, (operator, compiled) in enumerate(modes):
            mine = rows[(rows["operator"] == operator) & (rows["compiled"] == compiled)].set_index("K")
            heights = [
                mine.loc[K, quantity] if K in mine.index and mine.loc[K, "status"] == "ok" else 0.0 for K in sizes
            ]
            at = [i + (place - 1.5) * 0.2 for i in range(len(sizes))]
            name = f"{operator}{', compiled' if compiled else ''}"
            axis.bar(at, heights, 0.18, color=figures.LINE_COLORS[place], label=name)
        axis.set_xticks(range(len(sizes)), [f"{K:,}" for K in sizes])
        axis.set(xlabel="K, codes", ylabel=label)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(modes), frameon=False)
    return drawn


def write(rows: pd.DataFrame, publish: bool = False) -> Path:
    """The report, as `cells.write_report` says.

    The table and the figure show these rows; rows.csv has those of former calls as well, unless they are of the same
    cell and machine.
    """
    former = cells.report_folder(NAME) / "rows.csv"
    before = [pd.read_csv(former)] if former.is_file() else []
    all_rows = pd.concat([*before, rows], ignore_index=True).drop_duplicates(["machine", *CELL], keep="last")
    return cells.write_report(NAME, all_rows, table(rows), CAPTION, figure(rows), publish)


def known_rows() -> pd.DataFrame:
    """The published rows and those of this machine's own benchmark; empty where nothing has been measured."""
    files = [folder / "rows.csv" for folder in (cells.published_folder(NAME), cells.report_folder(NAME))]
    found = [pd.read_csv(file) for file in files if file.is_file()]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
