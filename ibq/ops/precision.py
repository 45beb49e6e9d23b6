"""In which precision matrix products are taken: what the operator was asked for, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32: at a temperature of 0.01 an error of a logit is multiplied by a hundred."""
    with torch.autocast(device.type, enabled=False):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def operand(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous factor of `product`, rounded to dtype.

    CPUs have no product of bfloat16 that keeps its float32 sum: there only the values are rounded.
    """
    rounded = tensor.to(dtype).contiguous()
    return rounded.float() if dtype == torch.bfloat16 and tensor.device.type == "cpu" else rounded


def add_product(sum: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b of two operands to `sum`, in place."""
    if a.dtype == torch.bfloat16:
        sum += product(a, b)
    else:
        sum.addmm_(a, b)


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b of two operands, in the first rows of `out` if given; bfloat16 ones give their float32 sum."""
    out = None if out is None else out[: len(a)]
    return torch.mm(a, b, out_dtype=torch.float32, out=out) if a.dtype == torch.bfloat16 else torch.mm(a, b, out=out)
