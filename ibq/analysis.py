"""What a codebook's gradient and geometry say: gradient reach, quantization error, norms. Suffixes: N tokens, K codes, D code dimension."""

from __future__ import annotations

import math

import torch

ADAM_EPS = 1e-8


@torch.no_grad()
def gradient_reach(gradient_KD: torch.Tensor) -> dict[str, float]:
    """How many codes a codebook gradient really reaches.

    "Non-zero" says nothing (softmax gradients are never exactly zero), so: `reach_effective` is the exponential of the entropy of the
    gradient norms taken as shares, in codes, and `reach_above_eps` the share of codes whose root-mean-square gradient exceeds Adam's eps of
    1e-8, below which an update shrinks with the gradient instead of being normalised.

    Args:
        gradient_KD: gradient of the codebook (K, D).
    """
    norms_K = gradient_KD.double().norm(dim=1)
    above = float((norms_K / math.sqrt(gradient_KD.shape[1]) > ADAM_EPS).double().mean())
    total = float(norms_K.sum())
    if total == 0:
        return {"reach_effective": 0.0, "reach_above_eps": above}
    share_K = norms_K / total
    return {"reach_effective": math.exp(float(-torch.special.xlogy(share_K, share_K).sum())), "reach_above_eps": above}


class QuantizationError:
    """Streaming squared error of the quantizer relative to the variance of its input, in float64.

    1 is the error of one constant code at the mean; above 1 the codebook is worse than that; 0 is perfect.
    """

    def __init__(self) -> None:
        self._error = self._square = 0.0
        self._sum: torch.Tensor | None = None
        self._tokens = 0

    @torch.no_grad()
    def update(self, z_BDHW: torch.Tensor, z_q_BDHW: torch.Tensor) -> None:
        """Add features and their codes, both (B, D, H, W)."""
        z_BDHW, z_q_BDHW = z_BDHW.double(), z_q_BDHW.double()
        self._error += float((z_BDHW - z_q_BDHW).square().sum())
        self._square += float(z_BDHW.square().sum())
        sum_D = z_BDHW.sum((0, 2, 3))
        self._sum = sum_D if self._sum is None else self._sum + sum_D
        self._tokens += z_BDHW.shape[0] * z_BDHW.shape[2] * z_BDHW.shape[3]

    def compute(self) -> float:
        assert self._sum is not None, "compute before any update"
        variance = self._square - float(self._sum.square().sum()) / self._tokens
        return self._error / max(variance, 1e-300)
