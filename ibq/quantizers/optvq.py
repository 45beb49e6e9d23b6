"""OptVQ (arXiv 2412.15195): in training a batch is assigned to the codes by optimal transport, so that each code gets
its share of tokens.

The index of a token is the largest entry of its row in Q = Sinkhorn(exp(-epsilon A)), A the distances |z - c| divided
by their standard deviation and shifted to begin at 0; five iterations, in which each code's weight is made 1/K, then
each token's 1/N. What it changes against VQ: the code chosen is not the nearest; crowded codes are too dear, and no
code stays unused for long. Since an iteration ends with the tokens, a row of Q is softmax over k of U_k - epsilon A_nk,
and only the K numbers U (one a code) depend on the other tokens.

Differences from the authors' code. In evaluation they transport each batch too: usage is then near 100% by
construction, and a token depends on the pictures beside it; here it is the nearest code, as this contract has it, and a
forward in training mode shows the other. In several processes they standardise each process's distances by themselves;
here, with `group`, all is over the tokens of all processes. Their four or eight heads (a codebook's codes side by side)
are left out. Suffixes: N tokens, n tokens of one chunk, D code dimension, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn

from ibq.ops.arguments import require_finite
from ibq.ops.chunked import MEMORY_BYTES, chunks
from ibq.ops.precision import at_least_float32, coarse_center, full_float32
from ibq.quantizers.base import CodebookQuantizer, Quantizer, quantization_terms, straight_through
from ibq.quantizers.config import CodebookConfig, CodebookInit
from ibq.quantizers.vq import linear, linear_from_identity, nearest_with_entropies

SUM_EPS, STD_EPS = 1e-8, 1e-6
"""Added to each sum before it divides, as released: a code too far from all tokens is not lifted to its share."""


class OptVQConfig(CodebookConfig):
    """Terms and entropy penalty as in `VQConfig`. As published the codes are a learnt linear map of a learnt embedding
    (here beginning as the identity); "none" leaves the map out."""

    method: Literal["optvq"] = "optvq"
    epsilon: float = Field(10.0, gt=0, description="factor on standardised distances; higher: nearer to the nearest")
    iterations: int = Field(5, strict=True, ge=1, description="of Sinkhorn's algorithm")
    reparametrization: Literal["none", "linear"] = Field("linear", description="codes = embedding W")

    @property
    def places_codes(self) -> bool:
        return self.reparametrization == "none"


class OptimalTransportQuantizer(CodebookQuantizer, config=OptVQConfig):
    """In training the transported code, in evaluation the nearest by Euclidean distance.

    Gradient reach: z through the straight-through copy and `commitment`; selected codes through `codebook`; all codes
    and z through the two entropy terms. With the linear map W receives every gradient of a code, and so all codes move.
    `group` shares the transport too: all processes take the marginals of all tokens.
    """

    config: OptVQConfig
    paper = "OptVQ, arXiv 2412.15195"

    def __init__(self, config: OptVQConfig) -> None:
        super().__init__(config)
        self.projection = linear_from_identity(config.code_dim) if config.reparametrization == "linear" else None

    @property
    def codebook(self) -> torch.Tensor:
        embedding_KD = at_least_float32(self.embedding)
        return embedding_KD if self.projection is None else linear(self.projection, embedding_KD)

    @torch.no_grad()
    def place_codes(self, features_MD: torch.Tensor, generator: torch.Generator, init: CodebookInit) -> None:
        """As `CodebookQuantizer.place_codes`; the map becomes the identity again, so that the codes are what they
        were set to."""
        super().place_codes(features_MD, generator, init)  # which may refuse them
        if self.projection is not None:
            nn.init.eye_(self.projection.weight)

    def restart_codes(
        self, dead_K: torch.Tensor, features_MD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        if self.projection is not None:
            return Quantizer.restart_codes(self, dead_K, features_MD, generator)
        return super().restart_codes(dead_K, features_MD, generator)

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        codebook_KD, config = self.codebook, self.config
        temperature = config.active_entropy_temperature
        entropies: dict[str, torch.Tensor] = {}
        if temperature is not None or not self.training:
            indices_N, entropies = nearest_with_entropies(z_ND, codebook_KD, temperature, self.training_group)
        if self.training:
            indices_N = transported(z_ND, codebook_KD, config.epsilon, config.iterations, self.group)
        codes_ND = codebook_KD[indices_N]
        return straight_through(z_ND, codes_ND), indices_N, quantization_terms(z_ND, codes_ND) | entropies


@torch.no_grad()
def transported(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, epsilon: float, iterations: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Index (N,) of the largest entry of each token's row after Sinkhorn's iterations, not differentiable.

    Distances are taken in chunks of tokens, iterations + 2 times, or kept where all of them fit into the memory of the
    operators' buffers: memory grows with N + K.

    Raises:
        NonFiniteInputError: the codebook has NaN or infinite values.
    """
    require_finite(codebook=codebook_KD)
    with full_float32(z_ND.device):
        costs = Costs(z_ND, codebook_KD, epsilon, group)
        log_weight_K = sinkhorn(costs, iterations)
        return torch.cat([(log_nK + log_weight_K).argmax(1) for _, log_nK in costs])


