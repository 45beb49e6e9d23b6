"""Gradient and geometry of a codebook: gradient reach, quantization error, logits, the gap between features and
codes.

Suffixes: N tokens, K codes, D code dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ibq.distributed import gather_rows, sum_of_numbers

ADAM_EPS = 1e-8


@torch.no_grad()
def gradient_reach(gradient_KD: torch.Tensor) -> dict[str, float]:
    """Gradient reach: the number of codes that a codebook gradient really reaches.

    "Non-zero" says nothing (softmax gradients are never exactly zero), so: `reach_effective` is the exponential of the
    entropy of the gradient norms taken as shares, in codes, and `reach_above_eps` the share of codes whose
    root-mean-square gradient exceeds Adam's eps of 1e-8, below which an update shrinks with the gradient instead of
    being normalised.

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


@torch.no_grad()
def logit_statistics(logits_NK: torch.Tensor) -> dict[str, float]:
    """Decisiveness of assignments: `logit_spread`, the standard deviation of a token's logits over the codes;
    `max_probability`, the largest entry of its softmax at temperature 1 (1/K is indifference; near 1 the softmax hears
    of one code, and its gradient vanishes); and `assignment_entropy`, the entropy of that softmax in nats; means over
    tokens.

    Args:
        logits_NK: scores of every code (N, K).
    """
    logits_NK = logits_NK.double()
    p_NK = logits_NK.softmax(1)
    return {
        "logit_spread": float(logits_NK.std(1, correction=0).mean()),
        "max_probability": float(p_NK.amax(1).mean()),
        "assignment_entropy": float(-torch.special.xlogy(p_NK, p_NK).sum(1).mean()),
    }


@torch.no_grad()
def code_gap(features_ND: torch.Tensor, codes_KD: torch.Tensor, used_K: torch.Tensor | None) -> dict[str, float]:
    """Fréchet distance of the codebook as a cloud of points from the features: `gap`, with `gap_used` and `gap_dead`
    for part of the codes, and `gap_angular`, that of all codes and features at unit length.

    The Fréchet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), over the features' variance tr
    S1, so that it has no unit: 0 is the same cloud; 1 is what a single point at the features' mean has. It is a
    distance of distributions, not of tokens to their codes (that is the quantization error): few codes amid the
    features are near all the same. A search by dot product hardly minds lengths, so for it the angular gap is the one
    that counts.

    Args:
        features_ND: features in the space of the codes (N, D), N at least 2.
        codes_KD: codes (K, D).
        used_K: bool (K,), which of them are in use; a part without a code is left out of the result. None, if that is
            not known: both.

    Returns:
        finite numbers; none at all where features do not vary, or where features or codes are not finite.
    """
    if not (features_ND.isfinite().all() and codes_KD.isfinite().all()):
        return {}
    parts = {"gap": codes_KD} | (
        {} if used_K is None else {"gap_used": codes_KD[used_K], "gap_dead": codes_KD[~used_K]}
    )
    gaps = _frechet_over_variance(features_ND.double(), parts)
    directions_ND, directions_KD = (F.normalize(each.double(), dim=1) for each in (features_ND, codes_KD))
    gaps |= _frechet_over_variance(directions_ND, {"gap_angular": directions_KD})
    return gaps if all(map(math.isfinite, gaps.values())) else {}


def _frechet_over_variance(features_ND: torch.Tensor, parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Fréchet distance of each part's codes from the features over the features' variance; NaN or infinite where the
    features hardly vary."""
    mean_D, covariance_DD = _moments(features_ND)
    root_DD = _root(covariance_DD)
    variance = covariance_DD.trace()
    gaps = {}
    for name, part_KD in parts.items():
        if len(part_KD):
            part_mean_D, part_covariance_DD = _moments(part_KD)
            cross = torch.linalg.eigvalsh(root_DD @ part_covariance_DD @ root_DD).clamp_min(0).sqrt().sum()
            distance = (mean_D - part_mean_D).square().sum() + variance + part_covariance_DD.trace() - 2 * cross
            gaps[name] = float(distance.clamp_min(0) / variance)
    return gaps


def _moments(points_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D), over N, in float64."""
    points_ND = points_ND.double()
    mean_D = points_ND.mean(0)
    return mean_D, (points_ND - mean_D).T @ (points_ND - mean_D) / len(points_ND)


def _root(matrix_DD: torch.Tensor) -> torch.Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return vectors_DD * values_D.clamp_min(0).sqrt() @ vectors_DD.T


class QuantizationError:
    """Streaming squared error of the quantizer relative to the variance of its input, in float64.

    1 is the error of one constant code at the mean; above 1 the codebook is worse than that; 0 is perfect.
    """

    def __init__(self) -> None:
        self._error = self._square = 0.0
        self._sum: torch.Tensor | None = None
        self.tokens = 0

    @torch.no_grad()
    def update(self, z_BDHW: torch.Tensor, z_q_BDHW: torch.Tensor) -> None:
        """Add features and their codes, both (B, D, H, W)."""
        z_BDHW, z_q_BDHW = z_BDHW.double(), z_q_BDHW.double()
        self._error += float((z_BDHW - z_q_BDHW).square().sum())
        self._square += float(z_BDHW.square().sum())
        sum_D = z_BDHW.sum((0, 2, 3))
        self._sum = sum_D if self._sum is None else self._sum + sum_D
        self.tokens += z_BDHW.shape[0] * z_BDHW.shape[2] * z_BDHW.shape[3]

    def reduce(self) -> None:
        """Take in what the other processes have measured; a collective, once, after the last update."""
        self._error, self._square, tokens = sum_of_numbers(self._error, self._square, self.tokens)
        self.tokens = int(tokens)
        self._sum = gather_rows(torch.empty(0) if self._sum is None else self._sum[None]).sum(0)

    def compute(self) -> float:
        assert self._sum is not None, "compute before any update"
        variance = self._square - float(self._sum.square().sum()) / self.tokens
        return self._error / max(variance, 1e-300)
