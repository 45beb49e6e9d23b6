"""The autoregressive transformer over a tokenizer's indices (PAPER section 6): Llama's blocks under AdaLN, with the released names.

The class embedding is the first element of the sequence and, apart from that, the condition of every AdaLN. Token t stands at position
t + 1, in the row-major order of the grid, and the output at a position is the prediction of the token that comes next.

Suffixes: B images, T tokens given, S = T + 1 positions, W width, H heads, E = W/H dimension of a head, P = E/2 pairs that are rotated,
C classes, K codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from ibq.errors import ConfigError, nearest, one_sentence

SIZES = {"XXS": 2, "XS": 4, "S": 8, "B": 16, "L": 20, "XL": 24, "XXL": 30}
"""Depth by name; from B on the paper's."""

HEAD_DIM = 64
ROPE_BASE = 10000.0
NORM_EPS = 1e-5


class TransformerDials(BaseModel):
    """What is chosen of a transformer. Depth is the one dial of its size: width 64 * depth, as many heads as blocks; dropouts are the
    paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    depth: int = Field(16, strict=True, ge=1)
    subtoken_bits: tuple[int, ...] = ()
    """Bits of the sub-tokens that a token is predicted in, one after the other, the most significant first (Open-MAGVIT2: 6, 12 at 2^18
    codes); empty: a token is predicted whole."""
    token_dropout: float = Field(0.1, ge=0, lt=1, description="on the embedded sequence")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="on the output of attention")
    ffn_dropout: float = Field(0.1, ge=0, lt=1)
    class_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels replaced by the unconditional class, for guidance")

    @property
    def width(self) -> int:
        return HEAD_DIM * self.depth

    @property
    def ffn_width(self) -> int:
        """Two thirds of 4 * width, rounded up to a multiple of 256."""
        return -(-(8 * self.width // 3) // 256) * 256

    @property
    def gamma_scale(self) -> float:
        """Factor on the initial gamma rows: 1e-3 for B and L, 1e-4 for XL, 1e-5 for XXL; depths between take the shallower size's."""
        return 1e-3 if self.depth < SIZES["XL"] else 1e-4 if self.depth < SIZES["XXL"] else 1e-5


class TransformerConfig(TransformerDials):
    """A transformer whole: its dials, and what tokenizer and data decide."""

    codebook_size: int = Field(16384, strict=True, ge=1, description="K, the tokenizer's")
    classes: int = Field(1000, strict=True, ge=1)
    grid: int = Field(16, strict=True, ge=1, description="tokens a side of the image")

    @model_validator(mode="after")
    def _subtokens_are_tokens(self) -> TransformerConfig:
        bits = self.subtoken_bits
        if bits and (min(bits) < 1 or 2 ** sum(bits) != self.codebook_size):
            raise ValueError(
                f"subtoken_bits={bits} make {2 ** sum(bits):,} tokens and codebook_size is {self.codebook_size:,}; "
                "choose positive numbers whose sum is log2 of it, or none"
            )
        return self

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2


class ClassEmbedding(nn.Module):
    """Labels (B,) to vectors (B, W); the last row is the unconditional class, which in training replaces a share of the labels."""

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


class Attention(nn.Module):
    """Causal self-attention whose queries and keys are rotated by position."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, x_BSW: torch.Tensor, rotation_2SP: torch.Tensor) -> torch.Tensor:
        q_BHSE, k_BHSE, v_BHSE = (part.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for part in self.wqkv(x_BSW).chunk(3, dim=2))
        q_BHSE, k_BHSE = rotate(q_BHSE, rotation_2SP), rotate(k_BHSE, rotation_2SP)
        out_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, is_causal=True)
        out_BSW: torch.Tensor = self.dropout(self.wo(out_BHSE.transpose(1, 2).flatten(2)))
        return out_BSW


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x_BSW: torch.Tensor) -> torch.Tensor:
        out_BSW: torch.Tensor = self.dropout(self.w2(F.silu(self.w1(x_BSW)) * self.w3(x_BSW)))
        return out_BSW


class Modulation(nn.Sequential):
    """AdaLN's SiLU and Linear: a condition (B, W) to `parts` vectors (B, 1, W), for all positions alike."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition_BW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        modulation_B1V: torch.Tensor = super().forward(condition_BW)[:, None]
        return modulation_B1V.chunk(self.parts, dim=2)


