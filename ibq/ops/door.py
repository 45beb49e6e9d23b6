"""The doors of the operators: arguments are checked and brought to one precision here, and a backend is picked."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist

from ibq.ops.chunked import chunked, nearest_by_chunks
from ibq.ops.dense import Result, dense
from ibq.ops.precision import full_float32

Backend = Literal["auto", "dense", "chunked"]


def index_backprop(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    *,
    entropy_temperature: float | None = 0.01,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
) -> Result:
    """Quantize by index backpropagation (arXiv 2412.02692, algorithm 1).

    z_q = Ind C with Ind = onehot(argmax p) + p - sg(p) and p = softmax(z C^T); gradients equal autograd's through that formula. Computed in
    float32 or, for float64 inputs, float64, whatever autocast says.

    Args:
        z_ND: features (N, D), floating.
        codebook_KD: codes (K, D) on the same device.
        entropy_temperature: tau > 0 of the softmax whose entropies are returned; None leaves them out.
        backend: "dense" holds several (N, K) matrices; "chunked" adds memory of order N + K only. "auto" is "chunked".
        group: processes over which the mean assignment is averaged, forward and backward; None keeps it local, as released.

    Returns:
        z_q (N, D), whose value is exactly the gathered codes; indices (N,) int64, ties to the lower index; the mean over tokens of the
        entropy of p_tau, and the entropy -sum p log(p + 1e-5) of the mean of p_tau, in nats (None without a temperature).

    Raises:
        ValueError: shapes, devices or types that do not fit, with both values.
    """
    z_ND, codebook_KD = _checked(z_ND, codebook_KD)
    if entropy_temperature is not None and not entropy_temperature > 0:
        raise ValueError(f"entropy_temperature={entropy_temperature} must be above 0, or None for no entropies")
    if backend not in ("auto", "dense", "chunked"):
        raise ValueError(f"backend={backend!r} is not known; choose 'auto', 'dense' or 'chunked'")
    compute = dense if backend == "dense" else chunked
    with full_float32(z_ND.device):
        return compute(z_ND, codebook_KD, entropy_temperature, group)


@torch.no_grad()
def nearest_code(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Index (N,) int64 of the Euclidean nearest code of each feature, by chunks, not differentiable; arguments as in `index_backprop`."""
    z_ND, codebook_KD = _checked(z_ND, codebook_KD)
    with full_float32(z_ND.device):
        return nearest_by_chunks(z_ND, codebook_KD)


def _checked(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = f"{tuple(z_ND.shape)} and codebook {tuple(codebook_KD.shape)}"
    if z_ND.dim() != 2 or codebook_KD.dim() != 2 or z_ND.shape[1] != codebook_KD.shape[1]:
        raise ValueError(f"features {shapes} do not fit; pass (N, D) and (K, D) with one D")
    if not len(z_ND) or not len(codebook_KD):
        raise ValueError(f"features {shapes} need at least one row each")
    if z_ND.device != codebook_KD.device:
        raise ValueError(f"features are on {z_ND.device}, the codebook on {codebook_KD.device}; move both to one device")
    if not (z_ND.is_floating_point() and codebook_KD.is_floating_point()):
        raise ValueError(f"features are {z_ND.dtype}, the codebook {codebook_KD.dtype}; both must be floating")
    dtype = torch.float64 if torch.float64 in (z_ND.dtype, codebook_KD.dtype) else torch.float32
    return z_ND.to(dtype), codebook_KD.to(dtype)
