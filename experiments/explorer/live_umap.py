"""Codes and features of a run as they are now, in two dimensions by UMAP: on demand, since it takes seconds, and the
first time more."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from experiments.analysis.projections import Projection, reduce
from experiments.explorer.trainer import LIVE
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory, write_tensors

LIVE_UMAP = "live-umap.safetensors"


def newest_tensors(run: RunDirectory) -> dict[str, torch.Tensor] | None:
    """Tensors of `live.safetensors`, `step` among it; of a run that was trained elsewhere its last snapshot, None where
    it has none."""
    if (run.path / LIVE).is_file():
        return load_file(run.path / LIVE)
    if not (steps := run.snapshot_steps()):
        return None
    return run.read_snapshot(steps[-1]) | {"step": torch.tensor(steps[-1])}


def project_live(folder: Path) -> None:
    """Project a run's newest codes and features and keep the result in its directory; ConfigError where it has none
    yet."""
    if (tensors := newest_tensors(RunDirectory(folder))) is None:
        raise ConfigError("it has no codes yet; press UMAP again when it has its first point")
    n_codes = len(tensors["codes"])
    xy = torch.from_numpy(reduce(torch.cat([tensors["codes"], tensors["features"]]).float().numpy(), "umap"))
    used = tensors["counts"][tensors["code_indices"]] > 0
    projected = {"codes": xy[:n_codes], "features": xy[n_codes:], "used": used, "step": tensors["step"]}
    write_tensors(folder / LIVE_UMAP, projected)


def read_live_umap(run: RunDirectory) -> Projection | None:
    """The newest UMAP of a run that was asked for, None where there is none."""
    if not (path := run.path / LIVE_UMAP).is_file():
        return None
    tensors = load_file(path)
    codes, features, used = (tensors[name].numpy() for name in ("codes", "features", "used"))
    return Projection("umap", int(tensors["step"]), codes, features, used)
