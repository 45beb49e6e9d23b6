"""The autoregressive transformer over a tokenizer's indices (docs/method.md section 6): Llama's blocks under AdaLN,
with the released names.

The class embedding is the first element of the sequence and, apart from that, the condition of every AdaLN. Token t
stands at position t + 1, in the row-major order of the grid, and the output at a position is the prediction of the
token that comes next. A token is predicted whole or, as an option, in sub-tokens one after the other; either is called
a symbol here.

Suffixes: B images, T tokens given, S = T + 1 positions, W width, P pairs that RoPE turns, K codes or values of a
symbol, J symbols of a token, j of them known, N predictions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import ValidationError
from torch import nn

from ibq.errors import ConfigError, nearest, one_sentence
from ibq.models.config import SIZES, TransformerConfig
from ibq.models.transformer.blocks import Block, HeadNorm, rotation_table
from ibq.models.transformer.cache import Cache
from ibq.models.transformer.subtokens import Prediction, SubtokenEmbedding, SubtokenHead, TokenHead


class ClassEmbedding(nn.Module):
    """Labels (B,) to vectors (B, W); the last row is the unconditional class, which in training replaces a share of the
    labels."""

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        self.unconditional = classes
        self.dropout = dropout

    def forward(self, classes_B: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout:
            dropped_B = torch.rand(classes_B.shape, device=classes_B.device) < self.dropout
            classes_B = classes_B.masked_fill(dropped_B, self.unconditional)
        condition_BW: torch.Tensor = self.embedding_table(classes_B)
        return condition_BW


class Transformer(nn.Module):
    """p(next token | class, tokens before it); sizes by config, names of parameters as in the released checkpoints."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = (
            SubtokenEmbedding(config) if config.subtoken_bits else nn.Embedding(config.codebook_size, config.width)
        )
        self.class_emb = ClassEmbedding(config.classes, config.width, config.class_dropout)
        self.dropout = nn.Dropout(config.token_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config.width)
        self.head = SubtokenHead(config) if config.subtoken_bits else TokenHead(config)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """N(0, 0.02), biases 0; of AdaLN's matrices the gamma rows times `gamma_scale`, the others times 0.5; the head
        0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("ada_lin.1.weight"):
                gammas = 2 * self.config.width if "blocks." in name else 0
                parameter[:gammas].mul_(self.config.gamma_scale)
                parameter[gammas:].mul_(0.5)
        for weight_KW in self.head.weights:
            nn.init.zeros_(weight_KW)

    def forward(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, T + 1, K): at position t the prediction of token t from the class and tokens 0 to t - 1.

        To train on a whole image of N tokens, pass the first N - 1; to begin sampling, pass none, (B, 0).

        Args:
            tokens_BT: int64 in [0, K), row-major; T at most grid**2 - 1.
            classes_B: int64 in [0, classes]; `classes` itself is the unconditional class.

        Raises:
            ValueError: shapes or values do not fit, or tokens are predicted in sub-tokens, which have no logits over
                all K; one sentence.
        """
        logits_BSK: torch.Tensor = self.head(self.hidden(tokens_BT, classes_B))
        return logits_BSK

    def hidden(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        """Hidden states before the head: (B, T + 1, W). Arguments and errors are those of `forward`."""
        self._require_fitting(tokens_BT, classes_B)
        condition_BW = self.class_emb(classes_B)
        x_BSW = self.dropout(torch.cat([condition_BW[:, None], self.tok_emb(tokens_BT)], dim=1))
        rotation_2SP = rotation_table(self.config.grid, x_BSW)[:, : x_BSW.shape[1]]
        for block in self.blocks:
            x_BSW = block(x_BSW, condition_BW, rotation_2SP)
        out_BSW: torch.Tensor = self.head_nm(x_BSW, condition_BW)
        return out_BSW

    @property
    def symbols(self) -> tuple[int, ...]:
        """Sizes of what a token is predicted in, one after the other: (K,), or those of its sub-tokens."""
        return self.config.symbols

    def predictions(self, hidden_BSW: torch.Tensor, tokens_BS: torch.Tensor) -> list[Prediction]:
        """Predictions for the loss: one for each symbol, each of N = B * S tokens; their cross-entropies add up to that
        of the tokens.

        Args:
            hidden_BSW: of `hidden`, or any part of it.
            tokens_BS: int64 in [0, K), the tokens that stand behind these positions: at position t token t.
        """
        return self.head.predictions(hidden_BSW.flatten(0, 1), tokens_BS.flatten())

    def symbol_logits(self, hidden_BW: torch.Tensor, chosen_Bj: torch.Tensor) -> torch.Tensor:
        """Logits (B, symbols[j]) of symbol j of the next token.

        Args:
            hidden_BW: of `hidden` at one position, or of `step`.
            chosen_Bj: int64, the j symbols of this token that are chosen already; (B, 0) to begin with.
        """
        return self.head.symbol_logits(hidden_BW, chosen_Bj)

    def cache(self, batch: int) -> Cache:
        """An empty cache for `step`, in the precision and on the device of the transformer."""
        like = self.head_nm.rmsnorm.weight
        return Cache(self.config, batch, like, rotation_table(self.config.grid, like))

    @torch.no_grad()
    def begin(self, classes_B: torch.Tensor, cache: Cache) -> None:
        """Begin new sequences in a cache: their conditions, and what all AdaLNs make of them, as no step changes that.

        Args:
            classes_B: int64 in [0, classes], as many as the cache has sequences.
        """
        condition_BW = self.class_emb(classes_B)
        cache.condition_BW.copy_(condition_BW)
        cache.modulation_2B1W.copy_(torch.stack(self.head_nm.ada_lin(condition_BW)))
        for block, part in zip(cast(Iterable[Block], self.blocks), cache.parts, strict=True):
            part.modulation_6B1W.copy_(torch.stack(block.ada_lin(condition_BW)))
            # what is not seen yet has the weight 0, and 0 times a NaN of former sequences would be NaN
            part.k_BHSE.zero_()
            part.v_BHSE.zero_()

    def step(self, tokens_B: torch.Tensor, position: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden state at one position, (B, W), as `hidden` gives it in eval mode; all positions before it have had
        their step since `begin`.

        Args:
            tokens_B: int64 in [0, K), the token at this position, that is token position - 1; at position 0 any, as the
                class stands there.
            position: int64 tensor of no dimension, in [0, grid**2).
            cache: takes up keys and values of this position.
        """
        position_1 = position.view(1)
        rotation_21P = cache.rotation_2SP.index_select(1, position_1)
        x_B1W = torch.where(position == 0, cache.condition_BW, self.tok_emb(tokens_B))[:, None]
        for block, past in zip(cast(Iterable[Block], self.blocks), cache.at(position_1), strict=True):
            x_B1W = block.modulated(x_B1W, past.cache.modulation_6B1W.unbind(), rotation_21P, past=past)
        out_B1W: torch.Tensor = self.head_nm.modulated(x_B1W, cache.modulation_2B1W.unbind())
        return out_B1W[:, 0]

    def _require_fitting(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> None:
        K, classes, grid = self.config.codebook_size, self.config.classes, self.config.grid
        if tokens_BT.dim() != 2 or classes_B.dim() != 1 or len(tokens_BT) != len(classes_B):
            raise ValueError(
                f"tokens of shape {tuple(tokens_BT.shape)} and classes of shape {tuple(classes_B.shape)} do not fit; "
                f"pass (B, T) and (B,)"
            )
        if tokens_BT.shape[1] >= grid**2:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens leave nothing to predict on a grid of {grid} x {grid}; "
                f"pass at most {grid**2 - 1}, all but the last"
            )
        if torch.compiler.is_compiling():  # looking at values would break its graph
            return
        for what, indices, end in (("tokens", tokens_BT, K), ("classes", classes_B, classes + 1)):
            if not indices.numel():
                continue
            first, last = torch.stack(indices.aminmax()).tolist()  # one wait for a GPU, not two
            if first < 0 or last >= end:
                raise ValueError(f"{what} reach from {first} to {last}; they must lie in [0, {end})")


def build_transformer(size: str, *, codebook_size: int = 16384, classes: int = 1000, grid: int = 16) -> Transformer:
    """A new transformer of a named size, initialised as the paper's, with the paper's dropouts, in training mode.

    Args:
        size: one of SIZES; "B", "L", "XL" and "XXL" are the paper's.
        codebook_size: K of the tokenizer whose indices it models.
        classes: of the labels; one more, the unconditional class, is added.
        grid: tokens a side of an image.

    Raises:
        ConfigError: an unknown size, or a number out of range.
    """
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is not a size of the transformer; {nearest(str(size), SIZES)}")
    try:
        config = TransformerConfig(depth=SIZES[size], codebook_size=codebook_size, classes=classes, grid=grid)
    except ValidationError as error:
        raise ConfigError(one_sentence(error)) from None
    return Transformer(config)