class Block(nn.Module):
    """Attention and feed-forward, each scaled and shifted before and scaled by gamma after, around a skip."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.ffn_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.ada_lin = Modulation(config.width, 6)

    def forward(self, x_BSW: torch.Tensor, condition_BW: torch.Tensor, rotation_2SP: torch.Tensor) -> torch.Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.ada_lin(condition_BW)
        x_BSW = x_BSW + gamma1 * self.attention(self.attention_norm(x_BSW) * (1 + scale1) + shift1, rotation_2SP)
        return x_BSW + gamma2 * self.feed_forward(self.ffn_norm(x_BSW) * (1 + scale2) + shift2)


class HeadNorm(nn.Module):
    """The AdaLN before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rmsnorm = nn.RMSNorm(width, eps=NORM_EPS)
        self.ada_lin = Modulation(width, 2)

    def forward(self, x_BSW: torch.Tensor, condition_BW: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(condition_BW)
        out_BSW: torch.Tensor = self.rmsnorm(x_BSW) * (1 + scale) + shift
        return out_BSW


class Transformer(nn.Module):
    """p(next token | class, tokens before it); sizes by config, names of parameters as in the released checkpoints."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.codebook_size, config.width)
        self.class_emb = ClassEmbedding(config.classes, config.width, config.class_dropout)
        self.dropout = nn.Dropout(config.token_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config.width)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """N(0, 0.02), biases 0; of AdaLN's matrices the gamma rows times `gamma_scale`, the others times 0.5; the head 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("ada_lin.1.weight"):
                gammas = 2 * self.config.width if name.startswith("blocks.") else 0
                parameter[:gammas].mul_(self.config.gamma_scale)
                parameter[gammas:].mul_(0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, T + 1, K): at position t the prediction of token t from the class and tokens 0 to t - 1.

        To train on a whole image of N tokens, pass the first N - 1; to begin sampling, pass none, (B, 0).

        Args:
            tokens_BT: int64 in [0, K), row-major; T at most grid**2 - 1.
            classes_B: int64 in [0, classes]; `classes` itself is the unconditional class.

        Raises:
            ValueError: shapes or values do not fit; one sentence.
        """
        logits_BSK: torch.Tensor = self.head(self.hidden(tokens_BT, classes_B))
        return logits_BSK

    def hidden(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        """What the head turns into logits: (B, T + 1, W). Arguments and errors are those of `forward`."""
        self._require_fitting(tokens_BT, classes_B)
        condition_BW = self.class_emb(classes_B)
        x_BSW = self.dropout(torch.cat([condition_BW[:, None], self.tok_emb(tokens_BT)], dim=1))
        rotation_2SP = rotation_table(self.config.grid, x_BSW)[:, : x_BSW.shape[1]]
        for block in self.blocks:
            x_BSW = block(x_BSW, condition_BW, rotation_2SP)
        out_BSW: torch.Tensor = self.head_nm(x_BSW, condition_BW)
        return out_BSW

    def _require_fitting(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> None:
        K, classes, grid = self.config.codebook_size, self.config.classes, self.config.grid
        if tokens_BT.dim() != 2 or classes_B.dim() != 1 or len(tokens_BT) != len(classes_B):
            raise ValueError(
                f"tokens of shape {tuple(tokens_BT.shape)} and classes of shape {tuple(classes_B.shape)} do not fit; pass (B, T) and (B,)"
            )
        if tokens_BT.shape[1] >= grid**2:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens leave nothing to predict on a grid of {grid} x {grid}; "
                f"pass at most {grid**2 - 1}, all but the last"
            )
        if torch.compiler.is_compiling():  # looking at values would break its graph
            return
        for what, indices, end in (("tokens", tokens_BT, K), ("classes", classes_B, classes + 1)):
            if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= end):
                raise ValueError(f"{what} reach from {int(indices.min())} to {int(indices.max())}; they must lie in [0, {end})")


def rotation_table(grid: int, like: torch.Tensor) -> torch.Tensor:
    """Cosine and sine (2, 1 + grid**2, P) of RoPE's angles by position: the first half of the pairs turns with the row, the other half with
    the column. At the class position both are zero, as released, so that its query and key vanish. At least float32, on `like`'s device.
    """
    dtype, pairs = torch.promote_types(like.dtype, torch.float32), HEAD_DIM // 4
    frequencies_P = ROPE_BASE ** -(torch.arange(pairs, dtype=dtype, device=like.device) / pairs)
    angles_GP = torch.outer(torch.arange(grid, dtype=dtype, device=like.device), frequencies_P)
    angles_TP = torch.cat([angles_GP.repeat_interleave(grid, 0), angles_GP.repeat(grid, 1)], dim=1)
    return F.pad(torch.stack([angles_TP.cos(), angles_TP.sin()]), (0, 0, 1, 0))


def rotate(x_BHSE: torch.Tensor, rotation_2SP: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs (0, 1), (2, 3), ... of the last dimension turned by the table's angles, computed in the table's precision."""
    even_BHSP, odd_BHSP = x_BHSE.to(rotation_2SP.dtype).unflatten(3, (-1, 2)).unbind(4)
    cos_SP, sin_SP = rotation_2SP
    turned_BHSP2 = torch.stack([even_BHSP * cos_SP - odd_BHSP * sin_SP, odd_BHSP * cos_SP + even_BHSP * sin_SP], dim=4)
    return turned_BHSP2.flatten(3).to(x_BHSE.dtype)


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
