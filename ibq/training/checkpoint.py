"""Checkpoints: tensors in safetensors, the rest in a readable meta file that holds their hash; the one before is kept
as well."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ibq.errors import ConfigError
from ibq.run_directory import write_json, write_tensors
from ibq.training.sharding import part_like


class Checkpoint(NamedTuple):
    """Tensors and meta facts that a resume needs."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write `folder`/{state.safetensors, meta.json}; the one before stays as `folder`.previous.

    Args:
        folder: the checkpoint's directory.
        tensors: everything a resume needs, by flat names.
        meta: JSON facts (step, seconds, commit, ...).
    """
    fresh, previous = folder.with_suffix(".new"), folder.with_suffix(".previous")
    shutil.rmtree(fresh, ignore_errors=True)
    write_tensors(fresh / "state.safetensors", tensors)
    write_json(fresh / "meta.json", meta | {"sha256": _sha256(fresh / "state.safetensors")})
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
    os.rename(fresh, folder)


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a sentence for each that was found damaged on the way to it.

    `folder` comes first, then one that a kill kept from its place, then the one before; None where none is whole.
    """
    damaged: list[str] = []
    for candidate in (folder, folder.with_suffix(".new"), folder.with_suffix(".previous")):
        if not (candidate / "meta.json").is_file():
            if candidate == folder and candidate.is_dir():
                damaged.append(f"{candidate.name} is damaged (it has no meta.json)")
            continue
        try:
            meta: dict[str, Any] = json.loads((candidate / "meta.json").read_text())
            if meta["sha256"] != _sha256(candidate / "state.safetensors"):
                raise ValueError("its tensors are not those that were written")
            return Checkpoint(load_file(candidate / "state.safetensors"), meta), damaged
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            damaged.append(f"{candidate.name} is damaged ({' '.join(str(error).split())})")
    return None, damaged


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_checkpoint(folder: Path) -> None:
    for path in (folder, folder.with_suffix(".previous"), folder.with_suffix(".new")):
        shutil.rmtree(path, ignore_errors=True)


# The helpers of torch.distributed.checkpoint.state_dict do not serve here: they take a step with an optimizer that has
# no state yet, which spoils Adam's bias correction when a discriminator that has not begun is saved, and they give the
# moments of channels-last weights back in another layout than the weights', which fused Adam does not notice.


def flatten_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """Optimizer state by parameter name: `<prefix>.<name>.<slot>`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{prefix}.{names[p]}.{slot}": value for p, state in optimizer.state.items() for slot, value in state.items()
    }


def restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    prefix: str,
    idle: str | None = None,
) -> None:
    """Put `flatten_optimizer`'s tensors back; every parameter must have its slots there, but those whose names begin
    with `idle`, which have had no update.

    A slot takes the memory layout of its parameter: fused Adam walks both in storage order, so contiguous moments
    beside a channels-last weight would be paired with the wrong elements, in silence. Of a sharded parameter it takes
    this process's part.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        start = f"{prefix}.{names[parameter]}."
        slots = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        if not slots and idle is not None and names[parameter].startswith(idle):
            continue
        state[i] = {
            slot: torch.empty_like(parameter, dtype=value.dtype).copy_(part_like(value, parameter)).detach()
            if value.shape == parameter.shape
            else value
            for slot, value in slots.items()
        }
        if not state[i]:
            raise KeyError(f"the checkpoint lacks {start}*")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def part_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors under a prefix, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def require_version(meta: dict[str, Any], name: str, version: int) -> None:
    """ConfigError: the checkpoint is of another version of the code."""
    if meta[name] != version:
        found = f"{name}={meta[name]}, this code has {version}"
        raise ConfigError(f"the checkpoint was written with {found}; forget the run and train it again")


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of this process's random number generators, by their names in a checkpoint."""
    states = {"rng.cpu": torch.get_rng_state()}
    return states | ({"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_states(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:  # a run begun on a CPU may go on on a GPU
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
