"""Index backpropagation in tiles, by the Triton kernels of `ibq.ops.triton_kernels`: no row of logits exists whole
either.

The logits' gradient is written one panel of codes at a time, and the two large products dz = dS C and dC = dS^T z are
the library's.
Nothing is added in an order that could change: results are the same bits every time. Suffixes: N tokens, K codes, D
code dimension, P codes of a panel, X splits, S = 3 statistics of a row.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from ibq.ops.precision import add_product, operand

PANEL_BYTES = 256 * 2**20
"""Size of one panel of logit gradients, (N, P) of as many codes P as fit."""

_PROGRAMS = 1024  # enough to fill a GPU several times; loops are split until there are so many
_BLOCKS: dict[torch.dtype, dict[str, int]] = {  # fixed, not autotuned: another choice would give other bits
    torch.bfloat16: {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2},
}


def why_unavailable(device: torch.device) -> str | None:
    """The reason why these kernels cannot run on a device, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {device.type}, which Triton serves only in its interpreter (TRITON_INTERPRET=1)"
    return None


def forward(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None, matmul_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices (N,), column sums (K,) of P_tau and statistics (S, N) of the rows, as in `ibq.ops.chunked.forward`."""
    from ibq.ops import triton_kernels

    z_ND, codebook_KD = operand(z_ND, matmul_dtype), operand(codebook_KD, matmul_dtype)
    (N, D), K = z_ND.shape, len(codebook_KD)
    blocks, inverse_tau = _blocks(z_ND), 0.0 if temperature is None else 1 / temperature
    splits, per_split = _splits(K, blocks["BLOCK_K"], _cdiv(N, blocks["BLOCK_N"]))
    max_XN, sum_tau_XN, dot_tau_XN = torch.empty(3, splits, N, device=z_ND.device, dtype=torch.float32)
    index_XN = torch.empty(splits, N, device=z_ND.device, dtype=torch.int32)
    grid = (_cdiv(N, blocks["BLOCK_N"]), splits)
    triton_kernels.row_statistics[grid](
        z_ND, codebook_KD, max_XN, max_XN, index_XN, sum_tau_XN, dot_tau_XN, N, K, D, per_split, inverse_tau,
        BIAS=False, ENTROPY=temperature is not None, **blocks,
    )  # fmt: skip
    max_N, split_N = max_XN.max(0)
    indices_N = index_XN.gather(0, split_N[None])[0].long()
    if temperature is None:
        return indices_N, max_N.new_empty(0), torch.stack([max_N, torch.zeros_like(max_N), torch.zeros_like(max_N)])

    below_XN = (max_XN - max_N) * inverse_tau
    scale_XN = below_XN.exp()
    sum_tau_N = (sum_tau_XN * scale_XN).sum(0)
    dot_tau_N = ((dot_tau_XN + below_XN * sum_tau_XN).mul_(scale_XN)).sum(0)
    log_sum_tau_N = sum_tau_N.log()
    entropy_N = log_sum_tau_N - dot_tau_N / sum_tau_N

    splits, per_split = _splits(N, blocks["BLOCK_N"], _cdiv(K, blocks["BLOCK_K"]))
    sum_XK = torch.empty(splits, K, device=z_ND.device, dtype=torch.float32)
    triton_kernels.assignment_sums[(_cdiv(K, blocks["BLOCK_K"]), splits)](
        z_ND, codebook_KD, max_N, log_sum_tau_N, sum_XK, N, K, D, per_split, inverse_tau, **blocks
    )
    return indices_N, sum_XK.sum(0), torch.stack([max_N, log_sum_tau_N, entropy_N])


def backward(
    dz_ND: torch.Tensor,
    dC_KD: torch.Tensor,
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    g_ND: torch.Tensor | None,
    sharpness: torch.Tensor | None,
    v_K: torch.Tensor | None,
    statistics_SN: torch.Tensor,
    temperature: float | None,
    matmul_dtype: torch.dtype,
) -> None:
    """Add the gradients that pass through the logits to dz and dC; the formula stands at `ibq.ops.chunked.backward`."""
    from ibq.ops import triton_kernels

    z_ND, codebook_KD = operand(z_ND, matmul_dtype), operand(codebook_KD, matmul_dtype)
    (N, D), K = z_ND.shape, len(codebook_KD)
    blocks, inverse_tau = _blocks(z_ND), 0.0 if temperature is None else 1 / temperature
    max_N, log_sum_tau_N, entropy_N = statistics_SN
    codes, sharpen, spread = g_ND is not None, sharpness is not None, v_K is not None
    g_ND = (
        z_ND if g_ND is None else operand(g_ND, matmul_dtype)
    )  # an argument that a kernel ignores still has to be a tensor
    v_K = max_N if v_K is None else v_K
    sharpness = max_N if sharpness is None else sharpness

    splits, per_split = _splits(K, blocks["BLOCK_K"], _cdiv(N, blocks["BLOCK_N"]))
    sum_XN, dot_XN, mean_tau_XN = torch.zeros(3, splits, N, device=z_ND.device, dtype=torch.float32)
    if codes or spread:
        triton_kernels.row_means[(_cdiv(N, blocks["BLOCK_N"]), splits)](
            z_ND, codebook_KD, g_ND, v_K, max_N, log_sum_tau_N, sum_XN, dot_XN, mean_tau_XN, N, K, D, per_split,
            inverse_tau,
            CODES=codes, SPREAD=spread, **blocks,
        )  # fmt: skip
    sum_N, dot_N, mean_tau_N = sum_XN.sum(0), dot_XN.sum(0), mean_tau_XN.sum(0)
    log_sum_N, mean_N = sum_N.log(), dot_N / sum_N

    width = panel_width(N, K, z_ND.element_size(), blocks["BLOCK_K"])
    for first in range(0, K, width):
        panel = slice(first, min(first + width, K))
        dS_NP = torch.empty(N, panel.stop - first, device=z_ND.device, dtype=z_ND.dtype)
        grid = (_cdiv(N, blocks["BLOCK_N"]), _cdiv(dS_NP.shape[1], blocks["BLOCK_K"]))
        triton_kernels.logit_gradients[grid](
            z_ND, codebook_KD, g_ND, v_K, max_N, log_sum_N, log_sum_tau_N, mean_N, mean_tau_N, entropy_N, sharpness,
            dS_NP,
            N, K, D, first, dS_NP.shape[1], inverse_tau, CODES=codes, SHARPEN=sharpen, SPREAD=spread, **blocks,
        )  # fmt: skip
        dS_NP = operand(dS_NP, matmul_dtype)
        add_product(dz_ND, dS_NP, codebook_KD[panel])
        add_product(dC_KD[panel], dS_NP.T, z_ND)


def panel_width(N: int, K: int, element_size: int, block: int) -> int:
    """Codes of a panel: as many whole blocks as fit, so that its rows stay aligned for the large products; at least
    one."""
    return min(K, block * max(1, PANEL_BYTES // (N * element_size * block)))


def nearest_by_tiles(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Index (N,) of the Euclidean nearest code, by the kernel of the forward pass; see `ibq.ops.nearest_code`."""
    from ibq.ops import triton_kernels

    bias_K = -codebook_KD.square().sum(1) / 2
    z_ND, codebook_KD = z_ND.contiguous(), codebook_KD.contiguous()
    (N, D), K = z_ND.shape, len(codebook_KD)
    blocks = _blocks(z_ND)
    splits, per_split = _splits(K, blocks["BLOCK_K"], _cdiv(N, blocks["BLOCK_N"]))
    max_XN = torch.empty(splits, N, device=z_ND.device, dtype=torch.float32)
    index_XN = torch.empty(splits, N, device=z_ND.device, dtype=torch.int32)
    triton_kernels.row_statistics[(_cdiv(N, blocks["BLOCK_N"]), splits)](
        z_ND, codebook_KD, bias_K, max_XN, index_XN, max_XN, max_XN, N, K, D, per_split, 0.0,
        BIAS=True, ENTROPY=False, **blocks,
    )  # fmt: skip
    return index_XN.gather(0, max_XN.max(0).indices[None])[0].long()


def _blocks(z_ND: torch.Tensor) -> dict[str, Any]:
    return _BLOCKS[z_ND.dtype] | {"enable_fp_fusion": True}  # said aloud, or Triton warns that its default will change


def _splits(size: int, block: int, programs: int) -> tuple[int, int]:
    """Number of programs that share a loop over `size`, and the share of each: whole blocks, and enough programs to
    fill a GPU."""
    blocks = _cdiv(size, block)
    per_split = _cdiv(blocks, min(blocks, _cdiv(_PROGRAMS, programs))) * block
    return _cdiv(size, per_split), per_split


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
