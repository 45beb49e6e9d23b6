"""Time and memory of index backpropagation against the released formulation, over tokens N and codes K.

Command: python -m experiments bench index-backprop   (2 CPU cores: about 15 minutes; a GPU: not measured yet)
Every cell runs in a process of its own and is kept under runs/benchmarks/; the same command measures only what is
missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.benchmarks import cells
from experiments.report import figures
from ibq.distributed import resolve_device
from ibq.errors import ConfigError

NAME, MEASURE = "index_backprop", "experiments.benchmarks.measure"
METHODS = ("released", "dense", "chunked", "triton")
GRIDS = {
    "cuda": ((1024, 4096, 16384, 65536), (1024, 16384, 262144, 1048576)),
    "cpu": ((1024, 4096), (1024, 16384, 262144)),
}
OPERATIONS = {True: 16, False: 12}
"""Operations per N·K·D with and without entropy: forward, backward and the passes that need a row's statistics
first."""

NO_ROOM = "does not fit"

CAPTION = (
    "Forward and backward pass of index backpropagation, fresh N(0, 0.3²) inputs, median after one pass of warm-up; "
    "peak memory above the inputs, gradients included. Operations are counted as 16·N·K·D with entropy, 12 without, "
    "whatever a method really computes."
)


def run(
    device_name: str = "auto",
    tokens: tuple[int, ...] = (),
    codes: tuple[int, ...] = (),
    dim: int = 256,
    dtype: str = "",
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Measure what is missing of a grid and return its rows.

    Args:
        device_name: auto, cpu, cuda or cuda:N.
        tokens, codes: N and K; empty: the device's own grid.
        dim: D.
        dtype: of the factors of matrix products, "float32" or "bfloat16"; empty: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        ConfigError: a size below 1, an unknown dtype or a device that is not here.
    """
    device = resolve_device(device_name)
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype!r} is not known; use 'float32' or 'bfloat16'")
    if dtype == "bfloat16" and device.type != "cuda":
        raise ConfigError(
            "dtype='bfloat16' on a CPU would compare different arithmetic; use 'float32' there, or a CUDA device"
        )
    own_tokens, own_codes = GRIDS["cuda" if device.type == "cuda" else "cpu"]
    tokens, codes = tokens or own_tokens, codes or own_codes
    if smallest := [size for size in (*tokens, *codes, dim) if size < 1]:
        raise ConfigError(f"a size of {smallest[0]} cannot be measured; tokens, codes and dim must be at least 1")
    folder = cells.folder(NAME, device, "measure.py", "ibq/ops")
    product = cells.cached(folder, {"device": str(device), "dtype": dtype}, MEASURE, f"matrix_{dtype}")
    rate = cells.require(product, "the matrix product that all is measured against")["matrix_tflops"]
    grid = list(_cells(device, dtype, tokens, codes, dim))
    rows = []
    for i, cell in enumerate(grid, 1):
        row = cell | cells.facts(device) | {"matrix_tflops": rate}
        row |= cells.cached(folder, cell, MEASURE)
        if row["status"] == "ok":
            row["tflops"] = OPERATIONS[cell["entropy"]] * cell["N"] * cell["K"] * cell["D"] / row["seconds"] / 1e12
        rows.append(row)
        outcome = f"{row['seconds']:.3g} s, {row['peak_gib']:.3g} GiB" if row["status"] == "ok" else row["status"]
        say(f"{i}/{len(grid)}  {_name(cell)}: {outcome}")
    return pd.DataFrame(rows)


def _cells(
    device: torch.device, dtype: str, tokens: tuple[int, ...], codes: tuple[int, ...], dim: int
) -> Iterator[dict[str, Any]]:
    """Small sizes first, the rivals of one size one after another."""
    methods = METHODS if device.type == "cuda" else METHODS[:-1]
    for K, N, entropy, method in itertools.product(codes, tokens, (True, False), methods):
        yield {"method": method, "device": str(device), "dtype": dtype, "N": N, "K": K, "D": dim, "entropy": entropy}


