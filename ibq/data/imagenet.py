"""ImageNet (ILSVRC 2012) as the unit of the paper's schedules."""

from __future__ import annotations

IMAGENET_IMAGES = 1_281_167
"""Training images."""


def imagenet_steps(epochs: int, batch_size: int = 256) -> int:
    """Training steps of so many passes over ImageNet; the last images of a pass, too few for a batch, are left out of
    it."""
    return epochs * (IMAGENET_IMAGES // batch_size)
