"""Spherical quantization with fixed codes (arXiv 2512.14697, CVPR 2026): the nearest by angle of given unit vectors.

What it changes against VQ: nothing is learnt, there is no loss term, and codes spread evenly over the sphere need no
    entropy penalty. Which codes:
    random     independent uniform directions, for any K and D
    fibonacci  a Fibonacci lattice of the sphere of any dimension, for any K; at D up to some 12 closer to all
               directions than random ones
    leech      the paper's choice: the 196,560 shortest vectors of the Leech lattice, D = 24

The paper's code of several scales leaves features as long as they are; here, as in the sphere of BSQ, they come to unit
length first, and a gradient passes through that. There is no scale: codes have unit length.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from ibq.ops import nearest_code
from ibq.quantizers.base import Quantizer, straight_through
from ibq.quantizers.sphere import LEECH_DIM, LEECH_POINTS, Points, fibonacci_points, leech_points, random_points
from ibq.quantizers.updates import Accumulator
from ibq.schema import QuantizerConfig


class SphericalConfig(QuantizerConfig):
    """Codes follow from `points`, K and D, and the random ones from `points_seed`; none is in the state_dict."""

    method: Literal["spherical"] = "spherical"
    code_dim: int = Field(64, strict=True, ge=2, description="D, the dimension of a code")
    points: Literal["random", "fibonacci", "leech"] = "random"
    points_seed: int = Field(0, strict=True, ge=0, lt=2**32, description="of points=random")

    @model_validator(mode="after")
    def _points_exist(self) -> SphericalConfig:
        sizes = (self.codebook_size, self.code_dim)
        if self.points == "leech" and sizes != (LEECH_POINTS, LEECH_DIM):
            raise ValueError(
                f"codebook_size={sizes[0]} and code_dim={sizes[1]} are not those of the Leech lattice's shortest "
                f"vectors; set {LEECH_POINTS} and {LEECH_DIM}, or points='fibonacci'"
            )
        if self.points_seed and self.points != "random":
            raise ValueError(f"points_seed={self.points_seed} has no effect with points={self.points!r}; leave it out")
        return self

    @property
    def loss_weights(self) -> dict[str, float]:
        return {}


class FixedCodes(Accumulator):
    """Codes that no state_dict restores: so no cast rounds them below float32."""

    codes_KD: torch.Tensor

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.register_buffer("codes_KD", torch.from_numpy(points).float(), persistent=False)


class SphericalQuantizer(Quantizer, config=SphericalConfig):
    """Nearest fixed code by cosine. Gradient reach: z through the straight-through copy and its normalisation."""

    config: SphericalConfig
    paper = "Spherical Leech, arXiv 2512.14697"
    like: torch.Tensor

    def __init__(self, config: SphericalConfig) -> None:
        super().__init__(config)
        K, D = config.codebook_size, config.code_dim
        if config.points == "leech":
            self.fixed = FixedCodes(leech_points())
        else:
            self.fixed = FixedCodes(
                fibonacci_points(K, D) if config.points == "fibonacci" else random_points(K, D, config.points_seed)
            )
        self.register_buffer("like", torch.empty(0), persistent=False)  # nothing else tells what the module is cast to

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def codebook(self) -> torch.Tensor:
        return self.fixed.codes_KD

    @property
    def learnt_codes(self) -> torch.Tensor | None:
        return None

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        return F.normalize(z, dim=1)

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        unit_ND = self.to_code_space(z_ND)
        indices_N = nearest_code(unit_ND, self.codebook)
        return straight_through(unit_ND, self.codebook[indices_N]), indices_N, {}
