"""Optimizers of both stages, and how learning rate and weight decay go over a run."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from ibq.schema import Frozen


class OptimConfig(Frozen):
    """Adam, and how the learning rate goes: from 0 up over `warmup`, then in steps ("multi-step") or along half a
    cosine ("cosine").

    `milestones` are fractions of the run (the paper: epochs 250 and 300 of 330, each times 0.1).
    """

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.5, 0.9)
    schedule: Literal["multi-step", "cosine"] = "multi-step"
    milestones: tuple[float, ...] = (250 / 330, 300 / 330)
    decay_factor: float = Field(0.1, gt=0, le=1)
    final_factor: float = Field(0.0, ge=0, le=1, description="share of lr that a cosine ends at")
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the run over which the rate rises linearly")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; None: as it is")
    ema_decay: float = Field(0.98, ge=0, lt=1, description="decay per step of the averaged weights that are evaluated")

    @model_validator(mode="after")
    def _ranges(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both lie in [0, 1)")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m <= 1 for m in self.milestones):
            raise ValueError(f"milestones={self.milestones} must be ascending fractions of the run in (0, 1]")
        if self.final_factor and self.schedule != "cosine":
            raise ValueError(
                f"final_factor={self.final_factor} is where a cosine ends; set schedule='cosine' or leave it out"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of the update that follows `step` finished updates of a run of `steps`."""
        rising = math.ceil(self.warmup * steps - 1e-9)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        if self.schedule == "cosine":
            progress = (step - rising) / max(1, steps - rising)
            return self.lr * (self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * progress)) / 2)
        passed = sum(step >= math.ceil(fraction * steps - 1e-9) for fraction in self.milestones)
        return self.lr * self.decay_factor**passed


class AdamWConfig(Frozen):
    """AdamW. The learning rate rises linearly, rests on a plateau and falls linearly. The paper has 1e-4 for every 256
    images of a batch; the released code a warm-up over 6 epochs of 300, a plateau of 5%, no averaged weights, and
    weight decay on all parameters, norms and biases among them.
    """

    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    final_weight_decay: float | None = Field(
        None, ge=0, description="what half a cosine over the run brings weight_decay to; None: it stays"
    )
    decayed: Literal["all", "matrices"] = Field(
        "all", description="parameters with weight decay; matrices: neither norms nor biases, as in nanoGPT"
    )
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the run over which the rate rises")
    plateau: float = Field(0.05, ge=0, lt=1, description="fraction of the run over which it then stays")
    final_factor: float = Field(0.1, ge=0, le=1, description="share of lr that the last step comes down to")
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient; None: as it is")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay per step of averaged weights, which are then the result; None: none"
    )

    @model_validator(mode="after")
    def _ranges(self) -> AdamWConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both lie in [0, 1)")
        if self.warmup + self.plateau > 1:
            raise ValueError(
                f"warmup={self.warmup} and plateau={self.plateau} are fractions of one run; let their sum be at most 1"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of the update that follows `step` finished updates of a run of `steps`."""
        rising = math.ceil(self.warmup * steps - 1e-9)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        rested = rising + math.ceil(self.plateau * steps - 1e-9)
        if step < rested:
            return self.lr
        return self.lr * (1 - (1 - self.final_factor) * (step + 1 - rested) / (steps - rested))

    def decay(self, step: int, steps: int) -> float:
        """Weight decay of the update that follows `step` finished updates of a run of `steps`."""
        if self.final_weight_decay is None:
            return self.weight_decay
        share = (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2
        return self.final_weight_decay + (self.weight_decay - self.final_weight_decay) * share
