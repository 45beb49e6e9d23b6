"""Crops of photographs that arrive inside Python wheels, split by region."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ibq.data.images import Images, Split, one_line
from ibq.errors import DataError

PHOTOS = {
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/rocket.jpg",
        "data/motorcycle_left.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


def load_photos(resolution: int, split: Split) -> Images:
    """One split as uint8 (N, 3, resolution, resolution). DataError: a photo is absent or damaged, or smaller than a
    crop."""
    regions = [split_regions(_read_photo(path)) for path in _photo_paths()]
    largest = min(min(region.shape[1:]) for pair in regions for region in pair)
    if resolution > largest:
        raise DataError(
            f"photos come at resolution={largest} at most, as the smallest test region allows, not at "
            f"resolution={resolution}"
        )
    if split == "train":
        crops = [crop_grid(train_CHW, resolution, stride=resolution // 2) for train_CHW, _ in regions]
    else:
        crops = [crop_grid(test_CHW, resolution, stride=resolution) for _, test_CHW in regions]
    return Images("photos", split, torch.cat(crops), None, f"the packages {' and '.join(PHOTOS)}")


def _photo_paths() -> list[Path]:
    """The photographs in their fixed order, found without importing the packages (which takes seconds)."""
    paths = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(
                f"photos are files of the package {package}, which is not installed; pip install 'ibq-study[study]'"
            )
        paths += [Path(spec.submodule_search_locations[0]) / name for name in names]
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(
                f"the photo {path} is not in the installed package; pip install --force-reinstall 'ibq-study[study]'"
            )
    return paths


def _read_photo(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as photo:
            photo_HWC = np.array(photo.convert("RGB"))
    except OSError as error:
        raise DataError(
            f"the photo {path} cannot be read ({one_line(error)}); pip install --force-reinstall 'ibq-study[study]'"
        ) from None
    return torch.from_numpy(photo_HWC).permute(2, 0, 1)


def split_regions(photo_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The left three quarters of a photo, for training, and the right quarter, for testing: views that share no
    pixel."""
    border = photo_CHW.shape[2] * 3 // 4
    return photo_CHW[:, :, :border], photo_CHW[:, :, border:]


def crop_grid(region_CHW: torch.Tensor, resolution: int, stride: int) -> torch.Tensor:
    """Square crops on a regular grid, row by row from the top left; pixels beyond the last whole crop are left out.

    Args:
        region_CHW: a photo or a part of one.
        resolution: side of a crop in pixels.
        stride: distance in pixels between neighbouring crops.

    Returns:
        (N, C, resolution, resolution), contiguous, of the region's type.

    Raises:
        DataError: the region is smaller than a crop.
    """
    channels, height, width = region_CHW.shape
    if resolution > min(height, width):
        raise DataError(f"resolution={resolution} does not fit a region {height} pixels high and {width} wide")
    windows_CYXHW = region_CHW.unfold(1, resolution, stride).unfold(2, resolution, stride)
    return windows_CYXHW.permute(1, 2, 0, 3, 4).reshape(-1, channels, resolution, resolution).contiguous()
