"""Tiny runs of recipes on a folder of sixteen pictures, as command lines."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from experiments.cli.base import changes
from experiments.imagenet256.tokenizers import TOKENIZERS
from ibq.models.tokenizer import Tokenizer

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
TRANSFORMER_FIELDS = {
    "data.crop": "center",
    "data.resolution": "64",
    "model.depth": "1",
    "classes": "2",
    "batch_size": "8",
    "accumulate": "2",
    "precision": "fp32",
}
"""Of a transformer: 4 × 4 tokens of 16 codes."""


def write_pictures(folder: Path, classes: int = 0, side: int = 32) -> Path:
    """Sixteen pictures in train/, eight in val/; in turns of each class, where there are classes."""
    for split, count in (("train", 16), ("val", 8)):
        for i in range(count):
            place = folder / split / f"class {i % classes}" if classes else folder / split
            place.mkdir(parents=True, exist_ok=True)
            noise_HWC = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)
            Image.fromarray(noise_HWC.numpy()).save(place / f"{i}.png")
    return folder


def tiny_tokenizer() -> Tokenizer:
    """Such a one, with weights as they begin."""
    fields = changes([f"{name}={value}" for name, value in FIELDS.items()])
    torch.manual_seed(0)
    return Tokenizer(TOKENIZERS["imagenet256_ibq_1024"]().with_fields(**fields))


def command(pictures: Path, out: Path, steps: int, **fields: str) -> list[str]:
    """Arguments after python -m experiments; fields by dotted path."""
    return [
        "train",
        "imagenet256_ibq_1024",
        "--data",
        str(pictures),
        "--out",
        str(out),
        "--device",
        "cpu",
        *_set(FIELDS, steps, fields),
    ]


def transformer_command(
    pictures: Path, tokenizer: Path, out: Path, steps: int, samples: int = 2, **fields: str
) -> list[str]:
    """The same of a transformer; the recipe is B's."""
    places = ["--data", str(pictures), "--tokenizer", str(tokenizer), "--out", str(out)]
    runtime = ["--device", "cpu", "--samples", str(samples), "--workers", "0"]
    return ["train", "imagenet256_transformer_b", *places, *runtime, *_set(TRANSFORMER_FIELDS, steps, fields)]


def _set(usual: dict[str, str], steps: int, fields: dict[str, str]) -> list[str]:
    return [
        part
        for name, value in (usual | {"steps": str(steps)} | fields).items()
        for part in ("--set", f"{name}={value}")
    ]
