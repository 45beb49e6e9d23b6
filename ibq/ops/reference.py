"""Index backpropagation as the paper writes it (arXiv 2412.02692, algorithm 1; docs/method.md section 3), left to
autograd: the oracle.

Holds several (N, K) matrices. Suffixes: N tokens, D code dimension, K codes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F

ENTROPY_EPS = 1e-5
"""Inside the logarithm of the codebook entropy, as released: H(p) = -sum p log(p + eps)."""

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def dense(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    temperature: float | None,
    group: dist.ProcessGroup | None,
    matmul_dtype: torch.dtype,
) -> Result:
    """z_q, indices, sample entropy, codebook entropy; see `ibq.ops.index_backprop`. bfloat16 rounds the factors and
    their gradients."""
    values_KD, dtype = codebook_KD.detach(), z_ND.dtype
    z_ND, codebook_KD = z_ND.to(matmul_dtype).to(dtype), codebook_KD.to(matmul_dtype).to(dtype)
    logits_NK = z_ND @ codebook_KD.T
    p_NK = logits_NK.softmax(1)
    indices_N = logits_NK.argmax(1)
    onehot_NK = F.one_hot(indices_N, codebook_KD.shape[0]).to(p_NK.dtype)
    soft_ND = (onehot_NK + (p_NK - p_NK.detach())) @ codebook_KD
    z_q_ND = values_KD[indices_N] + (soft_ND - soft_ND.detach())
    if temperature is None:
        return z_q_ND, indices_N, None, None

    log_p_NK = (logits_NK / temperature).log_softmax(1)
    p_NK = log_p_NK.exp()
    sample_entropy = -(p_NK * log_p_NK).sum(1).mean()
    mean_K = p_NK.mean(0)
    if group is not None:
        tokens = torch.tensor([float(len(z_ND))], device=z_ND.device, dtype=z_ND.dtype)
        sums_K1 = differentiable.all_reduce(torch.cat([p_NK.sum(0), tokens]), group=group)
        mean_K = sums_K1[:-1] / sums_K1[-1].detach()
    codebook_entropy = -(mean_K * (mean_K + ENTROPY_EPS).log()).sum()
    return z_q_ND, indices_N, sample_entropy, codebook_entropy


def nearest_densely(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Index (N,) of the Euclidean nearest code, from all (N, K) distances; see `ibq.ops.nearest_code`."""
    return torch.cdist(z_ND, codebook_KD, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
