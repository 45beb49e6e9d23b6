"""The PatchGAN discriminator (arXiv 1611.07004) as VQGANs use it, with the parameter names of the released IBQ
checkpoints.

Suffixes: B images, C channels, H W pixels in images and patches in logits.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ibq.schema import Frozen

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


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) to one logit a patch (B, 1, h, w): 4x4 convolutions, `layers` of stride 2, then two of stride
    1.

    Every layer but the first and the last is normalised: "batch" (with the statistics of the process's own images, as
    released), "group" or "none". Convolutions begin as N(0, 0.02) and scales as N(1, 0.02), as in pix2pix.
    """

    def __init__(self, config: AdversarialConfig, channels: int) -> None:
        super().__init__()
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            stride = 2 if i < config.layers else 1
            bias = config.norm != "batch"  # batch norm would take it away again
            layers += [nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=bias)]
            layers += [*_norm(config.norm, widths[i]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialize)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        logits_B1HW: torch.Tensor = self.main(images_BCHW)
        return logits_B1HW


def _norm(kind: str, width: int) -> list[nn.Module]:
    if kind == "none":
        return []
    return [nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(DISCRIMINATOR_GROUPS, width)]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
