"""Indices that name one value of each part of a code: numbers of several digits, part 0 the least significant.

So a token keeps one int64 however many parts it has, and tokens, transformers, usage and bits a token know nothing of
parts. A code is made from the digits of its index, so that nothing is as large as K. Suffixes: N tokens, P parts, K
codes, D code dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ibq.quantizers.base import Quantizer
from ibq.quantizers.shapes import require_indices
from ibq.schema import COUNTABLE_CODES, QuantizerConfig

MOST_CODES = 2**62
"""Largest codebook whose indices are int64, with room for the digits' sums."""


def place_values(sizes: Sequence[int]) -> list[int]:
    """Value of a one in each digit, of digits with so many values."""
    return [math.prod(sizes[:p]) for p in range(len(sizes))]


class PartsQuantizer(Quantizer):
    """A quantizer whose indices have digits.

    A subclass implements `codes_of` from the digits.

    Args:
        config: its codebook_size is the product of its `part_sizes`.
    """

    levels: torch.Tensor
    place_values: torch.Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        sizes = config.part_sizes
        self.register_buffer("levels", torch.tensor(sizes), persistent=False)
        self.register_buffer("place_values", torch.tensor(place_values(sizes)), persistent=False)

    def codes_of(self, indices: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def digits_of(self, indices_1: torch.Tensor) -> torch.Tensor:
        """Digits (..., P) of indices (..., 1)."""
        return indices_1 // self.place_values % self.levels

    def indices_of(self, digits_NP: torch.Tensor) -> torch.Tensor:
        """Index (N,) of each row of digits, digit p in [0, number of values of part p)."""
        return (digits_NP.long() * self.place_values).sum(1)

    def parts_of(self, indices_BHW: torch.Tensor) -> torch.Tensor:
        """Indices of the parts (B, P, H, W) of indices (B, H, W): what papers of grouped quantizers call the indices.

        Those of a sequence (B, N) are (B, P, N), of a video (B, T, H, W) are (B, P, T, H, W).

        Raises:
            ValueError: indices are not integers, of another shape, or lie outside [0, K).
        """
        indices = require_indices(indices_BHW, self.config.codebook_size)
        return self.digits_of(indices.to(self.levels.device)[..., None]).long().movedim(-1, 1)

    @property
    def codebook(self) -> torch.Tensor:
        """(K, D).

        Raises:
            ValueError: it has too many codes to be built.
        """
        if self.config.codebook_size > COUNTABLE_CODES:
            raise ValueError(
                f"a codebook of {self.config.codebook_size:,} codes is not built whole, 2^24 are the most; ask "
                f"indices_to_codes for the codes that are needed"
            )
        return self.codes_of(torch.arange(self.config.codebook_size, device=self.levels.device))
