"""Codes and features of a run in two dimensions, computed once and kept with the run.

One projection holds both (at most 4,096 points, so neighbours are exact); UMAP with a fixed random_state, or PCA where
the preset says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA

from experiments import home
from experiments.cells import Cell
from ibq.run_directory import RunDirectory, write_tensors

Method = Literal["umap", "pca"]
NEIGHBOURS = 15
"""Of a point, which UMAP keeps beside it."""


@dataclass(frozen=True)
class Projection:
    """Coordinates of codes (k, 2) and features (n, 2), and which of the codes were used by training tokens since the
    last snapshot (k,)."""

    method: Method
    step: int
    codes: np.ndarray
    features: np.ndarray
    used: np.ndarray


def moments(run: RunDirectory) -> list[int]:
    """Steps of a run's snapshots at which a map follows it: the first two, the middle one and the last."""
    steps = run.snapshot_steps()
    return sorted({steps[i] for i in (0, min(1, len(steps) - 1), len(steps) // 2, -1)}) if steps else []


def project(run: RunDirectory, method: Method, steps: list[int], compute: bool = True) -> list[Projection]:
    """Snapshots of a run, each projected by itself; from the cache where it was done before, and left out where it was
    not and `compute` is off."""
    projections = []
    for step in steps:
        cached = _cache(run, method, step)
        if not (compute or cached.is_file()):
            continue
        snapshot = run.read_snapshot(step)
        if cached.is_file():
            xy = load_file(cached)["xy"].numpy()
        else:
            xy = reduce(torch.cat([snapshot["codes"], snapshot["features"]]).float().numpy(), method)
            write_tensors(cached, {"xy": torch.from_numpy(np.ascontiguousarray(xy, dtype=np.float32))})
        k = len(snapshot["codes"])
        used = (snapshot["counts"][snapshot["code_indices"]] > 0).numpy()
        projections.append(Projection(method, step, xy[:k], xy[k:], used))
    return projections


def project_all(cells: Iterable[Cell], method: Method, say: Callable[[str], None] = print) -> None:
    """Fill the cache for the finished runs that a map shows, in this one process: UMAP compiles for most of a minute,
    once."""
    wanted: dict[Path, tuple[Cell, int]] = {}
    for cell in cells:
        followed, mapped = cell.arm.followed, cell.arm in cell.ablation.mapped
        if cell.run.finished and (followed or mapped):
            for step in moments(cell.run) if followed else cell.run.snapshot_steps()[-1:]:
                wanted[_cache(cell.run, method, step)] = (cell, step)
    missing = [each for path, each in wanted.items() if not path.is_file()]
    home.provide()
    todo = [(cell, step) for cell, step in missing if os.access(cell.run.path, os.W_OK)]
    if len(todo) < len(missing):
        say(f"{len(missing) - len(todo)} projections are left out, since their runs' folders cannot be written")
    for i, (cell, step) in enumerate(todo, 1):
        say(f"projection {i} of {len(todo)} ({method.upper()}): {cell.name} step {step}")
        project(cell.run, method, [step])


def _cache(run: RunDirectory, method: Method, step: int) -> Path:
    return run.path / "projections" / f"{method}-{step:08d}.safetensors"


def reduce(points: np.ndarray, method: Method) -> np.ndarray:
    """Points (n, D) in two dimensions, the same for the same points; what one-dimensional ones lack is 0.

    Points of a run that left the finite numbers have no place: NaN. Of a handful of others there is no map either.
    """
    known_n = np.isfinite(points).all(axis=1)
    if not known_n.all():
        plane = np.full((len(points), 2), np.nan)
        if known_n.sum() > NEIGHBOURS:
            plane[known_n] = reduce(points[known_n], method)
        return plane
    if method == "pca":
        # by the (D, D) covariance, which is quick enough for every redraw; it cancels in float32
        plane = PCA(min(2, points.shape[1]), svd_solver="covariance_eigh").fit_transform(points.astype(np.float64))
        return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    with warnings.catch_warnings():
        # umap-learn says that random_state costs it its threads, which is what repeatability costs
        warnings.filterwarnings("ignore", message="n_jobs value .* overridden to 1 by setting random_state")
        from umap import UMAP

        return UMAP(n_neighbors=NEIGHBOURS, min_dist=0.1, n_epochs=200, random_state=0).fit_transform(points)
