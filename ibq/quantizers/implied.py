"""Codebooks that follow from the config alone: every combination of one value a channel. Suffixes: K codes, D code
dimension, N tokens.

Bit order, the same for all of them: channel 0 is the least significant digit of an index. A code is made from the
digits of its index, so that nothing is as large as K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ibq.quantizers.base import Quantizer
from ibq.schema import COUNTABLE_CODES, QuantizerConfig

MOST_CODES = 2**62
"""Largest codebook whose indices are int64, with room for the digits' sums."""


class ImpliedCodebookQuantizer(Quantizer):
    """A quantizer that assigns each channel by itself; nothing is learnt and nothing of the codebook is in the
    state_dict.

    A subclass says which `values` the digits have.

    Args:
        config: its codebook_size must be the product of the levels.
        levels: number of values of each channel.
    """

    levels: torch.Tensor
    place_values: torch.Tensor
    like: torch.Tensor

    def __init__(self, config: QuantizerConfig, levels: Sequence[int]) -> None:
        super().__init__(config)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        place_values = [math.prod(levels[:d]) for d in range(len(levels))]
        self.register_buffer("place_values", torch.tensor(place_values), persistent=False)
        self.register_buffer("like", torch.empty(0), persistent=False)  # nothing else tells what the module is cast to

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def values(self, digits: torch.Tensor) -> torch.Tensor:
        """Values in float32 of digits (..., D), ascending with them."""
        raise NotImplementedError

    def codes_of(self, indices: torch.Tensor) -> torch.Tensor:
        return self.values(indices.to(self.levels.device)[..., None] // self.place_values % self.levels)

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

    def indices_of(self, digits_ND: torch.Tensor) -> torch.Tensor:
        """Index (N,) of each row of digits, digit d in [0, number of values of channel d)."""
        return (digits_ND.long() * self.place_values).sum(1)
