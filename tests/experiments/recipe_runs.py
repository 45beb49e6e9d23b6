"""A tiny run of a recipe on a folder of sixteen pictures, as a command line."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

FIELDS = {
    "data.crop": "center",
    "data.resolution": "32",
    "model.base_channels": "4",
    "model.norm_groups": "4",
    "model.res_blocks": "1",
    "model.z_channels": "8",
    "model.attention_resolutions": "[]",
    "loss.perceptual": "none",
    "loss.adversarial.channels": "8",
    "loss.adversarial.layers": "2",
    "quantizer.codebook_size": "16",
    "quantizer.code_dim": "8",
    "batch_size": "8",
    "accumulate": "2",
    "precision": "fp32",
}


def write_pictures(folder: Path) -> Path:
    """Sixteen pictures in train/, eight in val/."""
    for split, count in (("train", 16), ("val", 8)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            noise_HWC = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
            Image.fromarray(noise_HWC.numpy()).save(folder / split / f"{i}.png")
    return folder


def command(pictures: Path, out: Path, steps: int, **fields: str) -> list[str]:
    """What follows python -m experiments; fields by dotted path."""
    changes = [part for name, value in (FIELDS | {"steps": str(steps)} | fields).items() for part in ("--set", f"{name}={value}")]
    return ["train", "imagenet256_ibq_1024", "--data", str(pictures), "--out", str(out), "--device", "cpu", *changes]
