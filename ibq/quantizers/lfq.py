"""Lookup-Free Quantization (MAGVIT-v2, arXiv 2310.05737; Open-MAGVIT2, arXiv 2409.04410): a code is the signs of its
features.

What it changes against VQ: no codebook to learn, K = 2^D; the entropy penalty alone spreads the features. With logits 2
<x, c> / tau its sample part falls into bits, each of probability sigmoid(4 |c_d| x_d / tau), exactly and in O(N D); its
codebook part does not, and goes through the operator, whose N x K matrix never exists. Suffixes: N tokens, D code
dimension, K codes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from pydantic import Field, model_validator

from ibq.ops import index_backprop
from ibq.ops.reference import ENTROPY_EPS
from ibq.quantizers.base import straight_through
from ibq.quantizers.implied import ImpliedCodebookQuantizer
from ibq.quantizers.parts import MOST_CODES
from ibq.quantizers.updates import StepCount
from ibq.schema import COUNTABLE_CODES, QuantizerConfig, bits_of


class BinaryConfig(QuantizerConfig):
    """Weights of Open-MAGVIT2. The weight of the entropy penalty may begin `entropy_boost` times as high and fall
    linearly to itself.

    It does so over the first `entropy_boost_steps` steps (`Quantizer.set_step`; MAGVIT-v2: 3 times, 2,000 steps). The
    two entropies stay raw terms of constant weight; what the boost adds to them is a third term, `entropy_boost`, that
    fades to zero.

    `codebook_entropy` "codes" is that of the mean assignment over all K codes; "bits" the sum of those of its bits, as
    if they were independent (BSQ, arXiv 2406.07548), in O(N D) for any K.
    """

    codebook_size: int = Field(1024, strict=True, ge=2, description="K, a power of two")
    code_dim: int = Field(10, strict=True, ge=1, description="D = log2 K")
    commitment_weight: float = Field(0.25, ge=0)
    entropy_weight: float = Field(0.1, ge=0)
    entropy_temperature: float = Field(0.01, gt=0)
    codebook_entropy: Literal["codes", "bits"] | None = Field(
        None, description="None: codes, or bits where K is above 2^24"
    )
    entropy_boost: float = Field(1.0, ge=1)
    entropy_boost_steps: int = Field(2000, strict=True, ge=1)

    @model_validator(mode="after")
    def _bits_make_the_codebook(self) -> BinaryConfig:
        bits = round(math.log2(self.codebook_size))
        if self.codebook_size > MOST_CODES:
            raise ValueError(
                f"codebook_size={self.codebook_size} is more than an index can name; take 62 bits or fewer"
            )
        if self.codebook_size != 2**bits:
            raise ValueError(
                f"codebook_size={self.codebook_size} is not a power of two; set codebook_size={2**bits} with "
                f"code_dim={bits}"
            )
        if self.code_dim != bits:
            raise ValueError(
                f"code_dim={self.code_dim} is not the logarithm of codebook_size={self.codebook_size}; set "
                f"code_dim={bits}"
            )
        if self.entropy_weight and self.codebook_entropy == "codes" and self.codebook_size > COUNTABLE_CODES:
            raise ValueError(
                f"codebook_entropy='codes' goes over each of codebook_size={self.codebook_size} codes, and 2^24 are "
                f"the most; set codebook_entropy='bits'"
            )
        return self

    @classmethod
    def sizes(cls, codebook_size: int) -> dict[str, Any]:
        return {"codebook_size": codebook_size, "code_dim": bits_of(codebook_size)}

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return (2,) * self.code_dim

    @property
    def entropy_of_bits(self) -> bool:
        if self.codebook_entropy is None:
            return self.codebook_size > COUNTABLE_CODES
        return self.codebook_entropy == "bits"

    @property
    def boosted(self) -> bool:
        return self.entropy_weight > 0 and self.entropy_boost > 1

    @property
    def loss_weights(self) -> dict[str, float]:
        weights = {"commitment": self.commitment_weight}
        if self.entropy_weight:
            weights |= {"sample_entropy": self.entropy_weight, "codebook_entropy": -self.entropy_weight}
        return weights | ({"entropy_boost": self.entropy_weight} if self.boosted else {})


class LFQConfig(BinaryConfig):
    """Codes in {-1, +1}."""

    method: Literal["lfq"] = "lfq"


class LookupFreeQuantizer(ImpliedCodebookQuantizer, config=LFQConfig):
    """Bit d of an index is 1 where x_d > 0.

    Gradient reach: z through the straight-through copy, `commitment` and the entropy terms; there is nothing else to
        reach.
    """

    config: BinaryConfig
    paper = "MAGVIT-v2, arXiv 2310.05737"

    def __init__(self, config: BinaryConfig, magnitude: float = 1.0) -> None:
        super().__init__(config)
        self.magnitude = magnitude
        self.schedule = StepCount()

    def values(self, digits: torch.Tensor) -> torch.Tensor:
        return (2 * digits.float() - 1) * self.magnitude

    def digits_of(self, indices_1: torch.Tensor) -> torch.Tensor:
        return (indices_1 & self.place_values) != 0  # faster than to divide, where a whole codebook is built

    @property
    def leaves_to_next_forward(self) -> bool:
        return self.config.boosted and not self.schedule.told

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        x_ND = self.to_code_space(z_ND)
        indices_N = self.indices_of(x_ND > 0)
        codes_ND = self.codes_of(indices_N)
        losses = {"commitment": (x_ND - codes_ND).square().mean()}
        if self.config.entropy_weight:
            losses |= self._entropies(x_ND)
        if self.training and self.leaves_to_next_forward:
            self.schedule.after_forward()
        return straight_through(x_ND, codes_ND), indices_N, losses

    def _entropies(self, x_ND: torch.Tensor) -> dict[str, torch.Tensor]:
        tau = self.config.entropy_temperature
        sample_entropy = bit_entropy(4 * self.magnitude * x_ND / tau).sum(1).mean()
        if self.config.entropy_of_bits:
            codebook_entropy = mean_bit_entropy(4 * self.magnitude * x_ND / tau, self.training_group)
        else:
            *_, of_codes = index_backprop(2 * x_ND, self.codebook, entropy_temperature=tau, group=self.training_group)
            assert of_codes is not None
            codebook_entropy = of_codes
        losses = {"sample_entropy": sample_entropy, "codebook_entropy": codebook_entropy}
        if self.config.boosted:
            left = (1 - self.schedule.now / self.config.entropy_boost_steps).clamp_min(0)
            losses["entropy_boost"] = (self.config.entropy_boost - 1) * left * (sample_entropy - codebook_entropy)
        return losses


def bit_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of bits of probability sigmoid(logits), without cancellation for large logits."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def mean_bit_entropy(logits_ND: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over bits of the entropy of each one's mean probability, -sum p log(p + 1e-5) as of codes; the mean is over
    the tokens of the group's processes, forward and backward."""
    sums = torch.cat([torch.sigmoid(logits_ND).sum(0), torch.sigmoid(-logits_ND).sum(0)])
    tokens = len(logits_ND) * torch.ones_like(sums[:1])
    if group is not None:
        sums, tokens = differentiable.all_reduce(torch.cat([sums, tokens]), group=group).split([len(sums), 1])
    mean = sums / tokens.detach()
    return -(mean * (mean + ENTROPY_EPS).log()).sum()
