"""Test split of a data set in place of a folder of pictures, for a tokenizer that may have been trained on other
data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ibq.cli.pictures import Picture
from ibq.config import DataConfig
from ibq.data import load_images
from ibq.errors import ConfigError


class DataPictures:
    """Test images of a data set at the resolution that a tokenizer was trained at.

    Args:
        name: the data set, as in `DataConfig`.
        trained: the data that the tokenizer was trained on.
        limit: only the first so many images.

    Attributes:
        names: of the images, by their place in the split.
        skipped: none.

    Raises:
        ConfigError: there is no such data set, or its channels are not the tokenizer's.
        DataError: it is not to be had, or does not come at this resolution.
    """

    def __init__(self, name: str, trained: DataConfig, limit: int | None = None) -> None:
        config = DataConfig.parse({"name": name, "resolution": trained.resolution})
        if config.kind == "imagefolder":
            raise ConfigError(f"--data {name} is a folder; name it as PICTURES")
        if config.channels != trained.channels:
            plural = "s" if config.channels > 1 else ""
            raise ConfigError(
                f"--data {name} has {config.channels} channel{plural} and the tokenizer {trained.channels}; name a "
                f"data set with as many"
            )
        self.skipped: list[str] = []
        self._images = load_images(config, "test")
        self._name = self._images.name
        self.names = [f"{self._name} {place}" for place in range(len(self._images))][:limit]

    def __str__(self) -> str:
        channels, height, width = self._images.pixels(torch.zeros(1, dtype=torch.int64)).shape[1:]
        return f"test split of {self._name}, {channels}×{height}×{width}, hash {self._images.content_hash[:12]}"

    def batches(self, names: Iterable[str], batch_size: int) -> Iterator[list[Picture]]:
        """All images in the order of the split, so many at a time; `names` is `self.names`."""
        for places_B in torch.arange(len(self.names)).split(batch_size):
            pixels_BCHW = self._images.pixels(places_B)
            yield [
                Picture(self.names[place], place, pixels_CHW)
                for place, pixels_CHW in zip(places_B.tolist(), pixels_BCHW, strict=True)
            ]
