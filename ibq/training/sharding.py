"""FSDP2: networks of which each process holds a part of every layer, and their tensors (DTensor) put together and taken
apart again.

What is whole already passes through every function as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ibq.distributed import is_writer, world_size


def shard(network: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Leave this process its part of every parameter; a layer is gathered while it computes, what lies outside the
    layers for a whole step.

    All processes have to hold the same values. Gradients become means over processes. To be called before the optimizer
    is made.

    Args:
        network: on the device; its `forward` has to be called for it to be gathered.
        layers: parts of it, whose `forward` is called.
        device: its type decides how the processes talk.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # half a second, for those who shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The parts of all processes together, without gradient; a collective where there are parts."""
    detached = tensor.detach()
    return detached.full_tensor() if is_sharded(detached) else detached  # type: ignore[attr-defined]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor the part that this process holds of `like`, sharded as that is; all processes have the same
    value, none is sent."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def gather_for_writer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, on the CPU where they were in parts, for rank 0, and nothing for the others; a collective.

    One tensor is gathered at a time, so that no device needs memory for all of them.
    """
    gathered = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if is_writer():
            gathered[name] = together.cpu() if is_sharded(tensor) else together
    return gathered