class Costs:
    """The logarithms -epsilon A of the entries that Sinkhorn begins with: iterating gives (rows, log_nK) of each chunk.

    Attributes:
        rows: N, tokens of this process.
        tokens: those of all processes of the group.
    """

    def __init__(
        self, z_ND: torch.Tensor, codebook_KD: torch.Tensor, epsilon: float, group: dist.ProcessGroup | None
    ) -> None:
        center_D = coarse_center(codebook_KD)
        self.group, self._z_ND, self._codebook_KD = group, z_ND - center_D, codebook_KD - center_D
        self._norm_K = self._codebook_KD.square().sum(1)
        self._chunks = list(chunks(z_ND, codebook_KD))
        self.rows, K = len(z_ND), len(codebook_KD)
        kept = self.rows * K * z_ND.element_size() <= MEMORY_BYTES
        distances: Iterable[torch.Tensor] = (self._distances(chunk) for chunk in self._chunks)
        if kept:
            distances = list(distances)

        moments_3 = torch.tensor([self.rows * K, 0, 0], dtype=torch.float64, device=z_ND.device)
        least = z_ND.new_tensor(math.inf)
        for distance_nK in distances:
            moments_3[1] += distance_nK.sum(dtype=torch.float64)
            moments_3[2] += torch.linalg.vector_norm(distance_nK, dtype=torch.float64).square()
            least = torch.minimum(least, distance_nK.min())
        if group is not None:
            dist.all_reduce(moments_3, group=group)
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
        count, total, squares = moments_3
        deviation = ((squares - total.square() / count).clamp_min(0) / (count - 1).clamp_min(1)).sqrt()
        self.tokens = int(count) // K
        self._least, self._factor = least, (epsilon / (deviation + STD_EPS)).to(z_ND.dtype)
        self._kept = [self._logarithms(distance_nK) for distance_nK in distances] if kept else None

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._kept is not None:
            return zip(self._chunks, self._kept, strict=True)
        return ((chunk, self._logarithms(self._distances(chunk))) for chunk in self._chunks)

    def sum_over_tokens(self, log_parts_K: Iterable[torch.Tensor]) -> torch.Tensor:
        """log of the sum of the chunks' parts, given as logarithms, over all processes."""
        log_sum_K = reduce(torch.logaddexp, log_parts_K)
        if self.group is None:
            return log_sum_K
        dist.all_reduce(greatest_K := log_sum_K.clone(), op=dist.ReduceOp.MAX, group=self.group)
        dist.all_reduce(sum_K := (log_sum_K - greatest_K).exp(), group=self.group)
        return greatest_K + sum_K.log()

    def _logarithms(self, distance_nK: torch.Tensor) -> torch.Tensor:
        return distance_nK.sub_(self._least).mul_(-self._factor)

    def _distances(self, chunk: slice) -> torch.Tensor:
        z_nD = self._z_ND[chunk]
        square_nK = torch.addmm(self._norm_K, z_nD, self._codebook_KD.T, alpha=-2)
        return square_nK.add_(z_nD.square().sum(1, keepdim=True)).clamp_min_(0).sqrt_()


def sinkhorn(costs: Costs, iterations: int) -> torch.Tensor:
    """Logarithms U (K,) of what Sinkhorn multiplies the columns of exp(-epsilon A) with.

    Of the last iteration the division by the sums of rows is left out, as it changes the order in no row.
    """
    log_sum_K = costs.sum_over_tokens(log_nK.logsumexp(0) for _, log_nK in costs)
    log_u_K = -_plus_eps(log_sum_K.logsumexp(0)).expand_as(log_sum_K)
    log_v_N = log_sum_K.new_zeros(costs.rows)
    for iteration in range(iterations):
        if iteration:
            log_sum_K = costs.sum_over_tokens(_columns_of_equal_rows(costs, log_u_K, log_v_N))
        log_u_K = log_u_K - _plus_eps(log_u_K + log_sum_K) - math.log(len(log_u_K))
    return log_u_K


def _columns_of_equal_rows(costs: Costs, log_u_K: torch.Tensor, log_v_N: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunk by chunk, factors v of the tokens that make each row's sum 1 / N, in place, and then the sums of columns
    but for u."""
    for chunk, log_nK in costs:
        log_v_N[chunk] -= _plus_eps((log_nK + log_u_K).logsumexp(1) + log_v_N[chunk]) + math.log(costs.tokens)
        yield (log_nK + log_v_N[chunk, None]).logsumexp(0)


def _plus_eps(log_sum: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(log_sum, log_sum.new_tensor(SUM_EPS).log())
