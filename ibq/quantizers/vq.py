"""Vector quantization with a Euclidean nearest code and a straight-through gradient (VQ-VAE, arXiv 1711.00937; VQGAN, arXiv 2012.09841).

The baseline that collapses: the decoder's gradient is copied to z, and without the entropy penalty only selected codes receive any.
"""

from __future__ import annotations

from typing import Literal

import torch

from ibq.ops import index_backprop, nearest_code
from ibq.quantizers.base import CodebookConfig, CodebookQuantizer, quantization_terms
from ibq.quantizers.entropy import entropy_terms, euclidean_as_dot


class VQConfig(CodebookConfig):
    """PAPER section 2. The entropy penalty, when on, is that of IBQ with the logits -|z - c|^2."""

    method: Literal["vq"] = "vq"


class VectorQuantizer(CodebookQuantizer, config=VQConfig):
    """Nearest code by Euclidean distance.

    Gradient reach: z through the straight-through copy and `commitment`; selected codes through `codebook`; all codes and z through the two
    entropy terms, where the config has them.
    """

    config: VQConfig

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        tau = self.config.active_entropy_temperature
        if tau is None:
            indices_N, entropies = nearest_code(z_ND, self.codebook), {}
        else:
            _, indices_N, *both = index_backprop(*euclidean_as_dot(z_ND, self.codebook), entropy_temperature=tau)
            entropies = entropy_terms(*both)
        codes_ND = self.codebook[indices_N]
        z_q_ND = codes_ND.detach() + (z_ND - z_ND.detach())
        return z_q_ND, indices_N, quantization_terms(z_ND, codes_ND) | entropies
