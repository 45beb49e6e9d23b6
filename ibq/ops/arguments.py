"""Arguments of the operators: shapes, types, finite values, and the choice of a backend."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ibq.errors import NonFiniteElsewhereError, NonFiniteInputError
from ibq.ops import triton
from ibq.schema import Backend


def checked(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = f"{tuple(z_ND.shape)} and codebook {tuple(codebook_KD.shape)}"
    if z_ND.dim() != 2 or codebook_KD.dim() != 2 or z_ND.shape[1] != codebook_KD.shape[1]:
        raise ValueError(f"features {shapes} do not fit; pass (N, D) and (K, D) with one D")
    if 0 in (*z_ND.shape, *codebook_KD.shape):
        raise ValueError(f"features {shapes} need at least one row each, of at least one dimension")
    if z_ND.device != codebook_KD.device:
        raise ValueError(
            f"features are on {z_ND.device}, the codebook on {codebook_KD.device}; move both to one device"
        )
    if not (z_ND.is_floating_point() and codebook_KD.is_floating_point()):
        raise ValueError(f"features are {z_ND.dtype}, the codebook {codebook_KD.dtype}; both must be floating")
    dtype = torch.float64 if torch.float64 in (z_ND.dtype, codebook_KD.dtype) else torch.float32
    return z_ND.to(dtype), codebook_KD.to(dtype)


def choose_backend(
    backend: Backend, device: torch.device, matmul_dtype: torch.dtype
) -> Literal["dense", "chunked", "triton"]:
    """The backend itself, or what "auto" stands for: a fixed rule, since one that timed its rivals would give other
    bits each time.

    On CPUs chunks win from some dozen tokens on (`python -m experiments bench index-backprop`). On CUDA the kernels are
    made for bfloat16; float32 they compute without tensor cores, where the library's products are expected to be faster
    (not measured).
    """
    if backend not in ("auto", "dense", "chunked", "triton"):
        raise ValueError(f"backend={backend!r} is not known; choose 'auto', 'dense', 'chunked' or 'triton'")
    if backend in ("dense", "chunked"):
        return backend
    if backend == "auto" and (device.type != "cuda" or matmul_dtype != torch.bfloat16):
        return "chunked"
    reason = triton.why_unavailable(device)
    if reason is None and matmul_dtype == torch.float64:
        reason = "its kernels have no float64"
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {reason}; use backend='chunked'")
    _warn_once(f"{reason}; index_backprop falls back to backend='chunked', which is slower on a GPU")
    return "chunked"


def require_finite(group: str = "", **tensors: torch.Tensor) -> None:
    """Refuse NaN and infinity by name: an argmax over them means nothing, and one such row poisons every code.

    Raises:
        NonFiniteInputError: how many values of which tensor; every process of the group raises, so that none waits for
            another. Under torch.export nothing is refused, as an exported graph cannot branch on values.
    """
    if torch.compiler.is_exporting():
        return
    bounds = torch.stack([bound for tensor in tensors.values() for bound in tensor.detach().aminmax()])
    finite = bounds.isfinite().all()
    if group:
        dist.all_reduce(finite_everywhere := finite.int(), op=dist.ReduceOp.MIN, group=resolve_group(group))
    else:
        finite_everywhere = finite
    if finite_everywhere:
        return
    for name, tensor in tensors.items():
        if bad := tensor.numel() - int(tensor.isfinite().sum()):
            raise NonFiniteInputError(
                f"{bad} of {tensor.numel()} values of {name} are NaN or infinite; lower the learning rate, or check "
                f"what went in"
            )
    raise NonFiniteElsewhereError(
        "another process has values that are NaN or infinite; lower the learning rate, or check what went in"
    )


def integers(what: str, values: torch.Tensor, size: int) -> torch.Tensor:
    """Indices of any integer type as int64.

    Raises:
        ValueError: they are no integers, or no tensor.
    """
    if not isinstance(values, torch.Tensor):
        raise ValueError(f"{what} are a {type(values).__name__}; pass a tensor, as torch.as_tensor makes it")
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ValueError(f"{what} of dtype {values.dtype} are not integers; pass integers in [0, {size})")
    return values.long()


def resolve_group(group: str) -> dist.ProcessGroup:
    return c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
