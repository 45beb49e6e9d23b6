"""Index backpropagation over chunks of rows, on any device: the (N, K) matrix never exists whole, the backward pass recomputes it.

With P = softmax(z C^T), g the gradient of z_q and v the gradient of the codebook entropy in the mean assignment, per row (PAPER section 3)
    dlogits = P (g C^T - rowsum(P g C^T)) + P_tau (-(log P_tau + H) g_H / N + v - rowsum(P_tau v)) / tau
    dz = dlogits C,   dC = dlogits^T z + onehot^T g.

Suffixes: N tokens, n tokens of one chunk, D code dimension, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ibq.ops.dense import ENTROPY_EPS, Result
from ibq.ops.precision import full_float32

CHUNK_BYTES = {"cpu": 2 * 2**20, "other": 512 * 2**20}
"""What the (n, K) buffers of one chunk may hold together: the cache of a core, or what a GPU needs to be busy."""

_BUFFERS = 5  # (n, K) tensors alive at once in the backward pass, the widest place
_FEWEST_ROWS = 64  # below this the matrix products starve, whatever K is


def rows_per_chunk(codebook_KD: torch.Tensor) -> int:
    budget = CHUNK_BYTES["cpu" if codebook_KD.device.type == "cpu" else "other"]
    return max(_FEWEST_ROWS, budget // (_BUFFERS * codebook_KD.shape[0] * codebook_KD.element_size()))


def chunked(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None, group: dist.ProcessGroup | None, rows: int | None = None
) -> Result:
    """z_q, indices, sample entropy, codebook entropy; see `ibq.ops.index_backprop`. `rows` overrides the tokens of a chunk."""
    result: Result = _IndexBackprop.apply(z_ND, codebook_KD, temperature, group, rows or rows_per_chunk(codebook_KD))
    return result


def nearest_by_chunks(z_ND: torch.Tensor, codebook_KD: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Index (N,) of the Euclidean nearest code; see `ibq.ops.nearest_code`."""
    center_D = codebook_KD.mean(0)  # far from the origin the squares would cancel
    codebook_KD = codebook_KD - center_D
    minus_norm_K = -codebook_KD.square().sum(1)
    chunks = z_ND.split(rows or rows_per_chunk(codebook_KD))
    scores = (torch.addmm(minus_norm_K, z_nD - center_D, codebook_KD.T, alpha=2) for z_nD in chunks)
    return torch.cat([score_nK.max(1).indices for score_nK in scores])


class _IndexBackprop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None, group: dist.ProcessGroup | None, rows: int
    ) -> Result:
        N, K = len(z_ND), len(codebook_KD)
        indices_N = torch.empty(N, dtype=torch.int64, device=z_ND.device)
        mean_K = codebook_KD.new_zeros(K)
        sample_entropy = z_ND.new_zeros(())
        for start in range(0, N, rows):
            logits_nK = z_ND[start : start + rows] @ codebook_KD.T
            indices_N[start : start + rows] = logits_nK.max(1).indices
            if temperature is not None:
                _, p_nK, entropy_n1 = _at_temperature(logits_nK, temperature)
                mean_K += p_nK.sum(0)
                sample_entropy += entropy_n1.sum() / N

        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices_N)
        ctx.temperature, ctx.group, ctx.rows = temperature, group, rows
        z_q_ND = codebook_KD[indices_N]
        if temperature is None:
            ctx.tokens = N
            ctx.save_for_backward(z_ND, codebook_KD, indices_N, mean_K)
            return z_q_ND, indices_N, None, None
        tokens = torch.tensor(float(N), device=z_ND.device)
        if group is not None:
            dist.all_reduce(mean_K, group=group)
            dist.all_reduce(tokens, group=group)
        ctx.tokens = int(tokens)
        mean_K /= ctx.tokens
        ctx.save_for_backward(z_ND, codebook_KD, indices_N, mean_K)
        return z_q_ND, indices_N, sample_entropy, -(mean_K * (mean_K + ENTROPY_EPS).log()).sum()

    @staticmethod
    def backward(
        ctx: Any, g_ND: torch.Tensor | None, _: None, g_sample: torch.Tensor | None, g_codebook: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("index_backprop has no second derivative; call backward without create_graph, or use backend='dense'")
        z_ND, codebook_KD, indices_N, mean_K = ctx.saved_tensors
        dz_ND, dC_KD = torch.zeros_like(z_ND), torch.zeros_like(codebook_KD)
        v_K = None
        if g_codebook is not None:
            if ctx.group is not None:  # every rank's loss holds the shared mean, so every rank's gradient reaches this rank's tokens
                g_codebook = g_codebook.clone()
                dist.all_reduce(g_codebook, group=ctx.group)
            v_K = -((mean_K + ENTROPY_EPS).log() + mean_K / (mean_K + ENTROPY_EPS)) * g_codebook / ctx.tokens

        with full_float32(z_ND.device):
            for start in range(0, len(z_ND), ctx.rows):
                chunk = slice(start, start + ctx.rows)
                logits_nK = z_ND[chunk] @ codebook_KD.T
                dlogits_nK = torch.zeros_like(logits_nK)
                if g_ND is not None:
                    ds_nK = g_ND[chunk] @ codebook_KD.T
                    dlogits_nK = _softmax_backward(_softmax(logits_nK, 1.0)[0], ds_nK)
                if g_sample is not None or v_K is not None:
                    log_p_nK, p_nK, entropy_n1 = _at_temperature(logits_nK, ctx.temperature)
                    if g_sample is not None:
                        log_p_nK = log_p_nK.add_(entropy_n1).mul_(p_nK).mul_(-g_sample / (len(z_ND) * ctx.temperature))
                        dlogits_nK += log_p_nK
                    if v_K is not None:
                        dlogits_nK += _softmax_backward(p_nK, v_K.expand_as(p_nK) / ctx.temperature)
                dz_ND[chunk] = dlogits_nK @ codebook_KD
                dC_KD.addmm_(dlogits_nK.T, z_ND[chunk])
        if g_ND is not None:
            dC_KD.index_add_(0, indices_N, g_ND)
        return dz_ND, dC_KD, None, None, None


def _softmax(logits_nK: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax at a temperature and the scaled logits, 0 at each row's maximum; new tensors.

    The row maximum goes before the division, so that large logits keep their differences. Scaled logits stop at a floor: the probabilities
    below it are 1e-26 (in float64 1e-260) of the greatest one, and would become subnormal numbers, on which CPUs are ten times slower.
    """
    floor = -60.0 if logits_nK.dtype == torch.float32 else -600.0
    scaled_nK = (logits_nK - logits_nK.amax(1, keepdim=True)).div_(temperature).clamp_(min=floor)
    return scaled_nK.softmax(1), scaled_nK


def _at_temperature(logits_nK: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, p and the row entropies (n, 1). At the maximum, where the scaled logit is 0, log p is minus the log-sum-exp."""
    p_nK, scaled_nK = _softmax(logits_nK, temperature)
    log_p_nK = scaled_nK.add_(p_nK.amax(1, keepdim=True).log_())
    return log_p_nK, p_nK, -(p_nK * log_p_nK).sum(1, keepdim=True)


def _softmax_backward(p_nK: torch.Tensor, grad_nK: torch.Tensor) -> torch.Tensor:
    return p_nK * (grad_nK - (p_nK * grad_nK).sum(1, keepdim=True))