def _name(cell: dict[str, Any]) -> str:
    return (
        f"{cell['method']} N={cell['N']} K={cell['K']} D={cell['D']} {'with' if cell['entropy'] else 'without'} entropy"
    )


# --- Table and figure -------------------------------------------------------------------------------------------------


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a size: each method's time, and below it memory and rate; the rivals stand side by side."""
    lines = []
    for (N, K, entropy), group in rows.groupby(["N", "K", "entropy"], sort=False):
        line: dict[str, object] = {"N": f"{N:,}", "K": f"{K:,}", "entropy": "on" if entropy else "off"}
        for row in group.to_dict("records"):
            fits = row["status"] == "ok"
            line[f"{row['method']} s"] = f"{row['seconds']:.3g}" if fits else row["status"]
            line[f"{row['method']} GiB"] = f"{row['peak_gib']:.3g}" if fits else ""
            line[f"{row['method']} TFLOP/s"] = f"{row['tflops']:.3g}" if fits else ""
        lines.append(line)
    return pd.DataFrame(lines)


def figure(rows: pd.DataFrame) -> Figure:
    """Time and memory against K, a column for each N; crosses at the upper edge: does not fit."""
    figures.theme()
    tokens = sorted(rows["N"].unique())
    drawn, axes = plt.subplots(
        2, len(tokens), figsize=(3.4 * len(tokens) + 1.2, 5.2), sharex=True, sharey="row", squeeze=False
    )
    colors = dict(zip(METHODS, figures.LINE_COLORS, strict=False))
    methods = [method for method in METHODS if method in set(rows["method"])]
    for column, N in enumerate(tokens):
        for line, (quantity, label) in enumerate(
            {"seconds": "time, s", "peak_gib": "peak memory above inputs, GiB"}.items()
        ):
            axis = axes[line, column]
            for method, entropy in itertools.product(methods, (True, False)):
                mine = rows[(rows["N"] == N) & (rows["method"] == method) & (rows["entropy"] == entropy)].sort_values(
                    "K"
                )
                fits = mine[mine["status"] == "ok"]
                axis.plot(fits["K"], fits[quantity], color=colors[method], ls="-" if entropy else ":", marker="o", ms=4)
                misfits = mine[mine["status"] == NO_ROOM]["K"] * 1.3 ** methods.index(method)  # side by side
                edge = {"transform": axis.get_xaxis_transform(), "marker": "x", "ls": ""}
                axis.plot(misfits, [0.95] * len(misfits), color=colors[method], **edge)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(sorted(rows["K"].unique()), [f"{K:,}" for K in sorted(rows["K"].unique())])
            axis.minorticks_off()
            axis.margins(x=0.12, y=0.12)
            if line == 0:
                axis.set_title(f"N = {N:,} tokens")
            else:
                axis.set_xlabel("K, codes")
            if column == 0:
                axis.set_ylabel(label)
    handles = [Line2D([], [], color=colors[method], marker="o", ms=4, label=method) for method in methods]
    handles += [
        Line2D([], [], color="0.3", ls=style, label=label) for style, label in (("-", "with entropy"), (":", "without"))
    ]
    handles.append(Line2D([], [], color="0.3", marker="x", ls="", label="does not fit"))
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return drawn


def write(rows: pd.DataFrame, publish: bool = False) -> Path:
    """The report, as `cells.write_report` says."""
    return cells.write_report(NAME, rows, table(rows), CAPTION, figure(rows), publish)


def known_rows() -> pd.DataFrame:
    """Rows of this machine's last benchmark, else of the published one.

    Raises:
        ConfigError: neither is there.
    """
    for folder in (cells.report_folder(NAME), cells.published_folder(NAME)):
        if (folder / "rows.csv").is_file():
            return pd.read_csv(folder / "rows.csv")
    raise ConfigError("no benchmark has been run; call python -m experiments bench index-backprop")
