"""Codebooks that follow from the config alone: every combination of one value a channel. Suffixes: K codes, D code
dimension, N tokens.

Bit order, the same for all of them: channel 0 is the least significant digit of an index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ibq.quantizers.base import Quantizer
from ibq.schema import QuantizerConfig


class ImpliedCodebookQuantizer(Quantizer):
    """A quantizer that assigns each channel by itself; nothing is learnt and nothing of the codebook is in the
    state_dict.

    Args:
        config: its codebook_size must be the product of the numbers of values.
        values: what each channel may take, ascending.
    """

    codes: torch.Tensor
    place_values: torch.Tensor

    def __init__(self, config: QuantizerConfig, values: Sequence[torch.Tensor]) -> None:
        super().__init__(config)
        levels = [len(channel) for channel in values]
        place_values = [math.prod(levels[:d]) for d in range(len(levels))]
        indices_K = torch.arange(config.codebook_size)
        digits = [indices_K // place % level for place, level in zip(place_values, levels, strict=True)]
        self.register_buffer(
            "codes", torch.stack([v[k] for v, k in zip(values, digits, strict=True)], 1), persistent=False
        )
        self.register_buffer("place_values", torch.tensor(place_values), persistent=False)

    @property
    def codebook(self) -> torch.Tensor:
        return self.codes

    def indices_of(self, digits_ND: torch.Tensor) -> torch.Tensor:
        """Index (N,) of each row of digits, digit d in [0, number of values of channel d)."""
        return (digits_ND.long() * self.place_values).sum(1)
