"""Helpers for the tests of the operators: the formula of docs/method.md section 3 by a one-hot matrix and plain
autograd, inputs, losses, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from ibq.ops import chunked, index_backprop

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Operator = Callable[[torch.Tensor, torch.Tensor, float | None], Outputs]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Device of the Triton kernels: a GPU, else the CPU with Triton's interpreter."""


def textbook(z_ND: torch.Tensor, codebook_KD: torch.Tensor, tau: float | None) -> Outputs:
    logits_NK = z_ND @ codebook_KD.T
    p_NK = logits_NK.exp() / logits_NK.exp().sum(1, keepdim=True)
    indices_N = p_NK.max(1).indices
    onehot_NK = torch.zeros_like(p_NK).scatter_(1, indices_N[:, None], 1.0)
    z_q_ND = (onehot_NK + p_NK - p_NK.detach()) @ codebook_KD
    if tau is None:
        return z_q_ND, indices_N, None, None
    log_p_NK = logits_NK / tau - (logits_NK / tau).logsumexp(1, keepdim=True)
    mean_K = log_p_NK.exp().mean(0)
    return z_q_ND, indices_N, -(log_p_NK.exp() * log_p_NK).sum(1).mean(), -(mean_K * (mean_K + 1e-5).log()).sum()


def by(backend: str, matmul_dtype: torch.dtype | None = None) -> Operator:
    def operator(z_ND: torch.Tensor, codebook_KD: torch.Tensor, tau: float | None) -> Outputs:
        return index_backprop(z_ND, codebook_KD, entropy_temperature=tau, backend=backend, matmul_dtype=matmul_dtype)

    return operator


@contextmanager
def sizes_of(rows: int, columns: int) -> Iterator[None]:
    """Chunks of so many rows, elementwise work in blocks of so many columns."""

    def slices(size: int, step: int) -> list[slice]:
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    with (
        mock.patch.object(chunked, "chunks", lambda z_ND, codebook_KD: slices(len(z_ND), rows)),
        mock.patch.object(chunked, "blocks", lambda matrix_nK: slices(matrix_nK.shape[1], columns)),
    ):
        yield


def inputs(
    N: int, K: int, D: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    return (scale * torch.randn(N, D, dtype=dtype)).requires_grad_(), (
        scale * torch.randn(K, D, dtype=dtype)
    ).requires_grad_()


def scalar(outputs: Outputs, parts: str, weight_ND: torch.Tensor) -> torch.Tensor:
    z_q_ND, _, sample_entropy, codebook_entropy = outputs
    loss = torch.zeros((), dtype=z_q_ND.dtype, device=z_q_ND.device)
    if "z_q" in parts:
        loss = loss + (weight_ND * z_q_ND).sum()
    if "sample" in parts:
        loss = loss + 0.7 * sample_entropy
    if "codebook" in parts:
        loss = loss - 1.3 * codebook_entropy
    return loss


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm())
