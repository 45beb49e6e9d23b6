"""The total loss: raw terms by name, their weights from the config, one sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from ibq.config import TrainConfig


def pixel_loss(originals: torch.Tensor, reconstructions: torch.Tensor, kind: Literal["l1", "l2"]) -> torch.Tensor:
    """Mean absolute or mean squared difference of two image batches of one shape, a scalar."""
    difference = originals - reconstructions
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def loss_weights(config: TrainConfig) -> dict[str, float]:
    """Weight of every raw term of a tokenizer's objective."""
    return {"pixel": config.loss.pixel_weight} | config.quantizer.loss_weights


def weighted_sum(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The one place where loss terms are added.

    Raises:
        ValueError: a term has no weight or a weight no term; nothing is dropped in silence.
    """
    if terms.keys() != weights.keys():
        raise ValueError(f"loss terms {sorted(terms)} and weights {sorted(weights)} differ; every term needs exactly one weight")
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum() if terms else torch.zeros(())
