"""Finite Scalar Quantization (arXiv 2309.15505): each channel is bounded and rounded to a few levels.

What it changes against VQ: no codebook to learn and no loss term; the codes are a fixed grid, and usage is the
    encoder's affair alone. How a channel is bounded decides how evenly its levels are used:
    tanh     the paper's, shifted so that z = 0 is the level 0
    sigmoid  2 sigmoid(1.6 z) - 1, which makes N(0, 1) all but uniform (iFSQ, arXiv 2601.17124; their code has odd
             levels alone, here even ones lie as symmetrically)
    cdf      the CDF of N(0, 1), cut into bins of equal width whose centres are the codes; in training a bin's width of
             uniform noise stands in for rounding (FSP of VP-VAE, arXiv 2602.17133)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from ibq.quantizers.base import straight_through
from ibq.quantizers.implied import ImpliedCodebookQuantizer
from ibq.quantizers.parts import MOST_CODES
from ibq.schema import QuantizerConfig, bits_of

MARGIN = 1e-3  # the outermost levels are reached within this of tanh's bound
STEEPNESS = 1.6
UNIFORM_STD = 12**-0.5  # of U(0, 1): codes of a bound by CDF have the variance 1 where all bins are used alike


class FSQConfig(QuantizerConfig):
    """`levels` a channel; the paper advises at least 5, e.g. (8, 5, 5, 5) for about 2^10 codes and (8, 8, 8, 5, 5, 5)
    for about 2^16.

    Powers of two such as (8, 8, 4, 4) go below that advice for a K that is exactly that of other methods.
    """

    method: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = Field((4, 4, 4, 4, 4), min_length=1)
    code_dim: int = Field(5, strict=True, ge=1, description="D, the number of levels")
    bound: Literal["tanh", "sigmoid", "cdf"] = Field(
        "tanh", description="sigmoid: iFSQ, arXiv 2601.17124; cdf: FSP, arXiv 2602.17133"
    )
    noise: bool = Field(True, strict=True, description="of bound=cdf in training, in place of rounding")

    @model_validator(mode="after")
    def _levels_make_the_codebook(self) -> FSQConfig:
        product = math.prod(self.levels)
        if not all(3 <= level <= 256 for level in self.levels):
            raise ValueError(f"levels={self.levels} must lie in [3, 256]; for channels of two levels use method 'lfq'")
        if product > MOST_CODES:
            raise ValueError(f"levels={self.levels} make more codes than the 2^62 that an index can name; take fewer")
        if self.codebook_size != product:
            raise ValueError(
                f"codebook_size={self.codebook_size} is not the product {product} of levels={self.levels}; set it to "
                f"{product}"
            )
        if self.code_dim != len(self.levels):
            raise ValueError(
                f"code_dim={self.code_dim} is not the number of levels={self.levels}; set it to {len(self.levels)}"
            )
        if not self.noise and self.bound != "cdf":
            raise ValueError(f"noise=False has no effect with bound={self.bound!r}, which never has any; leave it out")
        return self

    @classmethod
    def sizes(cls, codebook_size: int) -> dict[str, Any]:
        """The fewest channels of 8 and 4 levels that make K codes, e.g. 8, 8, 4, 4 for 1,024."""
        bits = bits_of(codebook_size)
        fours = -bits % 3
        levels = [8] * ((bits - 2 * fours) // 3) + [4] * fours
        return {"codebook_size": codebook_size, "code_dim": len(levels), "levels": levels}

    @property
    def loss_weights(self) -> dict[str, float]:
        return {}

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return self.levels

    @property
    def changes_in_forward(self) -> bool:
        return self.bound == "cdf" and self.noise


class FiniteScalarQuantizer(ImpliedCodebookQuantizer, config=FSQConfig):
    """With h = (L - 1) / 2 and o = 1/2 for even L, else 0, rounds h tanh(z + s) - o, s such that z = 0 lands on the
    level 0, or h (2 sigmoid(1.6 z) - 1) - o; codes are the levels over floor(L / 2): (-2, -1, 0, 1) / 2 for L = 4.

    With bound="cdf" the level is floor(L Phi(z)) and its code (level + 1/2) / L, shifted and scaled to mean 0 and
    variance 1. In training, with noise, z_q is Phi(z) + U(-1/2L, 1/2L) likewise, but Phi(z) itself where that would
    leave (0, 1); the index is that of z without noise. The noise comes from torch's global generator of the device.

    Gradient reach: z through the straight-through rounding, or the noisy value, and the bound.
    """

    config: FSQConfig
    paper = "FSQ, arXiv 2309.15505"

    @property
    def leaves_to_next_forward(self) -> bool:
        return False  # noise is drawn anew, and nothing else changes

    @property
    def trains_between_codes(self) -> bool:
        return self.config.changes_in_forward

    def values(self, digits: torch.Tensor) -> torch.Tensor:
        if self.config.bound == "cdf":
            return standardised((digits.float() + 0.5) / self.levels)
        return (digits - self.levels // 2).float() / (self.levels // 2)

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        """Bounded features in units of the codes."""
        if self.config.bound == "cdf":
            return standardised(gaussian_cdf(z))
        levels = self.levels.view(-1, *[1] * (z.dim() - 2))
        offset = (levels % 2 == 0) * 0.5
        half = (levels - 1).float() / 2
        if self.config.bound == "sigmoid":
            return ((2 * torch.sigmoid(STEEPNESS * z) - 1) * half - offset) / (levels // 2)
        half = half * (1 + MARGIN)
        return (torch.tanh(z + torch.atanh(offset / half)) * half - offset) / (levels // 2)

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        if self.config.bound == "cdf":
            return self._quantize_shares(gaussian_cdf(z_ND))
        bounded_ND = self.to_code_space(z_ND)
        half_width_D = self.levels // 2
        indices_N = self.indices_of((bounded_ND.detach() * half_width_D).round() + half_width_D)
        return straight_through(bounded_ND, self.codes_of(indices_N)), indices_N, {}

    def _quantize_shares(self, share_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The method on features in (0, 1)."""
        indices_N = self.indices_of((share_ND.detach() * self.levels).floor().minimum(self.levels - 1))
        if self.training and self.config.noise:
            noisy_ND = share_ND + (torch.rand_like(share_ND) - 0.5) / self.levels
            inside_ND = (noisy_ND > 0) & (noisy_ND < 1)
            return standardised(torch.where(inside_ND, noisy_ND, share_ND)), indices_N, {}
        return straight_through(standardised(share_ND), self.codes_of(indices_N)), indices_N, {}


def gaussian_cdf(z: torch.Tensor) -> torch.Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def standardised(share: torch.Tensor) -> torch.Tensor:
    """Numbers of U(0, 1) with mean 0 and variance 1."""
    return (share - 0.5) / UNIFORM_STD
