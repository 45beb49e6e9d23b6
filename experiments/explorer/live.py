"""Newest tensors of a run, and their projection by UMAP on demand: it takes seconds, and the first time most of a
minute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from experiments.analysis.projections import Projection, reduce
from experiments.explorer.trainer import LIVE
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory, write_tensors

LIVE_UMAP = "live-umap.safetensors"


def load(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file, {} where it is absent, torn or something else."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


def newest_tensors(run: RunDirectory) -> tuple[dict[str, torch.Tensor], int]:
    """Tensors of `live.safetensors` and their step, or those of the newest whole snapshot if it is newer; ({}, 0) where
    there is neither."""
    live = load(run.path / LIVE)
    live_step = int(live["step"]) if "step" in live else -1
    for step in reversed(run.snapshot_steps()):
        if step <= live_step:
            break
        if tensors := load(run.snapshot_path(step)):
            return tensors, step
    return (live, live_step) if live_step >= 0 else ({}, 0)


def project_runs(folders: Sequence[str]) -> dict[str, str]:
    """Project the newest codes and features of runs, and keep the results in their directories.

    Returns:
        by folder, what was wrong in one sentence; "" where nothing was.
    """
    problems = {}
    for folder in folders:
        try:
            _project(RunDirectory(folder))
            problems[folder] = ""
        except ConfigError as error:
            problems[folder] = str(error)
        except Exception as error:  # whatever it is, a run removed meanwhile or a full disk, the others are projected
            problems[folder] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return problems


def _project(run: RunDirectory) -> None:
    tensors, step = newest_tensors(run)
    if not tensors:
        raise ConfigError("it has no codes yet; press UMAP again when it has its first point")
    n_codes = len(tensors["codes"])
    xy = torch.from_numpy(reduce(torch.cat([tensors["codes"], tensors["features"]]).float().numpy(), "umap"))
    used = tensors["counts"][tensors["code_indices"]] > 0
    projected = {"codes": xy[:n_codes], "features": xy[n_codes:], "used": used, "step": torch.tensor(step)}
    write_tensors(run.path / LIVE_UMAP, projected)


def read_live_umap(run: RunDirectory) -> Projection | None:
    """The newest UMAP of a run that was asked for, None where there is none."""
    tensors = load(run.path / LIVE_UMAP)
    if not tensors:
        return None
    codes, features, used = (tensors[name].numpy() for name in ("codes", "features", "used"))
    return Projection("umap", int(tensors["step"]), codes, features, used)
