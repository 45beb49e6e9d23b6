"""Vector quantization: the nearest code, and a gradient that passes it by (VQ-VAE, arXiv 1711.00937; VQGAN, arXiv
2012.09841).

The baseline that collapses: the decoder's gradient is copied to z, and without the entropy penalty only selected codes
receive any. What people do about it, each a field of its own:
    distance           cosine: features and codes at unit length, as in LlamaGen (arXiv 2406.06525) with D = 8
    ema_decay          codes as moving averages of their features instead of by gradient (VQ-VAE-2, arXiv 1906.00446)
    restart            dead codes begin anew at features (Jukebox, arXiv 2005.00341), or all are drawn to them
                       (CVQ-VAE, arXiv 2307.15139)
    codebook_init      "features", "kmeans"
    gradient           rotation: the rotation trick (arXiv 2410.06424)
    reparametrization  linear: codes = embedding W, both learnt, so that every step moves every code (SimVQ freezes
                       the embedding)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from ibq.errors import ConfigError
from ibq.ops import index_backprop, nearest_code
from ibq.ops.precision import at_least_float32
from ibq.quantizers.base import CodebookQuantizer, Quantizer, quantization_terms, rotation, straight_through
from ibq.quantizers.config import CodebookConfig, CodebookInit
from ibq.quantizers.entropy import entropy_terms, euclidean_as_dot
from ibq.quantizers.updates import (
    DeadRestart,
    MovingAverage,
    OnlineClustering,
    Restart,
    move,
    recomputing,
    refuse_sharding,
)


class VQConfig(CodebookConfig):
    """docs/method.md section 2. The entropy penalty, when on, is that of IBQ with the logits -|z - c|^2 (2 cos - 2
    where the distance is cosine).

    With `ema_decay` there is no codebook term, and the entropy penalty, when on, moves features alone.
    `restart_threshold` is a share of the uniform usage 1/K. After a restart Adam's moments of a code remain what they
    were; averaged weights follow at once (`sync_average`).
    """

    method: Literal["vq"] = "vq"
    distance: Literal["euclidean", "cosine"] = Field("euclidean", description="cosine: LlamaGen, arXiv 2406.06525")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="VQ-VAE-2, arXiv 1906.00446")
    restart: Literal["none", "dead", "online"] = Field(
        "none", description="dead: Jukebox, 2005.00341; online: CVQ-VAE, arXiv 2307.15139"
    )
    restart_threshold: float = Field(0.1, gt=0, lt=1, description="usage, over 1/K, below which a code is dead")
    usage_decay: float = Field(0.99, gt=0, lt=1, description="of the running average of usage, per step")
    gradient: Literal["straight_through", "rotation"] = Field(
        "straight_through", description="rotation trick: arXiv 2410.06424"
    )
    reparametrization: Literal["none", "linear"] = Field(
        "none", description="codes = embedding W; SimVQ, arXiv 2411.02038"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> VQConfig:
        if self.ema_decay is not None:
            given = f"ema_decay={self.ema_decay} sets codes without a gradient, but"
            if self.beta_on != "commitment":
                raise ValueError(f"{given} beta_on={self.beta_on!r} weighs the codebook term; set beta_on='commitment'")
            if self.reparametrization == "linear":
                raise ValueError(
                    f"{given} reparametrization='linear' needs one; set ema_decay=None or reparametrization='none'"
                )
            if self.restart == "online":
                raise ValueError(
                    f"{given} restart='online' moves codes that have one; set ema_decay=None or restart='dead'"
                )
        if self.reparametrization == "linear" and self.restart != "none":
            raise ValueError(
                f"restart={self.restart!r} places single codes, but reparametrization='linear' moves all together; "
                "set restart='none' or reparametrization='none'"
            )
        return self

    @property
    def loss_weights(self) -> dict[str, float]:
        weights = super().loss_weights
        return (
            weights
            if self.ema_decay is None
            else {name: weight for name, weight in weights.items() if name != "codebook"}
        )

    @property
    def unit_norm(self) -> bool:
        return self.distance == "cosine"

    @property
    def changes_in_forward(self) -> bool:
        return self.ema_decay is not None or self.restart != "none"

    @property
    def places_codes(self) -> bool:
        return self.reparametrization == "none"


class VectorQuantizer(CodebookQuantizer, config=VQConfig):
    """Nearest code by Euclidean distance.

    Gradient reach: z through the straight-through copy (or the rotation) and `commitment`; selected codes through
    `codebook`; all codes and z through the two entropy terms, where the config has them. With `ema_decay` no code has a
    gradient. With linear reparametrisation W receives every gradient of a code, and so all codes move.
    """

    config: VQConfig
    paper = "VQ-VAE, arXiv 1711.00937"

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.projection = linear_from_identity(config.code_dim) if config.reparametrization == "linear" else None
        self.moving_average, self.restart = None, self._restart(config)
        self._updated_at: int | None = None
        if config.ema_decay is not None:
            self.embedding.requires_grad_(False)
            self.moving_average = MovingAverage(self.embedding, config.ema_decay)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "embedding" and self.config.changes_in_forward:
            refuse_sharding(value)
        super().__setattr__(name, value)

    def _restart(self, config: VQConfig) -> Restart | None:
        if config.restart == "dead":
            return DeadRestart(self.embedding, config.usage_decay, config.restart_threshold)
        return OnlineClustering(self.embedding, config.usage_decay) if config.restart == "online" else None

    @property
    def codebook(self) -> torch.Tensor:
        embedding_KD = at_least_float32(self.embedding)
        if self.training and self.restart is not None and self.config.unit_norm:
            embedding_KD = embedding_KD.clone()  # what a backward pass needs must outlive the next forward's restarts
        return self.to_code_space(embedding_KD if self.projection is None else linear(self.projection, embedding_KD))

    def place_codes(self, features_MD: torch.Tensor, generator: torch.Generator, init: CodebookInit) -> None:
        super().place_codes(features_MD, generator, init)
        if self.moving_average is not None:
            self.moving_average.start_from(self.embedding)

    @torch.no_grad()
    def restart_codes(
        self, dead_K: torch.Tensor, features_MD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        if self.projection is not None:
            return Quantizer.restart_codes(self, dead_K, features_MD, generator)
        moved_K = super().restart_codes(dead_K, features_MD, generator)
        if self.moving_average is not None:
            self.moving_average.restart(moved_K.to(self.moving_average.counts_K.dtype), self.embedding)
        return moved_K

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        moves_codes = self.training and not recomputing()
        if moves_codes:
            self._apply_updates()
        z_ND, codebook_KD = self.to_code_space(z_ND), self.codebook
        indices_N, entropies = nearest_with_entropies(
            z_ND, codebook_KD, self.config.active_entropy_temperature, self.training_group
        )
        codes_ND = codebook_KD[indices_N]
        z_q_ND = (rotation if self.config.gradient == "rotation" else straight_through)(z_ND, codes_ND)
        losses = quantization_terms(z_ND, codes_ND) | entropies
        if self.moving_average is not None:
            del losses["codebook"]
        if moves_codes:
            self._observe(z_ND.detach().to(codebook_KD.dtype), indices_N, codebook_KD.detach())
        return z_q_ND, indices_N, losses

    @torch.no_grad()
    def _apply_updates(self) -> None:
        """Codebook updates from the training forward before this one.

        Raises:
            ConfigError: the step that `set_step` has named had its forward already.
        """
        if not self.config.changes_in_forward:
            return
        if self.step is not None and self.step == self._updated_at:
            raise ConfigError(
                f"ema_decay={self.config.ema_decay} and restart={self.config.restart!r} move codes once a step, and "
                f"step {self.step} had its training forward already; quantize all its features in one call, or take "
                f"moving averages and restarts away"
            )
        self._updated_at = self.step
        for accumulator in (self.moving_average, self.restart):
            if accumulator is not None:
                accumulator.require_wide()
        if self.moving_average is not None:
            self.moving_average.apply_to(self.embedding)
        if self.restart is not None:
            self.restart.apply_to(self.embedding)
        if self.moving_average is not None and self.restart is not None:
            self.moving_average.restart(self.restart.weight_K, self.restart.anchors_KD)

    @torch.no_grad()
    def sync_average(self, average: Quantizer) -> None:
        """Moving averages are not averaged again; by as much as the last forward moved a code to its anchor, its
        average moves to it."""
        assert isinstance(average, VectorQuantizer)
        if self.moving_average is not None:
            average.embedding.copy_(self.embedding)
        elif self.restart is not None:
            move(average.embedding, self.embedding, self.restart.applied_K)

    def _observe(self, z_ND: torch.Tensor, indices_N: torch.Tensor, codebook_KD: torch.Tensor) -> None:
        if self.moving_average is not None:
            self.moving_average.observe(z_ND, indices_N)
        if self.restart is not None:
            self.restart.observe(z_ND, indices_N, codebook_KD)


def linear(layer: nn.Linear, codes_KD: torch.Tensor) -> torch.Tensor:
    """The layer's map of codes, in their type whatever the layer was cast to."""
    bias_D = None if layer.bias is None else layer.bias.to(codes_KD.dtype)
    return F.linear(codes_KD, layer.weight.to(codes_KD.dtype), bias_D)


def linear_from_identity(D: int) -> nn.Linear:
    """A linear map of codes without bias that begins as the identity, so that the codebook begins as its initialisation
    says."""
    projection = nn.Linear(D, D, bias=False)
    nn.init.eye_(projection.weight)
    return projection


def nearest_with_entropies(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Indices of the Euclidean nearest codes, and the entropy terms of softmax(-|z - c|^2 / temperature) where there is
    a temperature.

    The mean assignment is that of the group's processes, or local."""
    if temperature is None:
        return nearest_code(z_ND, codebook_KD), {}
    _, indices_N, *both = index_backprop(
        *euclidean_as_dot(z_ND, codebook_KD), entropy_temperature=temperature, group=group
    )
    return indices_N, entropy_terms(*both)
