"""Cells of benchmarks: measured in processes of their own and kept, and where their reports lie."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from experiments.report import figures, tables
from experiments.study import ROOT
from ibq.distributed import device_name
from ibq.errors import ConfigError
from ibq.run_directory import source_commit, write_json, write_text


def folder(benchmark: str, device: torch.device, script: str, *packages: str) -> Path:
    """Folder of a benchmark's cells for this machine, its threads, torch and the code that is measured: a script
    of this folder and packages of the repository."""
    sources = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    code = [path.read_text(encoding="utf-8") for path in (*sources, Path(__file__).with_name(script))]
    of = {name: value for name, value in facts(device).items() if name != "commit"}
    fingerprint = hashlib.sha256(json.dumps([code, of, platform.node()]).encode()).hexdigest()[:12]
    return Path(os.environ.get("IBQ_RUNS") or ROOT / "runs") / "benchmarks" / benchmark / fingerprint


def facts(device: torch.device) -> dict[str, Any]:
    return {
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def cached(folder: Path, cell: dict[str, Any], module: str, name: str = "") -> dict[str, Any]:
    """The measurement of a cell that the folder holds, or else a new one by `python -m MODULE CELL`, written whole.

    Returns:
        what the process printed last, as JSON; or, where it failed, a status that says why, which is not kept: the next
        call tries again.
    """
    path = folder / f"{name or '_'.join(f'{key}{value}' for key, value in cell.items())}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    done = subprocess.run([sys.executable, "-m", module, json.dumps(cell)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        reason = (
            f"killed by signal {-done.returncode}"
            if done.returncode < 0
            else (done.stderr.strip().splitlines() or ["no word"])[-1]
        )
        return {"status": f"failed: {reason}"}
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def write_report(
    benchmark: str,
    rows: pd.DataFrame,
    table: pd.DataFrame,
    caption: str,
    figure: Figure,
    publish: bool,
    *,
    unpublished: str = "",
) -> Path:
    """Write rows.csv, the table and the figure into reports/benchmarks/, and with `publish` into reports/published/
    too, but for the file named `unpublished`; returns the former folder."""
    folder = report_folder(benchmark)
    write_text(folder / "rows.csv", rows.to_csv(index=False))
    tables.write(table, folder, "table", caption)
    figures.save(figure, folder, "figure")
    if publish:
        shutil.copytree(
            folder, published_folder(benchmark), dirs_exist_ok=True, ignore=shutil.ignore_patterns(unpublished)
        )
    return folder


def report_folder(benchmark: str) -> Path:
    return Path(os.environ.get("IBQ_REPORTS") or ROOT / "reports") / "benchmarks" / benchmark


def published_folder(benchmark: str) -> Path:
    return ROOT / "reports" / "published" / "benchmarks" / benchmark


def require(result: dict[str, Any], what: str) -> dict[str, Any]:
    """A measurement that all others depend on.

    Raises:
        ConfigError: it failed.
    """
    if str(result.get("status", "")).startswith("failed"):
        raise ConfigError(f"{what} failed: {str(result['status']).removeprefix('failed: ')}")
    return result
