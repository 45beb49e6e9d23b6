"""Effective dimension of features and codes: how many directions of the code space a cloud of points really spans.

A codebook can be in use to the last code and yet span 3 to 5 of 256 dimensions (arXiv 2605.06870; 2603.17052). So usage
stands beside two numbers of the eigenvalues of a covariance, largest first:

- `dimension`, the participation form: the exponential of the entropy of the eigenvalues taken as shares of their sum
  (the effective rank of Roy and Vetterli, EUSIPCO 2007). d equal ones give d; it moves with every eigenvalue.
- `dimension99`, d_99: the least d whose largest d eigenvalues hold 99% of the sum (arXiv 2605.06870).

Both are between 1 and D, or 0 where all points are the same, and change neither with rotation and translation nor with
scale. Moments and eigenvalues are float64. Suffixes: N points, K codes, D code dimension.
"""

from __future__ import annotations

import math

import torch

from ibq.distributed import sum_over_ranks

FORMS = {
    "dimension": "exponential of the entropy of a covariance's eigenvalues as shares of their sum",
    "dimension99": "least number of a covariance's eigenvalues that hold 99% of their sum",
}
"""What the numbers are, by the beginnings of their names."""
DIMENSIONS = tuple(f"{form}_{cloud}" for form in FORMS for cloud in ("features", "codes", "used"))
"""Names of the numbers."""
IN_WORDS = f"{FORMS['dimension']} (d_99: {FORMS['dimension99']})"
HELD = 0.99
"""Share of the variance that d_99 asks for."""
ROUNDING = 1e-9
"""So far below HELD a share still counts as reached: of 100 equal eigenvalues 99 hold it, however they were rounded."""
SAME = 2.0**-22
"""Points whose spread is below this share of their length are one point: float32 tells them apart by rounding alone."""
AT_ONCE = 16_384
"""Points in float64 at a time: 32 MiB at D = 256."""


class Moments:
    """Mean and scatter of weighted points, gathered batch by batch in float64 (Chan, Golub and LeVeque, 1979).

    Args:
        dimension: D.
        device: of the points.
    """

    def __init__(self, dimension: int, device: torch.device) -> None:
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.mean_D = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.scatter_DD = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, points_ND: torch.Tensor, weights_N: torch.Tensor | None = None) -> None:
        """Add points (N, D), each as often as its weight says: a number of at least 0, by default 1."""
        for start in range(0, len(points_ND), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            points_nD = points_ND[part].double()
            weights_n = points_nD.new_ones(len(points_nD)) if weights_N is None else weights_N[part].double()
            weight = weights_n.sum()
            if not weight:
                continue
            shifted_nD = points_nD - points_nD[0]  # so that equal points have no scatter at all, not that of rounding
            mean_D = weights_n @ shifted_nD / weight
            centered_nD = (shifted_nD - mean_D) * weights_n.sqrt()[:, None]
            self._merge(weight, points_nD[0] + mean_D, centered_nD.T @ centered_nD)

    def _merge(self, weight: torch.Tensor, mean_D: torch.Tensor, scatter_DD: torch.Tensor) -> None:
        total = self.weight + weight
        apart_D = mean_D - self.mean_D
        self.scatter_DD += scatter_DD + torch.outer(apart_D, apart_D) * (self.weight * weight / total)
        self.mean_D += apart_D * (weight / total)
        self.weight = total

    def reduce(self) -> None:
        """Take in the points of the other processes; a collective, once, after the last update."""
        weight, sum_D = self.weight.clone(), self.weight * self.mean_D
        sum_over_ranks(weight, sum_D)
        mean_D = sum_D / weight.clamp_min(1e-300)
        apart_D = self.mean_D - mean_D
        self.scatter_DD += self.weight * torch.outer(apart_D, apart_D)
        sum_over_ranks(self.scatter_DD)
        self.weight, self.mean_D = weight, mean_D


def effective_dimension(points: Moments) -> tuple[float, int] | None:
    """Effective dimension of a cloud of points: participation form and d_99, both 0 of a single point; None where there
    are no points or they are not finite."""
    covariance_DD = points.scatter_DD / points.weight
    if not covariance_DD.isfinite().all():
        return None
    variance = covariance_DD.trace()
    if variance <= SAME**2 * points.mean_D.square().sum():
        return 0.0, 0
    eigenvalues_D = torch.linalg.eigvalsh(covariance_DD / variance).clamp_min(0).flip(0)
    share_D = eigenvalues_D / eigenvalues_D.sum()
    entropy = float(-torch.special.xlogy(share_D, share_D).sum())
    return math.exp(entropy), int((share_D.cumsum(0) < HELD - ROUNDING).sum()) + 1


def dimension_metrics(
    features: Moments, codebook_KD: torch.Tensor | None, counts_K: torch.Tensor, most: int | None = None
) -> dict[str, float]:
    """Effective dimension of features, of all codes, and of the codes in use, each weighted by its tokens.

    Args:
        features: in the space of the codes.
        codebook_KD: all codes (K, D); None where they are too many.
        counts_K: tokens of each code (K,).
        most: codes that are looked at, of all and of those in use; where there are more, as many are drawn, the same at
            every call. None: all of them.

    Returns:
        dimension_features, dimension_codes, dimension_used (participation form) and dimension99_features,
        dimension99_codes, dimension99_used (d_99). Both are absent of a cloud without points or one that is not finite.
    """
    clouds = {"features": features}
    if codebook_KD is not None:
        K, D = codebook_KD.shape
        all_k = _drawn(torch.arange(K, device=codebook_KD.device), most)
        clouds |= {"codes": Moments(D, codebook_KD.device), "used": used_codes(codebook_KD, counts_K, most)}
        clouds["codes"].update(codebook_KD[all_k])
    found = {name: both for name, cloud in clouds.items() if (both := effective_dimension(cloud))}
    participation = {f"dimension_{name}": dimension for name, (dimension, _) in found.items()}
    return participation | {f"dimension99_{name}": float(d_99) for name, (_, d_99) in found.items()}


def used_codes(codebook_KD: torch.Tensor, counts_K: torch.Tensor, most: int | None = None) -> Moments:
    """The codes in use, each weighted by its tokens; arguments as in `dimension_metrics`."""
    used_k = _drawn(counts_K.nonzero().flatten(), most)
    used = Moments(codebook_KD.shape[1], codebook_KD.device)
    used.update(codebook_KD[used_k], counts_K[used_k])
    return used


def _drawn(indices_n: torch.Tensor, most: int | None) -> torch.Tensor:
    if most is None or len(indices_n) <= most:
        return indices_n
    drawn = torch.randperm(len(indices_n), generator=torch.Generator().manual_seed(0))[:most]
    return indices_n[drawn.to(indices_n.device)]
