"""Token embedding and head: a token is predicted whole or in sub-tokens, the most significant bits first.

The paper has tokens predicted whole; that a token of 2^18 may be predicted as 6 and 12 bits is Open-MAGVIT2's. How it
is done here is this project's own choice: a token is embedded as the sum of its sub-tokens' embeddings, and a causal
transformer of two blocks like the others runs over the J sub-tokens of a token. The token's hidden vector is to them
what the class is to tokens: the first element of the sequence and the condition of every AdaLN. After it come the
sub-tokens but the last, embedded anew; positions are learned, and nothing is rotated.

Suffixes: N tokens, of any images and positions, J symbols of a token, j of them known, W width, K values of a symbol, P
    pairs of RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ibq.models.config import HEAD_DIM, TransformerConfig
from ibq.models.transformer.blocks import Block, HeadNorm

BLOCKS = 2


class Prediction(NamedTuple):
    """Of N tokens one symbol: its logits are hidden_NW @ weight_KW.T, and what it is in truth."""

    hidden_NW: torch.Tensor
    weight_KW: torch.Tensor
    targets_N: torch.Tensor


def split(tokens: torch.Tensor, symbols: Sequence[int]) -> torch.Tensor:
    """Symbols (..., J) of tokens (...), the most significant first: the digits of a number whose bases are the symbols'
    sizes."""
    digits = []
    for size in reversed(symbols):
        digits.append(tokens % size)
        tokens = tokens // size
    return torch.stack(digits[::-1], dim=-1)


def join(digits: torch.Tensor, symbols: Sequence[int]) -> torch.Tensor:
    """Tokens (...) of symbols (..., J); `split` undone."""
    tokens = torch.zeros_like(digits[..., 0])
    for digit, size in zip(digits.unbind(-1), symbols, strict=True):
        tokens = tokens * size + digit
    return tokens


class TokenHead(nn.Linear):
    """Predicts a token whole."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.width, config.codebook_size, bias=False)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [self.weight]

    def predictions(self, hidden_NW: torch.Tensor, tokens_N: torch.Tensor) -> list[Prediction]:
        return [Prediction(hidden_NW, self.weight, tokens_N)]

    def symbol_logits(self, hidden_NW: torch.Tensor, chosen_Nj: torch.Tensor) -> torch.Tensor:
        logits_NK: torch.Tensor = self(hidden_NW)
        return logits_NK


class SubtokenEmbedding(nn.Module):
    """Tokens of any shape to vectors: the sum of the embeddings of their sub-tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.symbols = config.symbols
        self.parts = nn.ModuleList(nn.Embedding(size, config.width) for size in self.symbols)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = (part(digit) for part, digit in zip(self.parts, split(tokens, self.symbols).unbind(-1), strict=True))
        return torch.stack(list(parts)).sum(0)


class SubtokenHead(nn.Module):
    """Predicts each sub-token from the token's hidden vector and the sub-tokens before it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.symbols = config.symbols
        self.embeddings = nn.ModuleList(nn.Embedding(size, config.width) for size in self.symbols[:-1])
        self.positions = nn.Embedding(len(self.symbols), config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(BLOCKS))
        self.norm = HeadNorm(config.width)
        self.outputs = nn.ModuleList(nn.Linear(config.width, size, bias=False) for size in self.symbols)

    @property
    def weights(self) -> list[torch.Tensor]:
        return list(self.outputs.parameters())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raises ValueError: the logits of a sub-token depend on the sub-tokens before it."""
        raise ValueError(
            f"tokens are predicted in sub-tokens of {' x '.join(map(str, self.symbols))} values, which have no logits "
            f"over whole tokens; "
            "use predictions or symbol_logits"
        )

    def predictions(self, hidden_NW: torch.Tensor, tokens_N: torch.Tensor) -> list[Prediction]:
        digits_NJ = split(tokens_N, self.symbols)
        out_NJW = self._hidden(hidden_NW, digits_NJ[:, :-1])
        return [Prediction(*parts) for parts in zip(out_NJW.unbind(1), self.weights, digits_NJ.unbind(1), strict=True)]

    def symbol_logits(self, hidden_NW: torch.Tensor, chosen_Nj: torch.Tensor) -> torch.Tensor:
        logits_NK: torch.Tensor = self.outputs[chosen_Nj.shape[1]](self._hidden(hidden_NW, chosen_Nj)[:, -1])
        return logits_NK

    def _hidden(self, hidden_NW: torch.Tensor, chosen_Nj: torch.Tensor) -> torch.Tensor:
        """Hidden states before the output layers of symbols 0 to j: (N, j + 1, W)."""
        known = [embedding(digit_N) for embedding, digit_N in zip(self.embeddings, chosen_Nj.unbind(1), strict=False)]
        x_NJW = torch.stack([hidden_NW, *known], dim=1)
        x_NJW = x_NJW + self.positions.weight[: x_NJW.shape[1]]
        ones_JP = x_NJW.new_ones(x_NJW.shape[1], HEAD_DIM // 2)
        unrotated_2JP = torch.stack([ones_JP, torch.zeros_like(ones_JP)])
        for block in self.blocks:
            x_NJW = block(x_NJW, hidden_NW, unrotated_2JP)
        out_NJW: torch.Tensor = self.norm(x_NJW, hidden_NW)
        return out_NJW
