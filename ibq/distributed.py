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
