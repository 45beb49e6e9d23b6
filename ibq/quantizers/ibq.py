"""Index Backpropagation Quantization (arXiv 2412.02692): the straight-through step on the one-hot index instead of on the code.

What it changes against VQ: the nearest code by dot product, and a gradient that reaches z and every code through softmax(z C^T).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ibq.ops import index_backprop
from ibq.quantizers.base import CodebookConfig, CodebookInit, CodebookQuantizer, quantization_terms
from ibq.quantizers.entropy import entropy_terms


class IBQConfig(CodebookConfig):
    """Defaults are the released recipe (PAPER sections 3 and 4): N(0, 1), beta on the codebook term, double term, entropy weight 0.05."""

    method: Literal["ibq"] = "ibq"
    codebook_init: CodebookInit = "normal"
    entropy_weight: float = Field(0.05, ge=0)
    double: bool = Field(True, strict=True)
    """The extra term |z_q - z|^2 without stop-gradient."""
    matmul_precision: Literal["float32", "bfloat16"] = "float32"
    """Of the factors of the operator's matrix products; sums, softmax and entropies are float32 in any case."""

    @property
    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights | ({"double": 1.0} if self.double else {})


class IndexBackpropQuantizer(CodebookQuantizer, config=IBQConfig):
    """Nearest code by dot product, index backpropagation.

    Gradient reach: z and all codes through z_q, `double` and the entropy terms; z alone through `commitment`, selected codes alone through
    `codebook`.
    """

    config: IBQConfig

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        tau = self.config.active_entropy_temperature
        matmul_dtype = torch.bfloat16 if self.config.matmul_precision == "bfloat16" else None
        z_q_ND, indices_N, *both = index_backprop(z_ND, self.codebook, entropy_temperature=tau, matmul_dtype=matmul_dtype)
        losses = quantization_terms(z_ND, self.codebook[indices_N]) | entropy_terms(*both)
        if self.config.double:
            losses["double"] = (z_q_ND - z_ND).square().mean()
        return z_q_ND, indices_N, losses
