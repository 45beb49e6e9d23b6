"""Data sets: Fashion-MNIST, crops of photographs that arrive inside packages, folders of one's own.

To add one: a module with its loader here, a line in LOADERS, and one in `ibq.config.DATA_SETS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

from ibq.config import DATA_SETS, DataConfig
from ibq.data.fashion_mnist import (
    FASHION_MNIST_CONTENT_HASH,
    FASHION_MNIST_RESOLUTION,
    FASHION_MNIST_SHA256,
    load_fashion_mnist,
)
from ibq.data.folder import load_folder
from ibq.data.images import Images, ImageSource, Split
from ibq.data.landscapes import CONTENT_HASHES, load_landscapes
from ibq.data.packaged import cache_folder
from ibq.data.photos import crop_grid, load_photos, split_regions
from ibq.data.stream import stream_split
from ibq.errors import DataError

__all__ = [
    "FASHION_MNIST_RESOLUTION",
    "FASHION_MNIST_SHA256",
    "DataError",
    "ImageSource",
    "Images",
    "Split",
    "cache_folder",
    "crop_grid",
    "data_hash",
    "data_hash_of",
    "load_images",
    "split_regions",
]


class Loader(NamedTuple):
    """Loader of a data set, and by resolution the `data_hash` of content that is fixed, so that it need not be loaded
    for a run's id."""

    load: Callable[[int, Split], Images]
    hashes: Mapping[int, str]


LOADERS = {
    "fashion-mnist": Loader(load_fashion_mnist, {FASHION_MNIST_RESOLUTION: FASHION_MNIST_CONTENT_HASH}),
    "landscapes": Loader(load_landscapes, CONTENT_HASHES),
    "photos": Loader(load_photos, {}),
}
assert LOADERS.keys() == DATA_SETS.keys(), "a data set has a line in both"


def load_images(config: DataConfig, split: Split) -> ImageSource:
    """One split of the images that `config` names, fetched on first use.

    fashion-mnist: its 28×28 images stand in the middle of 32×32 with the background value 0 around them.

    landscapes: disjoint RGB crops of 273 photographs, at resolution=32, 64 or 128, split by photograph and labelled by
    scene (`ibq.data.landscapes`).

    Both are sought in IBQ_DATA, in Debian's packages dataset-fashion-mnist and endless-sky-data where these are
    installed, in the cache folder, and then fetched. IBQ_DATA names a folder that holds the files, a package (.deb) or
    one unpacked, of one of the data sets or of both; or a .deb itself, which is unpacked into the cache. One that holds
    nothing of a data set may belong to the other and is passed over; one that does not exist or holds some of its files
    is an error.

    photos: overlapping (train) or adjacent (test) RGB crops of seven photographs.

    imagefolder:PATH: every .png, .jpg, .jpeg, .jpe, .jfif, .webp, .bmp, .tif, .tiff and .gif (first frame) in the
    folder and below, hidden ones left out, links followed; pictures of other formats (.heic, .avif) are skipped.
    Where PATH holds train/ and one of val/, test/ (the first of these), they are the splits; the longer names
    training, valid, validation and testing do as well, in any case. Otherwise every tenth file of the sorted listing,
    from the first on, is for testing and the rest for training. Where a split's folder holds only subfolders, those
    with a usable picture in either split are its classes, numbered by their sorted names in both. A file that cannot
    be used is left out: `Images.skipped` says why, and one line on stderr how many.
    How an image becomes a square: `ibq.data.decoding.square_rgb`. With crop="random" no image is opened until it is
    wanted: centre squares are decoded on demand and `ibq.data.loader.TrainingBatches` reads random ones; small images
    are scaled up, broken ones replaced.

    Args:
        config: name, resolution (pixels a side) and crop.
        split: "train" or "test".

    Returns:
        The images, uint8 (N, C, resolution, resolution): for Fashion-MNIST 60,000 or 10,000 of 1 channel, else of 3;
        in memory (`Images`) or, with crop="random", read when they are wanted (`StreamedImages`).

    Raises:
        DataError: the data is absent, damaged, too large for memory, or does not come at this resolution.
    """
    if split not in get_args(Split):
        raise DataError(f"there is no split {split!r}; choose 'train' or 'test'")
    if config.kind == "imagefolder":
        if config.crop == "random":
            return stream_split(config.folder, config.resolution, split, config.resize)
        return load_folder(config.folder, config.resolution, split, config.resize)
    return LOADERS[config.kind].load(config.resolution, split)


def data_hash_of(config: DataConfig) -> str:
    """`data_hash` of what a config names, without loading it where the content is fixed.

    Raises:
        DataError: as `load_images`.
    """
    known = LOADERS[config.kind].hashes.get(config.resolution) if config.kind in LOADERS else None
    return known or data_hash(load_images(config, "train"), load_images(config, "test"))


def data_hash(train_images: ImageSource, test_images: ImageSource) -> str:
    """The data's part in a run's identity: SHA-256 (hex) of the training images and, where it may change
    alone, the test split.

    The test split of the built-in data sets is as fixed as they are; that of a folder can change by itself, and with it
    every metric. With crop="random" names and sizes of the files stand for their content
    (`StreamedImages.content_hash`).
    """
    if train_images.name in DATA_SETS:
        return train_images.content_hash
    return hashlib.sha256(f"{train_images.content_hash} {test_images.content_hash}".encode()).hexdigest()
