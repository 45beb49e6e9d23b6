"""Sizes of the networks: VQGAN encoder and decoder, PatchGAN discriminator, autoregressive transformer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ibq.schema import Frozen


class AutoencoderConfig(Frozen):
    """Size of the VQGAN encoder and decoder (docs/method.md section 5 has the paper's: 128, (1, 1, 2, 2, 4), 4
    ResBlocks, z 256).

    The down-sampling factor is 2 ** (len(channel_multipliers) - 1).
    """

    base_channels: int = Field(16, strict=True, ge=1)
    channel_multipliers: tuple[int, ...] = Field((1, 2, 2), min_length=1)
    res_blocks: int = Field(
        1, strict=True, ge=1, description="ResBlocks a level in the encoder; the decoder has one more"
    )
    attention_resolutions: tuple[int, ...] = ()
    z_channels: int = Field(32, strict=True, ge=1)
    norm_groups: int = Field(16, strict=True, ge=1)

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.channel_multipliers) - 1))

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> AutoencoderConfig:
        for multiplier in self.channel_multipliers:
            width = multiplier * self.base_channels
            if width < 1 or width % self.norm_groups:
                raise ValueError(
                    f"norm_groups={self.norm_groups} does not divide a level of {width} channels; choose norm_groups "
                    f"among the divisors of "
                    f"base_channels={self.base_channels}"
                )
        return self


DISCRIMINATOR_GROUPS = 8
LEAST_PATCHES = 3
"""Pixels a side that a discriminator's strided layers must leave, since the two layers after them take one each."""


class AdversarialConfig(Frozen):
    """The PatchGAN discriminator and its part in the loss (docs/method.md section 4); weight 0: there is none.

    The discriminator takes the generator's learning rate, schedule, betas and clipping.
    """

    weight: float = Field(0.0, ge=0, description="of the generator's term; the paper: 0.1")
    adaptive: bool = Field(False, strict=True)
    """VQGAN's weight: `weight` times |gradient of pixel and perceptual terms| / |gradient of the adversarial term| at
    the decoder's last layer, instead of `weight` alone."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    start: float = Field(
        0.0, ge=0, lt=1, description="fraction of the run after which discriminator and generator's term begin"
    )
    lecam_weight: float = Field(0.05, ge=0)
    lecam_decay: float = Field(
        0.999, ge=0, lt=1, description="of the averages of the logits that LeCam compares with, a step"
    )
    channels: int = Field(64, strict=True, ge=1, description="of the first layer; doubled a layer up to eightfold")
    layers: int = Field(3, strict=True, ge=1, le=6, description="of stride 2")
    norm: Literal["batch", "group", "none"] = "batch"

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> AdversarialConfig:
        changed = [
            name for name, field in AdversarialConfig.model_fields.items() if getattr(self, name) != field.default
        ]
        if changed and not self.weight:
            value = getattr(self, changed[0])
            raise ValueError(
                f"{changed[0]}={value!r} has no effect with weight=0.0; set loss.adversarial.weight, e.g. to 0.1, or "
                f"leave it out"
            )
        if self.norm == "group" and (2 * self.channels) % DISCRIMINATOR_GROUPS:
            raise ValueError(
                f"norm='group' has {DISCRIMINATOR_GROUPS} groups, which do not divide {2 * self.channels} channels; "
                f"choose channels={self.channels} as a multiple of {DISCRIMINATOR_GROUPS // 2}"
            )
        return self


SIZES = {"XXS": 2, "XS": 4, "S": 8, "B": 16, "L": 20, "XL": 24, "XXL": 30}
"""Depth by name; from B on the paper's."""

HEAD_DIM = 64


class TransformerDials(Frozen):
    """Depth, sub-tokens and dropouts of a transformer. Depth is the one dial of its size: width 64 * depth, as many
    heads as blocks; dropouts are the paper's."""

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
