"""Do near-duplicates of landscapes cross its split? Nearest neighbours between test and training photographs by plain
pixels, without any network.

Each photograph is taken as 64×32 grey values. Windows of 32×20 of each test photograph, as they are and mirrored, are
laid over every place of each training photograph; their likeness is the correlation after the mean of every row is
taken away, as bright sky over dark ground would make all landscapes alike. Windows rather than wholes, since two views
of one place overlap in part.
Command: python -m experiments.benchmarks.near_duplicates FOLDER   (one core: about 20 seconds; lists the nearest pairs
and writes pairs.png, test.png and train.png)

Suffixes: P windows, H W pixels, Q values of a window.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw

from ibq.data.landscapes import FILES, photographs_for_testing

WIDTH, HEIGHT = 64, 32
WINDOW = (20, 32)
STRIDES = (6, 8)
"""Distance of the test photographs' windows, down and across."""
NOISE = 9.0
"""Variance that is added to each pixel's, so that flat windows are like nothing."""
SHOWN = (180, 90)

Values = np.ndarray[Any, np.dtype[np.float32]]


class Pair(NamedTuple):
    """Likeness, at most 1, of a test and a training photograph."""

    likeness: float
    test: str
    train: str


def nearest_pairs(greys: dict[str, Values], testing: set[str]) -> list[Pair]:
    """The nearest training photograph of each test photograph, nearest pairs first.

    Args:
        greys: (H, W), at least as large as a window, by name.
        testing: names of the test photographs.
    """
    every = {name: _windows(grey_HW, (1, 1)) for name, grey_HW in greys.items() if name not in testing}
    pairs = []
    for name in testing:
        grey_HW = greys[name]
        windows_PQ = np.concatenate([_windows(grey_HW, STRIDES), _windows(grey_HW[:, ::-1], STRIDES)])
        likeness = {other: float((windows_PQ @ other_PQ.T).max()) for other, other_PQ in every.items()}
        nearest = max(likeness, key=lambda other: likeness[other])
        pairs.append(Pair(likeness[nearest], name, nearest))
    return sorted(pairs, reverse=True)


def _windows(grey_HW: Values, strides: tuple[int, int]) -> Values:
    """Windows as vectors whose product is their correlation."""
    windows_HWhw = sliding_window_view(grey_HW, WINDOW)[:: strides[0], :: strides[1]]
    windows_PQ = (windows_HWhw - windows_HWhw.mean(-1, keepdims=True)).reshape(-1, WINDOW[0] * WINDOW[1])
    unit_PQ: Values = windows_PQ / np.sqrt((windows_PQ**2 + NOISE).sum(1, keepdims=True))
    return unit_PQ


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
    greys = {}
    for name, path in files.items():
        with Image.open(path) as photo:
            greys[name] = np.asarray(photo.convert("L").resize((WIDTH, HEIGHT), Image.Resampling.BOX), np.float32)
    pairs = nearest_pairs(greys, testing)
    for pair in pairs:
        print(f"{pair.likeness:.3f}  {pair.test:<22} {pair.train}")
    folder.mkdir(parents=True, exist_ok=True)
    sheet([(pair.test, pair.train) for pair in pairs], files, columns=4).save(folder / "pairs.png")
    sheet([(name,) for name in files if name in testing], files, columns=7).save(folder / "test.png")
    sheet([(name,) for name in files if name not in testing], files, columns=14).save(folder / "train.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
