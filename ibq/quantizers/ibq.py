"""Index Backpropagation Quantization (arXiv 2412.02692): the straight-through step on the one-hot index instead of on
the code.

What it changes against VQ: the nearest code by dot product, and a gradient that reaches z and every code through
softmax(z C^T). Its parts can be taken away one by one, to see which of them it needs:
    soft_path    "features": p is detached for the codes, which keep the one-hot path alone, so that unselected ones
                 get nothing from z_q;
                 "codes": p is detached for the features, which get VQ's straight-through copy instead
    top_m        p is the softmax over a token's m largest logits alone: index backpropagation on its m best codes; m
                 = 1 is the one-hot
                 path alone (and none for features), m = K is IBQ
    logit_scale  a factor on the logits, as a number or 1/sqrt(D). Logits with N(0, 1) codes spread as |z|, which
                 grows with sqrt(D): at
                 D = 256 p is nearly one-hot, so that a token hears of one code and few tokens pass a gradient. The
                 entropies' softmax has
                 the same trouble, so the factor is on its logits too: its temperature is then worth the same at every D
    similarity   "cosine": features and codes at unit length, in the logits and in z_q
Suffixes: N tokens, D code dimension, K codes, m best codes of a token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator

from ibq.ops import index_backprop
from ibq.ops.precision import at_least_float32, full_float32
from ibq.quantizers.base import CodebookQuantizer, quantization_terms
from ibq.quantizers.config import CodebookConfig, CodebookInit
from ibq.quantizers.entropy import entropy_terms
from ibq.schema import Backend

CHUNK_ELEMENTS = 2**24


class IBQConfig(CodebookConfig):
    """Defaults are the released recipe (docs/method.md sections 3 and 4): N(0, 1), beta on the codebook term, double
    term, entropy weight 0.05.

    The entropies are of softmax(logit_scale z C^T / entropy_temperature), with their full gradient whatever soft_path
    and top_m say.
    """

    method: Literal["ibq"] = "ibq"
    codebook_init: CodebookInit = "normal"
    entropy_weight: float = Field(0.05, ge=0)
    double: bool = Field(True, strict=True)
    """The extra term |z_q - z|^2 without stop-gradient."""
    soft_path: Literal["both", "features", "codes"] = "both"
    top_m: int | None = Field(None, strict=True, ge=1)
    logit_scale: Literal["inverse_sqrt_dim"] | PositiveFloat = 1.0
    similarity: Literal["dot", "cosine"] = "dot"
    matmul_precision: Literal["float32", "bfloat16"] = "float32"
    """Of the factors of the operator's matrix products; sums, softmax and entropies are float32 in any case."""

    @model_validator(mode="after")
    def _fits_together(self) -> IBQConfig:
        if self.top_m is not None and self.top_m > self.codebook_size:
            raise ValueError(
                f"top_m={self.top_m} exceeds codebook_size={self.codebook_size}; lower it, or set None for all codes"
            )
        if self.matmul_precision != "float32" and (self.soft_path != "both" or self.top_m is not None):
            raise ValueError(
                f"matmul_precision={self.matmul_precision!r} is for the whole method, not for "
                f"soft_path={self.soft_path!r} and "
                f"top_m={self.top_m}; set 'float32'"
            )
        return self

    @property
    def unit_norm(self) -> bool:
        return self.similarity == "cosine"

    @property
    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights | ({"double": 1.0} if self.double else {})

    @property
    def scale(self) -> float:
        """The factor on the logits as a number."""
        return self.code_dim**-0.5 if isinstance(self.logit_scale, str) else self.logit_scale


class IndexBackpropQuantizer(CodebookQuantizer, config=IBQConfig):
    """Nearest code by dot product, index backpropagation.

    Gradient reach: z and all codes through z_q, `double` and the entropy terms; z alone through `commitment`, selected
    codes alone through `codebook`. With soft_path="features" z_q and `double` reach selected codes only, with top_m the
    m best of some token; with soft_path="codes" `double` is left with the codes, because the copied gradient of z_q and
    that of z cancel in it.
    """

    config: IBQConfig
    paper = "IBQ, arXiv 2412.02692"
    backend: Backend = "auto"
    """Of the operator."""

    @property
    def logit_scale(self) -> float:
        return self.config.scale

    def logits(self, z_ND: torch.Tensor) -> torch.Tensor:
        with full_float32(z_ND.device):
            return self.config.scale * self.to_code_space(at_least_float32(z_ND)) @ self.codebook.T

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        z_ND, codebook_KD = self.to_code_space(z_ND), self.codebook
        query_ND = self.config.scale * z_ND
        tau = self.config.active_entropy_temperature
        matmul_dtype = torch.bfloat16 if self.config.matmul_precision == "bfloat16" else None
        z_q_ND, indices_N, *both = index_backprop(
            query_ND,
            codebook_KD,
            entropy_temperature=tau,
            backend=self.backend,
            matmul_dtype=matmul_dtype,
            group=self.training_group,
        )
        codes_ND = codebook_KD[indices_N]
        if self.config.soft_path != "both" or self.config.top_m is not None:
            z_q_ND = self._controlled(z_ND, query_ND, codebook_KD, codes_ND)
        losses = quantization_terms(z_ND, codes_ND) | entropy_terms(*both)
        if self.config.double:
            losses["double"] = (z_q_ND - z_ND).square().mean()
        return z_q_ND, indices_N, losses

    def _controlled(
        self, z_ND: torch.Tensor, query_ND: torch.Tensor, codebook_KD: torch.Tensor, codes_ND: torch.Tensor
    ) -> torch.Tensor:
        """z_q with the gradient that soft_path and top_m leave: to its value, the codes, come paths of value zero."""
        soft_path, m = self.config.soft_path, self.config.top_m
        query_ND = query_ND.detach() if soft_path == "codes" else query_ND
        keys_KD = codebook_KD.detach() if soft_path == "features" else codebook_KD
        z_q_ND = codes_ND + soft_path_alone(query_ND, keys_KD, m or len(keys_KD))
        return z_q_ND + (z_ND - z_ND.detach()) if soft_path == "codes" else z_q_ND


def soft_path_alone(query_ND: torch.Tensor, keys_KD: torch.Tensor, m: int) -> torch.Tensor:
    """(p - sg(p)) C: zeros (N, D) with the gradient of the soft path, p the softmax over each row's m largest
    logits."""
    if m == len(keys_KD):
        z_q_ND, indices_N, *_ = index_backprop(query_ND, keys_KD, entropy_temperature=None)
        return z_q_ND - keys_KD[indices_N]
    with full_float32(query_ND.device):
        with torch.no_grad():
            chunks = query_ND.split(math.ceil(CHUNK_ELEMENTS / len(keys_KD)))
            best_Nm = torch.cat([(query_nD @ keys_KD.T).topk(m).indices for query_nD in chunks])
        best_NmD = keys_KD[best_Nm]
        p_N1m = (query_ND[:, None] @ best_NmD.mT).softmax(2)
        return ((p_N1m - p_N1m.detach()) @ best_NmD.detach()).squeeze(1)
