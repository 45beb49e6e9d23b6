"""SimVQ (arXiv 2411.02038): codes are a frozen random embedding times a learnt linear map.

What it changes against VQ: a gradient of any selected code moves the map, and with it every code; the codes span a
    space that turns as one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ibq.distributed import copy_from_first
from ibq.ops.precision import at_least_float32
from ibq.quantizers.base import KMEANS_FEATURES, Quantizer, quantization_terms, straight_through
from ibq.quantizers.config import TermsConfig
from ibq.quantizers.updates import kmeans
from ibq.quantizers.vq import linear, nearest_with_entropies


class SimVQConfig(TermsConfig):
    """Terms and entropy penalty as in `VQConfig`. The embedding is drawn from N(0, 1/D); the map is a torch linear
    layer, with its bias."""

    method: Literal["simvq"] = "simvq"


class SimVectorQuantizer(Quantizer, config=SimVQConfig):
    """Nearest projected code by Euclidean distance.

    Gradient reach: z through the straight-through copy and `commitment`; the map, and so all codes, through `codebook`;
    z and the map through the two entropy terms. The embedding is a parameter without gradient.
    """

    config: SimVQConfig
    paper = "SimVQ, arXiv 2411.02038"

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__(config)
        K, D = config.codebook_size, config.code_dim
        self.embedding = nn.Parameter(torch.randn(K, D) * D**-0.5, requires_grad=False)
        self.projection = nn.Linear(D, D)

    @property
    def codebook(self) -> torch.Tensor:
        return linear(self.projection, at_least_float32(self.embedding))

    @property
    def features_to_cluster(self) -> int:
        return self.config.codebook_size * KMEANS_FEATURES

    @torch.no_grad()
    def cluster(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        """The frozen embedding becomes the centers, and the map the identity."""
        self.embedding.copy_(kmeans(features_MD, self.config.codebook_size, generator))
        copy_from_first(self.embedding)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        codebook_KD = self.codebook
        indices_N, entropies = nearest_with_entropies(
            z_ND, codebook_KD, self.config.active_entropy_temperature, self.training_group
        )
        codes_ND = codebook_KD[indices_N]
        return straight_through(z_ND, codes_ND), indices_N, quantization_terms(z_ND, codes_ND) | entropies
