"""Binary Spherical Quantization (arXiv 2406.07548): LFQ on the unit sphere.

What it changes against LFQ: features are L2-normalised and codes are +-1/sqrt(D), so that the quantization error is
bounded; the entropy penalty has the logits 2 <u, c> / tau of these unit vectors, so its temperature is not that of LFQ.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ibq.quantizers.lfq import BinaryConfig, LookupFreeQuantizer


class BSQConfig(BinaryConfig):
    """Codes in {-1/sqrt(D), +1/sqrt(D)}."""

    method: Literal["bsq"] = "bsq"


class BinarySphericalQuantizer(LookupFreeQuantizer, config=BSQConfig):
    """As `LookupFreeQuantizer`, of normalised features; gradients pass through the normalisation."""

    paper = "BSQ, arXiv 2406.07548"

    def __init__(self, config: BSQConfig) -> None:
        super().__init__(config, magnitude=config.code_dim**-0.5)

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        return F.normalize(z, dim=1)
