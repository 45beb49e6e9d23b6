"""`ibq data NAME`: a data set is fetched where need be, and described."""

from __future__ import annotations

from typing import get_args

import torch

from ibq.config import DataConfig
from ibq.data import Split, load_images


def describe(name: str, resolution: int) -> None:
    """Print of each split: number, shape, content hash and source; of a folder also how many files are skipped.

    Raises:
        ConfigError, DataError: the name or the resolution cannot be used, or the data is not to be had.
    """
    config = DataConfig.parse({"name": name, "resolution": resolution})
    for split in get_args(Split):
        images = load_images(config, split)
        shape = "x".join(str(size) for size in images.pixels(torch.zeros(1, dtype=torch.int64)).shape[1:])
        facts = [f"{len(images):,} images of {shape}", f"hash {images.content_hash[:12]}", f"from {images.source}"]
        if config.kind == "imagefolder":
            facts.append(f"{len(images.skipped):,} skipped")
        print(f"{images.name} {split}: {', '.join(facts)}")
