"""Cache of keys and values for sampling token by token, in tensors that never move or grow.

Sizes are fixed when the cache is made, and the position is a tensor: a step is then one graph for all positions, which
a compiler can record once and replay.

Suffixes: B sequences, S positions of a whole sequence, W width, H heads, E dimension of a head, P pairs that RoPE
    turns.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn

from ibq.models.config import HEAD_DIM, TransformerConfig


class BlockCache(nn.Module):
    """A block's keys and values (B, H, S, E) at all positions, and its AdaLN vectors (6, B, 1, W), which are those of
    every position."""

    def __init__(self, config: TransformerConfig, batch: int, like: torch.Tensor) -> None:
        super().__init__()
        shape = (batch, config.depth, config.tokens, HEAD_DIM)
        self.k_BHSE = nn.Buffer(like.new_zeros(shape), persistent=False)
        self.v_BHSE = nn.Buffer(like.new_zeros(shape), persistent=False)
        self.modulation_6B1W = nn.Buffer(like.new_zeros(6, batch, 1, config.width), persistent=False)


class Past(NamedTuple):
    """A block's cache, the position (1,) that comes next, and which positions (1, S) that one sees: those before it,
    and itself."""

    cache: BlockCache
    position_1: torch.Tensor
    seen_1S: torch.Tensor

    def extended(self, k_BH1E: torch.Tensor, v_BH1E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, with these written at the position."""
        k_BHSE, v_BHSE = self.cache.k_BHSE, self.cache.v_BHSE
        return k_BHSE.index_copy_(2, self.position_1, k_BH1E), v_BHSE.index_copy_(2, self.position_1, v_BH1E)


class Cache(nn.Module):
    """The state of `Transformer.step` for a batch of sequences; a module, as a compiler takes its buffers to stay where
    they are.

    A sequence has S = grid**2 positions: the class, and all tokens but the last, after which nothing is predicted.

    Args:
        config: the transformer's.
        batch: sequences; a guided sample is two.
        like: of the precision and on the device of the transformer's parameters.
    """

    def __init__(self, config: TransformerConfig, batch: int, like: torch.Tensor, rotation_2SP: torch.Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BlockCache(config, batch, like) for _ in range(config.depth))
        self.condition_BW = nn.Buffer(like.new_zeros(batch, config.width), persistent=False)
        self.modulation_2B1W = nn.Buffer(like.new_zeros(2, batch, 1, config.width), persistent=False)
        self.rotation_2SP = nn.Buffer(rotation_2SP[:, : config.tokens].clone(), persistent=False)
        self.positions_S = nn.Buffer(torch.arange(config.tokens, device=like.device), persistent=False)

    @property
    def parts(self) -> list[BlockCache]:
        """One for each block."""
        return cast(list[BlockCache], list(self.blocks))

    def at(self, position_1: torch.Tensor) -> list[Past]:
        """The `Past` of each block at a position."""
        seen_1S = self.positions_S[None] <= position_1
        return [Past(part, position_1, seen_1S) for part in self.parts]
