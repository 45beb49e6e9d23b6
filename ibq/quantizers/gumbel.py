"""Straight-through Gumbel-softmax (arXiv 1611.01144) over a codebook, as in DALL-E (arXiv 2102.12092) and VQGAN's
Gumbel variant.

With logits l = z C^T and noise G, p = softmax((l + G) / T) and z_q = Ind C, Ind = onehot(argmax p) + p - sg(p). It is
IBQ's nearest
relative: without noise and at T = 1 it is IBQ's estimator exactly; IBQ leaves out the sampling, and adds its
quantization terms. The logits are tied to the codes by choice, so that the two differ in nothing else; DALL-E and VQGAN
learn a projection to logits beside the codes. Suffixes: N tokens, D code dimension, K codes. Several (N, K) matrices
exist at once.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from ibq.ops.precision import at_least_float32
from ibq.quantizers.base import CodebookQuantizer
from ibq.quantizers.config import CodebookInit, EmbeddingConfig
from ibq.quantizers.updates import StepCount


class GumbelConfig(EmbeddingConfig):
    """`kl_weight` stands on KL(softmax(l) || uniform), 5e-4 in VQGAN; 0 switches the term off.

    With `final_temperature` T falls from `temperature` to it along half a cosine, over the first `anneal_steps` steps
    (`Quantizer.set_step`); DALL-E goes from 1 to 1/16 within 150,000.
    """

    method: Literal["gumbel"] = "gumbel"
    codebook_init: CodebookInit = "normal"
    noise: bool = Field(True, strict=True)
    temperature: float = Field(1.0, gt=0)
    final_temperature: float | None = Field(None, gt=0, description="None: constant")
    anneal_steps: int = Field(150_000, strict=True, ge=1)
    kl_weight: float = Field(5e-4, ge=0)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"kl": self.kl_weight} if self.kl_weight else {}

    @property
    def changes_in_forward(self) -> bool:
        return self.noise


class GumbelQuantizer(CodebookQuantizer, config=GumbelConfig):
    """The code of the largest logit; in training, with noise, of the largest noisy logit, and that is the index that is
    returned.

    Noise comes from torch's global generator of the device. Gradient reach: z and all codes through z_q and `kl`.
    """

    config: GumbelConfig
    paper = "Gumbel-softmax, arXiv 1611.01144"

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__(config)
        self.schedule = StepCount()

    @property
    def leaves_to_next_forward(self) -> bool:
        return self.config.final_temperature is not None and not self.schedule.told

    @property
    def temperature(self) -> float | torch.Tensor:
        """T of the next forward."""
        first, last = self.config.temperature, self.config.final_temperature
        if last is None:
            return first
        done = (self.schedule.now / self.config.anneal_steps).clamp_max(1)
        return last + (first - last) * (1 + torch.cos(math.pi * done)) / 2

    @property
    def logit_scale(self) -> float:
        return 1 / float(self.temperature)

    def logits(self, z_ND: torch.Tensor) -> torch.Tensor:
        return at_least_float32(z_ND) @ self.codebook.T

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        codebook_KD = self.codebook
        logits_NK = self.logits(z_ND)
        noisy_NK = logits_NK
        if self.training and self.config.noise:
            noisy_NK = logits_NK - torch.empty_like(logits_NK).exponential_().log()
        p_NK = (noisy_NK / self.temperature).softmax(1)
        if self.training and self.leaves_to_next_forward:
            self.schedule.after_forward()
        indices_N = noisy_NK.max(1).indices
        codes_ND = codebook_KD[indices_N]
        soft_ND = codes_ND + (p_NK - p_NK.detach()) @ codebook_KD
        losses = {}
        if self.config.kl_weight:
            log_p_NK = logits_NK.log_softmax(1)
            losses["kl"] = math.log(len(codebook_KD)) + (log_p_NK.exp() * log_p_NK).sum(1).mean()
        return codes_ND.detach() + (soft_ND - soft_ND.detach()), indices_N, losses
