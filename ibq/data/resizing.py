"""Scaling of the released pipeline: OpenCV's INTER_LINEAR on bytes, by which albumentations' SmallestMaxSize brings the
shorter side to R; then a square is cut out. Neither library is needed.

Bilinear without antialiasing: an output pixel is of the 2×2 pixels around its centre (pixel centres lie at halves),
however far the image is scaled down. Weights are whole numbers of 2^-11, as OpenCV has them, and sums are rounded as
there, so that the bytes are the same.

Suffixes: H W pixels of the image, R of the square, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ibq.schema import Resize

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Integers = np.ndarray[Any, np.dtype[np.int32]]
Place = Callable[[int, int], tuple[float, float]]
"""From an image's width and height to the left and top of a square as large as its shorter side."""

ONE = 1 << 11
RESIZING: dict[Resize, str] = {
    "antialiased": "antialiased bicubic, upright as EXIF says",
    "released": "bilinear without antialiasing (OpenCV's INTER_LINEAR), not turned by EXIF, as released",
}
"""Protocol of each way, for people."""


def released_square(image_HWC: Pixels, resolution: int, place: Place) -> Pixels:
    """A square of the image that is scaled until its shorter side is R.

    Args:
        image_HWC: uint8.
        resolution: R, pixels a side.
        place: of the square in the scaled image, at a whole pixel.

    Returns:
        uint8 (R, R, C).
    """
    height, width = image_HWC.shape[:2]
    scale = resolution / min(height, width)
    scaled_height, scaled_width = round(height * scale), round(width * scale)  # halves to even, as there
    left, top = map(int, place(scaled_width, scaled_height))
    above_R, lower_R = _taps(height, scaled_height, top, resolution)
    before_R, right_R = _taps(width, scaled_width, left, resolution)
    outside_R = (before_R < 0) | (before_R >= width - 1)  # as there: one tap for columns, two equal ones for rows
    right_R[outside_R] = 0
    weight_R1 = (ONE - right_R)[:, None]

    def columns(rows_R: Integers) -> Integers:
        image_RWC = image_HWC[rows_R.clip(0, height - 1)]
        first, second = (image_RWC[:, (before_R + tap).clip(0, width - 1)].astype(np.int32) for tap in (0, 1))
        sums: Integers = (first * weight_R1 + second * right_R[:, None]) >> 4
        return sums

    lower_R11 = lower_R[:, None, None]
    sums_RRC = ((columns(above_R) * (ONE - lower_R11)) >> 16) + ((columns(above_R + 1) * lower_R11) >> 16)
    return ((sums_RRC + 2) >> 2).astype(np.uint8)


def _taps(length: int, scaled: int, first: int, count: int) -> tuple[Integers, Integers]:
    """The first of the two pixels that each of `count` output pixels lies between, and the weight of the second times
    ONE."""
    positions = ((np.arange(first, first + count) + 0.5) * (1 / (scaled / length)) - 0.5).astype(np.float32)
    floors = np.floor(positions)
    return floors.astype(np.int32), np.rint((positions - floors) * np.float32(ONE)).astype(np.int32)
