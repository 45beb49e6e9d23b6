"""What several training processes share; every function is a no-op where torch.distributed is not initialised."""

from __future__ import annotations

import torch
import torch.distributed as dist


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_from_first(*tensors: torch.Tensor) -> None:
    """Replace each tensor by that of rank 0, in place: what was drawn at random is then equal on all processes."""
    if initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


def is_writer() -> bool:
    return rank() == 0


def any_rank(*flags: bool) -> tuple[bool, ...]:
    return flags


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
