"""Pictures drawn for tests, and pictures read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def draw(path: Path, width: int, height: int, mode: str = "RGB", seed: int = 0) -> Path:
    """Smooth random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def pixels(path: Path) -> torch.Tensor:
    """(1, C, H, W) uint8 of a PNG."""
    array = np.asarray(Image.open(path))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1).copy())[None]
