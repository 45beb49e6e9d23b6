"""Sizes of the autoregressive transformer over a tokenizer's indices (docs/method.md section 6)."""

from __future__ import annotations

from pydantic import Field, model_validator

from ibq.schema import Frozen

SIZES = {"XXS": 2, "XS": 4, "S": 8, "B": 16, "L": 20, "XL": 24, "XXL": 30}
"""Depth by name; from B on the paper's."""

HEAD_DIM = 64


class TransformerDials(Frozen):
    """Free settings of a transformer. Depth alone decides its size: width 64 * depth, as many heads as blocks; dropouts
    are the paper's."""

    depth: int = Field(16, strict=True, ge=1)
    subtoken_bits: tuple[int, ...] = ()
    """Bits of the sub-tokens that a token is predicted in, one after the other, the most significant first
    (Open-MAGVIT2: 6, 12 at 2^18 codes); empty: a token is predicted whole."""
    token_dropout: float = Field(0.1, ge=0, lt=1, description="on the embedded sequence")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="on the output of attention")
    ffn_dropout: float = Field(0.1, ge=0, lt=1)
    class_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of labels replaced by the unconditional class, for guidance"
    )

    @property
    def width(self) -> int:
        return HEAD_DIM * self.depth

    @property
    def ffn_width(self) -> int:
        """Two thirds of 4 * width, rounded up to a multiple of 256."""
        return -(-(8 * self.width // 3) // 256) * 256

    @property
    def gamma_scale(self) -> float:
        """Factor on the initial gamma rows: 1e-3 for B and L, 1e-4 for XL, 1e-5 for XXL; depths between take the
        shallower size's."""
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

    @property
    def symbols(self) -> tuple[int, ...]:
        """Sizes of what a token is predicted in, one after the other: (K,), or those of its sub-tokens."""
        return tuple(2**bits for bits in self.subtoken_bits) or (self.codebook_size,)
