"""Near-duplicates of landscapes across its split: test and training photographs that share local features (SIFT), which
needs no trained network.

Two views of one place share corners and edges at different places and under other light, where whole pictures, or
windows of them, are as like as any two of bright sky over dark ground. A match is a pair of features that are each
other's nearest, and nearer than RATIO times the second nearest; test photographs are also tried mirrored.
Measured of all 37,128 pairs of the 273 photographs: at most 12 matches, by chance (texture, windows, leaves), but for
one pair with 16, badlands3 and bwerner2, which do show the same rocks; both are for training. Across the split: at most
12 (station3 and water2, city8 and city3); looked at, none of the 35 nearest pairs is of one place.
Command: python -m experiments.benchmarks.near_duplicates FOLDER   (one core: about a minute; lists the nearest pairs
and writes pairs.png, test.png and train.png)

Suffixes: H W pixels, F features, Q values of a feature.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from skimage.feature import SIFT

from ibq.data.landscapes import FILES, photographs_for_testing

SIZE = (360, 180)
"""Half of a photograph's: about 100 features of each."""
RATIO = 0.8
SHOWN = (180, 90)

Values = np.ndarray[Any, np.dtype[np.float32]]


class Pair(NamedTuple):
    """Number of matches of a test and a training photograph."""

    matches: int
    test: str
    train: str


def nearest_pairs(greys: dict[str, Values], testing: set[str]) -> list[Pair]:
    """The nearest training photograph of each test photograph, nearest pairs first.

    Args:
        greys: (H, W), from 0 to 1, by name.
        testing: names of the test photographs.
    """
    training = {name: local_features(grey_HW) for name, grey_HW in greys.items() if name not in testing}
    pairs = []
    for name in testing:
        views = [local_features(grey_HW) for grey_HW in (greys[name], greys[name][:, ::-1])]
        numbers = {other: max(matches(view_FQ, there_FQ) for view_FQ in views) for other, there_FQ in training.items()}
        nearest = max(numbers, key=lambda other: numbers[other])
        pairs.append(Pair(numbers[nearest], name, nearest))
    return sorted(pairs, reverse=True)


def local_features(grey_HW: Values) -> Values:
    """SIFT descriptors of unit length; (0, 128) where there is nothing to hold on to."""
    sift = SIFT(upsampling=1)
    try:
        sift.detect_and_extract(grey_HW)
    except RuntimeError:  # scikit-image's way to say that there are none
        return np.zeros((0, 128), np.float32)
    features_FQ: Values = sift.descriptors.astype(np.float32)
    features_FQ /= np.linalg.norm(features_FQ, axis=1, keepdims=True)
    return features_FQ


def matches(one_FQ: Values, other_FQ: Values) -> int:
    """Number of features that are each other's nearest and pass the ratio test."""
    if min(len(one_FQ), len(other_FQ)) < 2:
        return 0
    products_FF = one_FQ @ other_FQ.T
    nearest_F = products_FF.argmax(1)
    second_F, first_F = np.partition(products_FF, -2, axis=1)[:, -2:].T
    distance_F, second_distance_F = (np.sqrt(2 - 2 * product_F.clip(max=1)) for product_F in (first_F, second_F))
    mutual_F = products_FF.argmax(0)[nearest_F] == np.arange(len(one_FQ))
    return int((mutual_F & (distance_F < RATIO * second_distance_F)).sum())


def sheet(rows: Iterable[Iterable[str]], files: dict[str, Path], columns: int) -> Image.Image:
    """Contact sheet: each group of photographs side by side with their names, `columns` groups a line."""
    groups = [list(group) for group in rows]
    width, height = SHOWN[0] * max(map(len, groups)) + 10, SHOWN[1] + 14
    page = Image.new("RGB", (width * columns, height * -(-len(groups) // columns)), "white")
    draw = ImageDraw.Draw(page)
    for place, group in enumerate(groups):
        top, left = place // columns * height, place % columns * width
        for nth, name in enumerate(group):
            with Image.open(files[name]) as photo:
                page.paste(photo.resize(SHOWN), (left + nth * SHOWN[0], top))
            draw.text((left + nth * SHOWN[0], top + SHOWN[1]), name.removesuffix(".jpg"), "black")
    return page


def main(folder: Path) -> None:
    """List the nearest pairs and write the contact sheets into `folder`."""
    files, _ = FILES.find()
    testing = photographs_for_testing(files)
    greys: dict[str, Values] = {}
    for name, path in files.items():
        with Image.open(path) as photo:
            grey = photo.convert("L").resize(SIZE, Image.Resampling.BOX)
        greys[name] = np.asarray(grey, np.float32) / np.float32(255)
    pairs = nearest_pairs(greys, testing)
    for pair in pairs:
        print(f"{pair.matches:3}  {pair.test:<22} {pair.train}")
    folder.mkdir(parents=True, exist_ok=True)
    sheet([(pair.test, pair.train) for pair in pairs], files, columns=4).save(folder / "pairs.png")
    sheet([(name,) for name in files if name in testing], files, columns=7).save(folder / "test.png")
    sheet([(name,) for name in files if name not in testing], files, columns=14).save(folder / "train.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
