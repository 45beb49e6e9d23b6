"""Triton kernels of index backpropagation: tiles of logits that live in registers and are recomputed wherever they are
needed.

Every kernel computes a (BLOCK_N, BLOCK_K) tile of logits S = z C^T, or of their gradients dS = g C^T, and reduces it at
once; P = softmax(S), P_tau = softmax(S / tau). No kernel uses atomics, so equal inputs give equal bits; tails are
masked, no size has to be a multiple of anything, and no dimension is too large. Suffixes: N tokens, K codes, D code
dimension, X splits of a loop over programs, P codes of one panel.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _products(a_ptr, b_ptr, n_N, k_K, N, K, D, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot products of rows n of a (N, D) and rows k of b (K, D), in float32: never TF32."""
    tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for d in range(0, D, BLOCK_D):
        d_D = d + tl.arange(0, BLOCK_D)
        a = tl.load(
            a_ptr + n_N[:, None].to(tl.int64) * D + d_D[None, :],
            mask=(n_N[:, None] < N) & (d_D[None, :] < D),
            other=0.0,
        )
        b = tl.load(
            b_ptr + k_K[None, :].to(tl.int64) * D + d_D[:, None],
            mask=(k_K[None, :] < K) & (d_D[:, None] < D),
            other=0.0,
        )
        tile = tl.dot(a, b, tile, input_precision="ieee")
    return tile


