"""Index backpropagation over chunks of rows, on any device: the (N, K) matrix never exists whole, the backward pass
recomputes it.

`forward` and `backward` are one of the two ways in which `ibq.ops.index_backprop` computes; `ibq.ops.triton` is the
other. Only two buffers are as wide as the codebook; what is elementwise runs over blocks of their columns that stay in
the cache. Suffixes: N tokens, n tokens of one chunk, D code dimension, K codes, k codes of one block, S = 3 statistics
of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ibq.ops.precision import add_product, operand, product

ROWS = 512
"""Tokens of a chunk; with fewer the matrix products starve."""

BLOCK_BYTES = {"cpu": 2**20, "other": 2**26}
"""Size of one (n, k) block of elementwise work: what the cache of a core holds, or what a GPU needs to be busy."""

MEMORY_BYTES = 768 * 2**20
"""Largest size of the two (n, K) buffers together; the widest codebooks get shorter chunks."""


def chunks(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> Iterator[slice]:
    """The rows of each chunk, from the memory budget; all of them under torch.export, whose graph serves any number."""
    if torch.compiler.is_exporting():
        return iter([slice(None)])
    row_bytes = codebook_KD.shape[0] * max(4, codebook_KD.element_size())  # products of bfloat16 are float32
    rows = max(ROWS, BLOCK_BYTES["cpu" if z_ND.device.type == "cpu" else "other"] // row_bytes)
    rows = max(1, min(rows, MEMORY_BYTES // (2 * row_bytes), len(z_ND)))
    return (slice(start, min(start + rows, len(z_ND))) for start in range(0, len(z_ND), rows))


def blocks(matrix_nK: torch.Tensor) -> Iterator[slice]:
    """The columns of each block of elementwise work."""
    n, K = matrix_nK.shape
    columns = max(
        64, BLOCK_BYTES["cpu" if matrix_nK.device.type == "cpu" else "other"] // (n * matrix_nK.element_size())
    )
    return (slice(start, min(start + columns, K)) for start in range(0, K, columns))


def forward(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None, matmul_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices (N,), column sums (K,) of P_tau (empty without a temperature), and the statistics (S, N) of the rows.

    The statistics are the maximum, the log-sum-exp at tau below it, and the entropy at tau.
    """
    indices_N = torch.empty(len(z_ND), dtype=torch.int64, device=z_ND.device)
    statistics_SN = z_ND.new_zeros(3, len(z_ND))
    sum_K = z_ND.new_zeros(0 if temperature is None else len(codebook_KD))
    z_ND, codebook_KD = operand(z_ND, matmul_dtype), operand(codebook_KD, matmul_dtype)
    buffer_nK = None
    for chunk in chunks(z_ND, codebook_KD):
        logits_nK = buffer_nK = product(z_ND[chunk], codebook_KD.T, out=buffer_nK)
        indices_n = indices_N[chunk] = logits_nK.argmax(1)
        max_n1 = logits_nK.gather(1, indices_n[:, None])
        statistics_SN[0, chunk] = max_n1[:, 0]
        if temperature is None:
            continue
        sum_n, dot_n = logits_nK.new_zeros(2, len(indices_n))
        for block in blocks(logits_nK):
            scaled_nk = _floored((logits_nK[:, block] - max_n1).div_(temperature))
            p_nk = torch.exp(scaled_nk, out=logits_nK[:, block])  # not yet normalised
            sum_n += p_nk.sum(1)
            dot_n += scaled_nk.mul_(p_nk).sum(1)
        sum_K.addmv_(logits_nK.T, 1 / sum_n)
        log_sum_n = sum_n.log()
        statistics_SN[1:, chunk] = torch.stack([log_sum_n, log_sum_n - dot_n / sum_n])
    return indices_N, sum_K, statistics_SN


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
    """Add the gradients that pass through the logits to dz and dC.

    With P = softmax(S), S = z C^T, and P_tau = softmax(S / tau):
        dS = P (g C^T - rowsum(P g C^T)) + P_tau (-(log P_tau + H) sharpness + v - rowsum(P_tau v)) / tau
        dz = dS C,   dC = dS^T z.
    """
    z_ND, codebook_KD = operand(z_ND, matmul_dtype), operand(codebook_KD, matmul_dtype)
    g_ND = None if g_ND is None else operand(g_ND, matmul_dtype)
    logits_buffer_nK = buffer_nK = None
    for chunk in chunks(z_ND, codebook_KD):
        max_n1, log_sum_tau_n1, entropy_n1 = statistics_SN[:, chunk, None]
        logits_nK = logits_buffer_nK = product(z_ND[chunk], codebook_KD.T, out=logits_buffer_nK)
        gradient_nK = (
            torch.zeros_like(logits_nK) if g_ND is None else product(g_ND[chunk], codebook_KD.T, out=buffer_nK)
        )
        buffer_nK = gradient_nK

        # what each row subtracts
        sum_n1, dot_n1, mean_tau_n1 = logits_nK.new_zeros(3, len(logits_nK), 1)
        for block in blocks(logits_nK):
            below_nk = logits_nK[:, block].sub_(max_n1)
            if g_ND is not None:
                p_nk = _floored(below_nk.clone()).exp_()  # not yet normalised
                sum_n1 += p_nk.sum(1, keepdim=True)
                dot_n1 += p_nk.mul_(gradient_nK[:, block]).sum(1, keepdim=True)
            if v_K is not None and temperature is not None:
                mean_tau_n1 += _scaled(below_nk, log_sum_tau_n1, temperature).exp_() @ v_K[block, None]
        log_sum_n1, mean_n1 = sum_n1.log(), dot_n1 / sum_n1
        constant_n1 = -mean_tau_n1 if sharpness is None else -sharpness * entropy_n1 - mean_tau_n1

        for block in blocks(logits_nK):
            below_nk, gradient_nk = logits_nK[:, block], gradient_nK[:, block]
            if g_ND is not None:
                gradient_nk.sub_(mean_n1).mul_(_scaled(below_nk, log_sum_n1, 1.0).exp_())
            if temperature is not None and (sharpness is not None or v_K is not None):
                log_p_nk = _scaled(below_nk, log_sum_tau_n1, temperature)
                p_nk = log_p_nk.exp()
                toward_nk = (
                    constant_n1 if sharpness is None else torch.addcmul(constant_n1, log_p_nk, -sharpness, out=log_p_nk)
                )
                toward_nk = toward_nk if v_K is None else toward_nk + v_K[block]
                gradient_nk.addcmul_(p_nk, toward_nk, value=1 / temperature)
        gradient_nK = operand(gradient_nK, matmul_dtype)
        add_product(dz_ND[chunk], gradient_nK, codebook_KD)
        add_product(dC_KD, gradient_nK.T, z_ND[chunk])


def nearest_by_chunks(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Index (N,) of the Euclidean nearest code; see `ibq.ops.nearest_code`."""
    bias_K = -codebook_KD.square().sum(1) / 2
    return torch.cat([torch.addmm(bias_K, z_ND[chunk], codebook_KD.T).argmax(1) for chunk in chunks(z_ND, codebook_KD)])


def _scaled(below_nk: torch.Tensor, log_sum_n1: torch.Tensor, temperature: float) -> torch.Tensor:
    """log p, above a floor, of logits given below their row's maximum (which is subtracted first so that large ones
    keep differences)."""
    return _floored(torch.add(-log_sum_n1, below_nk, alpha=1 / temperature))


def _floored(exponent_nk: torch.Tensor) -> torch.Tensor:
    """The exponents, in place, none below -60 (in float64 -600): exp would give subnormal numbers, on which CPUs are
    ten times slower."""
    return exponent_nk.clamp_(min=-60.0 if exponent_nk.dtype == torch.float32 else -600.0)
