"""Codebooks that follow from the config alone: every combination of one value a channel. Suffixes: D code dimension.

Bit order, the same for all of them: channel 0 is the least significant digit of an index.
"""

from __future__ import annotations

import torch

from ibq.quantizers.parts import PartsQuantizer
from ibq.schema import QuantizerConfig


class ImpliedCodebookQuantizer(PartsQuantizer):
    """A quantizer that assigns each channel by itself; nothing is learnt and nothing of the codebook is in the
    state_dict.

    A subclass says which `values` the digits have.

    Args:
        config: its `part_sizes` are the number of values of each channel.
    """

    like: torch.Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.register_buffer("like", torch.empty(0), persistent=False)  # nothing else tells what the module is cast to

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def learnt_codes(self) -> torch.Tensor | None:
        return None

    def values(self, digits: torch.Tensor) -> torch.Tensor:
        """Values in float32 of digits (..., D), ascending with them."""
        raise NotImplementedError

    def codes_of(self, indices: torch.Tensor) -> torch.Tensor:
        return self.values(self.digits_of(indices.to(self.levels.device)[..., None]))