@triton.jit
def row_statistics(
    z_ptr, codebook_ptr, bias_ptr, max_ptr, index_ptr, sum_tau_ptr, dot_tau_ptr, N, K, D, per_split, inverse_tau,
    BIAS: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each row over one split of the codes: maximum and its lowest index; with ENTROPY the sums of e = exp((s - max) /
    tau) and of e log e.

    With BIAS a number (K,) is added to each code's logit, which makes the maximum that of any distance.
    """
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    best_N = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index_N = tl.zeros((BLOCK_N,), tl.int32)
    sum_tau_N = tl.zeros((BLOCK_N,), tl.float32)
    dot_tau_N = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(split * per_split, min((split + 1) * per_split, K), BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        inside = (k_K < K)[None, :]
        s = _products(z_ptr, codebook_ptr, n_N, k_K, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        if BIAS:
            s += tl.load(bias_ptr + k_K, mask=k_K < K, other=0.0)[None, :]
        s = tl.where(inside, s, float("-inf"))
        tile_best_N, tile_index_N = tl.max(s, 1, return_indices=True, return_indices_tie_break_left=True)
        index_N = tl.where(tile_best_N > best_N, k + tile_index_N, index_N)
        new_best_N = tl.maximum(best_N, tile_best_N)
        if ENTROPY:
            below_N = (
                tl.where(best_N == float("-inf"), 0.0, best_N - new_best_N) * inverse_tau
            )  # the sums of no tile yet are 0
            s = tl.where(inside, (s - new_best_N[:, None]) * inverse_tau, 0.0)
            e = tl.where(inside, tl.exp(s), 0.0)
            dot_tau_N = (dot_tau_N + below_N * sum_tau_N) * tl.exp(below_N) + tl.sum(e * s, 1)
            sum_tau_N = sum_tau_N * tl.exp(below_N) + tl.sum(e, 1)
        best_N = new_best_N
    out_N = split.to(tl.int64) * N + n_N
    tl.store(max_ptr + out_N, best_N, mask=n_N < N)
    tl.store(index_ptr + out_N, index_N, mask=n_N < N)
    if ENTROPY:
        tl.store(sum_tau_ptr + out_N, sum_tau_N, mask=n_N < N)
        tl.store(dot_tau_ptr + out_N, dot_tau_N, mask=n_N < N)


@triton.jit
def assignment_sums(
    z_ptr, codebook_ptr, max_ptr, log_sum_tau_ptr, sum_ptr, N, K, D, per_split, inverse_tau,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Column sums of P_tau over one split of the tokens."""
    k_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    sum_K = tl.zeros((BLOCK_K,), tl.float32)
    for n in range(split * per_split, min((split + 1) * per_split, N), BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        max_N = tl.load(max_ptr + n_N, mask=n_N < N, other=0.0)
        log_sum_tau_N = tl.load(
            log_sum_tau_ptr + n_N, mask=n_N < N, other=float("inf")
        )  # rows beyond N get probability 0
        s = _products(z_ptr, codebook_ptr, n_N, k_K, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        sum_K += tl.sum(tl.exp((s - max_N[:, None]) * inverse_tau - log_sum_tau_N[:, None]), 0)
    tl.store(sum_ptr + split.to(tl.int64) * K + k_K, sum_K, mask=k_K < K)


@triton.jit
def row_means(
    z_ptr, codebook_ptr, g_ptr, v_ptr, max_ptr, log_sum_tau_ptr, sum_ptr, dot_ptr, mean_tau_ptr, N, K, D, per_split,
    inverse_tau,
    CODES: tl.constexpr, SPREAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row sums that the softmax backward passes subtract, over one split of the codes.

    rowsum(P_tau v) if SPREAD; if CODES the sums of e = exp(s - max) and of e dS, whose quotient is rowsum(P dS).
    """
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    max_N = tl.load(max_ptr + n_N, mask=n_N < N, other=0.0)
    sum_N = tl.zeros((BLOCK_N,), tl.float32)
    dot_N = tl.zeros((BLOCK_N,), tl.float32)
    mean_tau_N = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(split * per_split, min((split + 1) * per_split, K), BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        inside = (k_K < K)[None, :]
        s = _products(z_ptr, codebook_ptr, n_N, k_K, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        s = tl.where(inside, s - max_N[:, None], float("-inf"))
        if CODES:
            ds = _products(g_ptr, codebook_ptr, n_N, k_K, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
            e = tl.exp(s)
            sum_N += tl.sum(e, 1)
            dot_N += tl.sum(e * ds, 1)
        if SPREAD:
            log_sum_tau_N = tl.load(log_sum_tau_ptr + n_N, mask=n_N < N, other=0.0)
            v_K = tl.load(v_ptr + k_K, mask=k_K < K, other=0.0)
            mean_tau_N += tl.sum(tl.exp(s * inverse_tau - log_sum_tau_N[:, None]) * v_K[None, :], 1)
    out_N = split.to(tl.int64) * N + n_N
    if CODES:
        tl.store(sum_ptr + out_N, sum_N, mask=n_N < N)
        tl.store(dot_ptr + out_N, dot_N, mask=n_N < N)
    if SPREAD:
        tl.store(mean_tau_ptr + out_N, mean_tau_N, mask=n_N < N)


@triton.jit
def logit_gradients(
    z_ptr, codebook_ptr, g_ptr, v_ptr, max_ptr, log_sum_ptr, log_sum_tau_ptr, mean_ptr, mean_tau_ptr, entropy_ptr,
    sharpness_ptr,
    out_ptr, N, K, D, first, width, inverse_tau,
    CODES: tl.constexpr, SHARPEN: tl.constexpr, SPREAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of a panel, codes first to first + width, stored as (N, width).

    P (dS - mean) if CODES, plus P_tau / tau times (a + v - mean_tau), where a = -(log P_tau + entropy) sharpness if
    SHARPEN, v if SPREAD.
    """
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_P = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_K = first + p_P
    rows, end = n_N < N, min(K, first + width)
    max_N = tl.load(max_ptr + n_N, mask=rows, other=0.0)
    s = _products(z_ptr, codebook_ptr, n_N, k_K, N, end, D, BLOCK_N, BLOCK_K, BLOCK_D) - max_N[:, None]
    gradient = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if CODES:
        log_sum_N = tl.load(log_sum_ptr + n_N, mask=rows, other=0.0)
        mean_N = tl.load(mean_ptr + n_N, mask=rows, other=0.0)
        ds = _products(g_ptr, codebook_ptr, n_N, k_K, N, end, D, BLOCK_N, BLOCK_K, BLOCK_D)
        gradient = tl.exp(s - log_sum_N[:, None]) * (ds - mean_N[:, None])
    if SHARPEN or SPREAD:
        log_sum_tau_N = tl.load(log_sum_tau_ptr + n_N, mask=rows, other=0.0)
        log_p = s * inverse_tau - log_sum_tau_N[:, None]
        toward = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if SHARPEN:
            entropy_N = tl.load(entropy_ptr + n_N, mask=rows, other=0.0)
            toward -= (log_p + entropy_N[:, None]) * tl.load(sharpness_ptr)
        if SPREAD:
            mean_tau_N = tl.load(mean_tau_ptr + n_N, mask=rows, other=0.0)
            toward += tl.load(v_ptr + k_K, mask=k_K < end, other=0.0)[None, :] - mean_tau_N[:, None]
        gradient += tl.exp(log_p) * toward * inverse_tau
    out = out_ptr + n_N[:, None].to(tl.int64) * width + p_P[None, :]
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=rows[:, None] & (p_P < width)[None, :])
