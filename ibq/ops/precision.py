"""In which precision matrix products are taken: what the operator was asked for, whatever the caller has switched
on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def full_float32(device: torch.device, convolutions: bool = False) -> Iterator[None]:
    """No autocast, no TF32 in products (and convolutions): at a temperature of 0.01 an error of a logit is multiplied
    by a hundred.

    Torch keeps the TF32 switch for the whole process; whatever the caller had chosen, by either of torch's ways, is
    restored.
    """
    switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    if convolutions:
        switches.append(torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    with outside_autocast(device):
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or its values in float32 where its type is narrower."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside; under torch.export nothing, as other runtimes know none and would have to be told of it."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(device.type, enabled=False)


def coarse_center(codebook_KD: torch.Tensor) -> torch.Tensor:
    """About the mean code (D,), to be subtracted before distances are taken through dot products: far from the origin
    squares would cancel.

    It is rounded to a quarter of the power of two below the greatest value, so that subtracting it is exact on coarse
    numbers: what is an exact tie stays one.
    """
    greatest = codebook_KD.abs().max().clamp_min(torch.finfo(codebook_KD.dtype).tiny)
    if torch.compiler.is_exporting():  # ONNX has no frexp
        step = torch.exp2(torch.log2(greatest).floor() + 1) / 8
    else:
        step = greatest / torch.frexp(greatest).mantissa / 8
    return (codebook_KD.mean(0) / step).round() * step


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
