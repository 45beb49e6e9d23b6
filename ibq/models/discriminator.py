"""The PatchGAN discriminator (arXiv 1611.07004) as VQGANs use it, with the parameter names of the released IBQ
checkpoints.

Suffixes: B images, C channels, H W pixels in images and patches in logits.
"""

from __future__ import annotations

import torch
from torch import nn

from ibq.models.config import DISCRIMINATOR_GROUPS, AdversarialConfig


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
