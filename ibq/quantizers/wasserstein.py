"""Wasserstein VQ (arXiv 2506.15078): VQ, and a term that draws the distribution of the codes to that of the features.

    L_W = sqrt(|mu_z - mu_c|^2 + tr(S_z + S_c - 2 (S_z^1/2 S_c S_z^1/2)^1/2))

It is the 2-Wasserstein distance of the two Gaussians with the means and covariances of the features, as constants, and
of all codes.

What it changes against VQ: every code has a gradient in every step, selected or not, at the cost of D x D matrices and
without a matrix of tokens by codes.

Deviations from the released code (VQ-Research/Wasserstein-VQ):
    features   there the last 32,768 to 65,536 of a queue, of one process; here those of the forward, of all processes
               of the group: there should be more of them than D
    scale      there features and codes are divided by the largest standard deviation of a channel of the features in
               VQ-VAE and VQGAN, and L_W with them; the multi-scale VAR does not, but takes a quarter of S_z. Here
               neither, as in the paper
    constants  there 1e-8 to 1e-10 are added below roots; here none
Suffixes: N tokens, M rows of any kind, K codes, D code dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field

from ibq.distributed import sum_over_ranks
from ibq.ops import nearest_code
from ibq.quantizers.base import CodebookQuantizer, quantization_terms, straight_through
from ibq.quantizers.config import EmbeddingConfig

EIGENVALUE_FLOOR = 1e-12
"""Over the largest one of S_z^1/2 S_c S_z^1/2: what is smaller is rounding, in float64."""
DISTANCE_FLOOR = 1e-5
"""Over the root of both traces: below it the gradient is divided by this, not by a distance that is rounding."""


class WassersteinConfig(EmbeddingConfig):
    """Weights of the terms; the released scripts have beta 0.1 or 0.2 and a `wasserstein_weight` of 0.5 or 1."""

    method: Literal["wasserstein"] = "wasserstein"
    beta: float = Field(0.25, ge=0, description="on the commitment term; the codebook term has weight 1")
    wasserstein_weight: float = Field(0.5, gt=0, description="on the distance of codes and features")

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"commitment": self.beta, "codebook": 1.0, "wasserstein": self.wasserstein_weight}


class WassersteinQuantizer(CodebookQuantizer, config=WassersteinConfig):
    """Nearest code by Euclidean distance.

    Gradient reach: z through the straight-through copy and `commitment`; selected codes through `codebook`; all codes
    through `wasserstein`.
    """

    config: WassersteinConfig
    paper = "Wasserstein VQ, arXiv 2506.15078"

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        codebook_KD = self.codebook
        indices_N = nearest_code(z_ND, codebook_KD)
        codes_ND = codebook_KD[indices_N]
        losses = quantization_terms(z_ND, codes_ND)
        losses["wasserstein"] = distance_to_features(codebook_KD, *moments(z_ND, self.training_group))
        return straight_through(z_ND, codes_ND), indices_N, losses


@torch.no_grad()
def moments(rows_MD: torch.Tensor, group: dist.ProcessGroup | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D) of rows, of those of all processes of a group, in float64 without gradient.

    The covariance of M rows has the denominator M - 1; that of one row is zero.
    """
    rows_MD = rows_MD.double()
    totals = torch.cat([rows_MD, torch.ones_like(rows_MD[:, :1])], 1).sum(0)
    if group is not None:
        sum_over_ranks(totals, group=group)
    mean_D, count = totals[:-1] / totals[-1], totals[-1]
    centered_MD = rows_MD - mean_D
    scatter_DD = centered_MD.T @ centered_MD
    if group is not None:
        sum_over_ranks(scatter_DD, group=group)
    return mean_D, scatter_DD / (count - 1).clamp_min(1)


def distance_to_features(codebook_KD: torch.Tensor, mean_D: torch.Tensor, covariance_DD: torch.Tensor) -> torch.Tensor:
    """2-Wasserstein distance of the Gaussian of all codes to that with this mean and covariance.

    It has the codes' type, and a gradient for them that is finite for singular covariances too.
    """
    with torch.no_grad():
        code_mean_D, code_covariance_DD = moments(codebook_KD)
        distance, by_mean_D, by_covariance_DD = gaussian_distance(
            mean_D, covariance_DD, code_mean_D, code_covariance_DD
        )
        K = len(codebook_KD)
        by_code_KD = by_mean_D / K + (codebook_KD - code_mean_D) @ (2 / max(K - 1, 1) * by_covariance_DD)
        by_code_KD, distance = by_code_KD.to(codebook_KD.dtype), distance.to(codebook_KD.dtype)
    return distance + ((codebook_KD - codebook_KD.detach()) * by_code_KD).sum()


def gaussian_distance(
    mean_D: torch.Tensor, covariance_DD: torch.Tensor, other_mean_D: torch.Tensor, other_covariance_DD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """2-Wasserstein distance of two Gaussians, and its gradients for the other's mean and covariance.

    With M = S^1/2 S' S^1/2 that of tr M^1/2 for S' is S^1/2 M^-1/2 S^1/2 / 2: no eigenvector has to be differentiated,
    whatever the gaps between eigenvalues. In directions in which M has none, floors keep it finite: there the distance
    has no derivative for S', but a bounded one for the codes that S' is made of.
    """
    eigenvalues_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    half_DD = vectors_DD * eigenvalues_D.clamp_min(0).sqrt() @ vectors_DD.T
    product_DD = half_DD @ other_covariance_DD @ half_DD
    eigenvalues_D, vectors_DD = torch.linalg.eigh((product_DD + product_DD.T) / 2)
    eigenvalues_D = eigenvalues_D.clamp_min(0)
    traces = covariance_DD.trace() + other_covariance_DD.trace()
    apart_D = other_mean_D - mean_D
    square = (apart_D.square().sum() + traces - 2 * eigenvalues_D.sqrt().sum()).clamp_min(0)

    tiny = torch.finfo(square.dtype).tiny
    floored_D = eigenvalues_D.clamp_min(EIGENVALUE_FLOOR * eigenvalues_D.max()).clamp_min(tiny)
    rooted_DD = half_DD @ vectors_DD / floored_D.sqrt().sqrt()
    distance = square.sqrt()
    twice = 2 * distance.clamp_min(DISTANCE_FLOOR * traces.sqrt()).clamp_min(tiny)
    by_covariance_DD = (torch.ones_like(apart_D).diag() - rooted_DD @ rooted_DD.T) / twice
    return distance, 2 * apart_D / twice, by_covariance_DD
