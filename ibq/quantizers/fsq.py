"""Finite Scalar Quantization (arXiv 2309.15505): each channel is bounded and rounded to a few levels.

What it changes against VQ: no codebook to learn and no loss term; the codes are a fixed grid, and usage is the
    encoder's affair alone.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from ibq.quantizers.base import straight_through
from ibq.quantizers.implied import MOST_CODES, ImpliedCodebookQuantizer
from ibq.schema import QuantizerConfig, bits_of

MARGIN = 1e-3  # the outermost levels are reached within this of tanh's bound


class FSQConfig(QuantizerConfig):
    """`levels` a channel; the paper advises at least 5, e.g. (8, 5, 5, 5) for about 2^10 codes and (8, 8, 8, 5, 5, 5)
    for about 2^16.

    Powers of two such as (8, 8, 4, 4) go below that advice for a K that is exactly that of other methods.
    """

    method: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = Field((4, 4, 4, 4, 4), min_length=1)
    code_dim: int = Field(5, strict=True, ge=1, description="D, the number of levels")

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


class FiniteScalarQuantizer(ImpliedCodebookQuantizer, config=FSQConfig):
    """Rounds h tanh(z + s) - o, with h = (L - 1) / 2, o = 1/2 for even L, else 0, and s such that z = 0 lands on the
    level 0.

    Codes are the levels over floor(L / 2): (-2, -1, 0, 1) / 2 for L = 4. Gradient reach: z through the straight-through
    rounding and tanh.
    """

    config: FSQConfig
    paper = "FSQ, arXiv 2309.15505"

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config, config.levels)

    def values(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits - self.levels // 2).float() / (self.levels // 2)

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        """Bounded features in units of the codes."""
        levels = self.levels.view(-1, *[1] * (z.dim() - 2))
        half = (levels - 1).float() * (1 + MARGIN) / 2
        offset = (levels % 2 == 0) * 0.5
        return (torch.tanh(z + torch.atanh(offset / half)) * half - offset) / (levels // 2)

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        bounded_ND = self.to_code_space(z_ND)
        half_width_D = self.levels // 2
        indices_N = self.indices_of((bounded_ND.detach() * half_width_D).round() + half_width_D)
        return straight_through(bounded_ND, self.codes_of(indices_N)), indices_N, {}
