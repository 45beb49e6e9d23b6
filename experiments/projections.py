"""Codes and features of a run in two dimensions, computed once and kept with the run.

One projection holds both (at most 4,096 points, so neighbours are exact); UMAP with a fixed random_state, or PCA where the preset says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA

from experiments.study import Cell, unique_runs
from ibq.run_directory import RunDirectory, write_tensors

Method = Literal["umap", "pca"]


@dataclass(frozen=True)
class Projection:
    """Coordinates of codes (k, 2) and features (n, 2), and which of the codes were used by training tokens since the last snapshot (k,)."""

    method: Method
    step: int
    codes: np.ndarray
    features: np.ndarray
    used: np.ndarray


def project(run: RunDirectory, method: Method, compute: bool = True) -> Projection | None:
    """The last snapshot of a run, projected; from the cache where it was done before.

    None where there is no snapshot, or no cached projection and `compute` is off.
    """
    steps = run.snapshot_steps()
    if not steps:
        return None
    step = steps[-1]
    snapshot = run.read_snapshot(step)
    cached = run.path / "projections" / f"{method}-{step:08d}.safetensors"
    if cached.is_file():
        xy = load_file(cached)["xy"].numpy()
    elif not compute:
        return None
    else:
        points = torch.cat([snapshot["codes"], snapshot["features"]]).float().numpy()
        xy = _reduce(points, method)
        write_tensors(cached, {"xy": torch.from_numpy(np.ascontiguousarray(xy, dtype=np.float32))})
    k = len(snapshot["codes"])
    used = (snapshot["counts"][snapshot["code_indices"]] > 0).numpy()
    return Projection(method, step, xy[:k], xy[k:], used)


def project_all(cells: Iterable[Cell], method: Method, say: Callable[[str], None] = print) -> None:
    """Fill the cache for the finished runs that a map shows, in this one process: UMAP compiles for most of a minute, once."""
    mapped = [cell for cell in cells if cell.arm in cell.ablation.mapped]
    todo = [cell for cell in unique_runs(mapped) if cell.run.finished and cell.run.snapshot_steps()]
    todo = [c for c in todo if not (c.run.path / "projections" / f"{method}-{c.run.snapshot_steps()[-1]:08d}.safetensors").is_file()]
    for i, cell in enumerate(todo, 1):
        say(f"projection {i} of {len(todo)} ({method.upper()}): {cell.name}")
        project(cell.run, method)


def _reduce(points: np.ndarray, method: Method) -> np.ndarray:
    if method == "pca":
        return PCA(2, random_state=0).fit_transform(points)
    with warnings.catch_warnings():
        # umap-learn says that random_state costs it its threads, which is what repeatability costs
        warnings.filterwarnings("ignore", message="n_jobs value .* overridden to 1 by setting random_state")
        from umap import UMAP

        return UMAP(n_neighbors=15, min_dist=0.1, n_epochs=200, random_state=0).fit_transform(points)
