"""The doors of the operators: arguments are checked and brought to one precision here, and a backend is picked."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist

from ibq.ops import tiled
from ibq.ops.chunked import nearest_by_chunks
from ibq.ops.dense import Result, dense, nearest_densely
from ibq.ops.operator import operator, require_finite
from ibq.ops.precision import coarse_center, full_float32

Backend = Literal["auto", "dense", "chunked", "triton"]


def index_backprop(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    *,
    entropy_temperature: float | None = 0.01,
    backend: Backend = "auto",
    matmul_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Result:
    """Quantize by index backpropagation (arXiv 2412.02692, algorithm 1).

    z_q = Ind C with Ind = onehot(argmax p) + p - sg(p) and p = softmax(z C^T); gradients equal autograd's through that formula (on chunks
    no probability counts as less than e^-60 of its row's greatest, in float64 e^-600). Everything but the factors of matrix products is
    float32 or, for float64 inputs, float64, whatever autocast says.

    Args:
        z_ND: features (N, D), floating, finite.
        codebook_KD: codes (K, D) on the same device, floating, finite.
        entropy_temperature: tau of the softmax whose entropies are returned, 1e-30 to 1e30; None leaves them out.
        backend: "dense" holds several (N, K) matrices; "chunked" (any device) and "triton" (CUDA) add memory of order N + K only. "auto" is
            Triton for bfloat16 products on CUDA, else chunks.
        matmul_dtype: type to which the factors of matrix products are rounded; their sums and all else stay float32. None: bfloat16 when
            both inputs are, else float32 (never TF32) or float64.
        group: processes over which the mean assignment is averaged, forward and backward; None keeps it local, as released. Then all of
            them call this with a temperature, and all use the codebook entropy in their loss or none does.

    Returns:
        z_q (N, D), whose value is exactly the gathered codes; indices (N,) int64, ties to the lower index; the mean over tokens of the
        entropy of p_tau, and the entropy -sum p log(p + 1e-5) of the mean of p_tau, in nats (None without a temperature). float32, or
        float64 when an input is. Differentiable once.

    Raises:
        ValueError: shapes, devices or types that do not fit, with both values; a backend that cannot run here, with the reason.
        NonFiniteInputError: a ValueError; features or codes hold NaN or infinity, on this or another process of the group. Finite ones
            whose logits overflow are not noticed here.
    """
    inputs_are_bfloat16 = z_ND.dtype == codebook_KD.dtype == torch.bfloat16
    z_ND, codebook_KD = _checked(z_ND, codebook_KD)
    if entropy_temperature is not None and not 1e-30 <= entropy_temperature <= 1e30:
        raise ValueError(f"entropy_temperature={entropy_temperature} must lie between 1e-30 and 1e30, or be None for no entropies")
    if matmul_dtype is None:
        matmul_dtype = torch.bfloat16 if inputs_are_bfloat16 else z_ND.dtype
    if matmul_dtype != z_ND.dtype and (matmul_dtype, z_ND.dtype) != (torch.bfloat16, torch.float32):
        raise ValueError(f"matmul_dtype={matmul_dtype} does not fit {z_ND.dtype}; use None, or torch.bfloat16 for float32")
    chosen = _choose(backend, z_ND.device, matmul_dtype)
    if chosen != "dense":
        return operator(z_ND, codebook_KD, entropy_temperature, group, matmul_dtype, chosen)
    shared = "" if group is None or entropy_temperature is None else group.group_name
    require_finite(shared, features=z_ND, codebook=codebook_KD)
    with full_float32(z_ND.device):
        return dense(z_ND, codebook_KD, entropy_temperature, group, matmul_dtype)


@torch.no_grad()
def nearest_code(z_ND: torch.Tensor, codebook_KD: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Index (N,) int64 of the Euclidean nearest code of each feature, ties to the lower index, not differentiable.

    Arguments and errors as in `index_backprop`; products are float32 or float64, "dense" holds the (N, K) distances, "auto" is "chunked".
    """
    z_ND, codebook_KD = _checked(z_ND, codebook_KD)
    require_finite(features=z_ND, codebook=codebook_KD)
    chosen = _choose(backend, z_ND.device, z_ND.dtype)
    if chosen == "dense":
        return nearest_densely(z_ND, codebook_KD)
    center_D = coarse_center(codebook_KD)
    with full_float32(z_ND.device), torch.cuda.device_of(z_ND):
        return {"chunked": nearest_by_chunks, "triton": tiled.nearest_by_tiles}[chosen](z_ND - center_D, codebook_KD - center_D)


def _checked(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = f"{tuple(z_ND.shape)} and codebook {tuple(codebook_KD.shape)}"
    if z_ND.dim() != 2 or codebook_KD.dim() != 2 or z_ND.shape[1] != codebook_KD.shape[1]:
        raise ValueError(f"features {shapes} do not fit; pass (N, D) and (K, D) with one D")
    if 0 in (*z_ND.shape, *codebook_KD.shape):
        raise ValueError(f"features {shapes} need at least one row each, of at least one dimension")
    if z_ND.device != codebook_KD.device:
        raise ValueError(f"features are on {z_ND.device}, the codebook on {codebook_KD.device}; move both to one device")
    if not (z_ND.is_floating_point() and codebook_KD.is_floating_point()):
        raise ValueError(f"features are {z_ND.dtype}, the codebook {codebook_KD.dtype}; both must be floating")
    dtype = torch.float64 if torch.float64 in (z_ND.dtype, codebook_KD.dtype) else torch.float32
    return z_ND.to(dtype), codebook_KD.to(dtype)


def _choose(backend: Backend, device: torch.device, matmul_dtype: torch.dtype) -> Literal["dense", "chunked", "triton"]:
    """The backend itself, or what "auto" stands for: a fixed rule, since one that timed its rivals would give other bits each time.

    On CPUs chunks win from some dozen tokens on (`python -m experiments bench index-backprop`). On CUDA the kernels are made for bfloat16;
    float32 they compute without tensor cores, where the library's products are expected to be faster (not measured).
    """
    if backend not in ("auto", "dense", "chunked", "triton"):
        raise ValueError(f"backend={backend!r} is not known; choose 'auto', 'dense', 'chunked' or 'triton'")
    if backend in ("dense", "chunked"):
        return backend
    if backend == "auto" and (device.type != "cuda" or matmul_dtype != torch.bfloat16):
        return "chunked"
    reason = tiled.why_unavailable(device)
    if reason is None and matmul_dtype == torch.float64:
        reason = "its kernels have no float64"
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {reason}; use backend='chunked'")
    _warn_once(f"{reason}; index_backprop falls back to backend='chunked', which is slower on a GPU")
    return "chunked"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
