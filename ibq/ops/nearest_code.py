"""Nearest code by Euclidean distance, exact and without the N x K matrix."""

from __future__ import annotations

import torch

from ibq.ops import triton
from ibq.ops.arguments import checked, choose_backend, require_finite
from ibq.ops.chunked import nearest_by_chunks
from ibq.ops.precision import coarse_center, full_float32
from ibq.ops.reference import nearest_densely
from ibq.schema import Backend


@torch.no_grad()
def nearest_code(z_ND: torch.Tensor, codebook_KD: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Index (N,) int64 of the Euclidean nearest code of each feature, ties to the lower index, not differentiable.

    Arguments and errors as in `index_backprop`; products are float32 or float64, "dense" holds the (N, K) distances,
    "auto" is "chunked".
    """
    z_ND, codebook_KD = checked(z_ND, codebook_KD)
    require_finite(features=z_ND, codebook=codebook_KD)
    chosen = choose_backend(backend, z_ND.device, z_ND.dtype)
    if chosen == "dense":
        return nearest_densely(z_ND, codebook_KD)
    center_D = coarse_center(codebook_KD)
    with full_float32(z_ND.device), torch.cuda.device_of(z_ND):
        return {"chunked": nearest_by_chunks, "triton": triton.nearest_by_tiles}[chosen](
            z_ND - center_D, codebook_KD - center_D
        )
