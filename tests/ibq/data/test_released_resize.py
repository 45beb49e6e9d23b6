"""The released pipeline's scaling, against bilinear interpolation written out in float64 and against torch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from ibq.config import DataConfig
from ibq.data import load_images
from ibq.data.decoding import read_square
from ibq.data.resizing import released_square
from ibq.data.stream import Draw, RandomSquares

R = 16
SIZES = [(64, 48), (48, 64), (16, 24), (17, 16), (8, 12), (200, 33), (333, 500), (32, 32), (16, 16)]
CV2 = [[196, 160, 12, 94], [122, 68, 3, 200], [125, 97, 15, 188], [124, 120, 95, 160]]
CLOSE = 0.8
"""Grey levels: OpenCV multiplies bytes by whole numbers of 2^-11 and cuts twice before it rounds."""


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def inter_linear(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """INTER_LINEAR in float64, pixel by pixel: centres at halves, the 2x2 pixels around, edges repeated."""

    def taps(length: int, scaled: int, i: int) -> tuple[int, int, float]:
        at = min(max((i + 0.5) * length / scaled - 0.5, 0.0), length - 1.0)
        first = int(at)
        return first, min(first + 1, length - 1), at - first

    H, W = image_HWC.shape[:2]
    image, out = image_HWC.astype(np.float64), np.empty((height, width, 3))
    for y in range(height):
        above, below, v = taps(H, height, y)
        for x in range(width):
            left, right, u = taps(W, width, x)
            upper = (1 - u) * image[above, left] + u * image[above, right]
            out[y, x] = (1 - v) * upper + v * ((1 - u) * image[below, left] + u * image[below, right])
    return out


def scaled_size(height: int, width: int) -> tuple[int, int]:
    return round(height * R / min(height, width)), round(width * R / min(height, width))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_square_is_that_of_the_formula_in_float64(height: int, width: int) -> None:
    image_HWC = drawn(height, width)
    scaled = inter_linear(image_HWC, *scaled_size(height, width))
    for chosen in (0.0, 0.5, 1.0):
        top, left = (int(chosen * (length - R)) for length in scaled.shape[:2])
        square = released_square(image_HWC, R, lambda *_: (left, top))  # noqa: B023 (called at once)
        assert np.abs(square - scaled[top : top + R, left : left + R]).max() < CLOSE
    size = scaled.shape[:2]
    x = torch.from_numpy(image_HWC.transpose(2, 0, 1).copy())[None].double()
    theirs = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
    assert np.abs(theirs[0].permute(1, 2, 0).numpy() - scaled).max() < 1e-9


def test_bytes_are_opencvs() -> None:
    """Written by cv2.resize (opencv-python-headless 5.0.0, INTER_LINEAR) of the same picture."""
    square = released_square(drawn(7, 9, seed=3), 4, lambda *_: (0, 0))
    assert square[..., 0].tolist() == CV2


def test_scaling_down_is_not_antialiased() -> None:
    stripes_HWC = np.zeros((8 * R, 8 * R, 3), np.uint8)
    stripes_HWC[:, 3::8] = 255  # one of the two columns in the middle of each output pixel
    assert np.unique(released_square(stripes_HWC, R, lambda *_: (0, 0))).tolist() == [128]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_file_is_neither_turned_nor_decoded_at_reduced_size(ending: str, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{ending}"
    PIL.Image.fromarray(drawn(20 * R, 30 * R)).save(path, exif=exif)
    image = PIL.Image.open(path).convert("RGB")
    assert image.size == (30 * R, 20 * R)
    scaled = inter_linear(np.asarray(image), R, 24)[:, 4 : 4 + R]
    square_CHW = read_square(path, R, resize="released")
    assert not isinstance(square_CHW, str)
    assert np.abs(square_CHW.transpose(1, 2, 0) - scaled).max() < CLOSE
    upright_CHW = read_square(path, R)
    assert not isinstance(upright_CHW, str)
    assert np.abs(square_CHW.astype(int) - upright_CHW).max() > 20


def test_random_squares_lie_at_whole_pixels_of_the_scaled_image(tmp_path: Path) -> None:
    image_HWC = drawn(48, 75)
    PIL.Image.fromarray(image_HWC).save(tmp_path / "a.png")
    scaled = inter_linear(image_HWC, R, 25)
    squares = RandomSquares(tmp_path, R, False, "released")
    found = set()
    for index in range(60):
        (square_CHW,), missing = squares[[Draw("a.png", (0, 0, index))]]
        assert missing == []
        square = square_CHW.permute(1, 2, 0).numpy()
        found |= {x for x in range(10) if np.abs(square - scaled[:, x : x + R]).max() < CLOSE}
    assert found == set(range(10))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_the_option_reaches_the_images_and_is_a_part_of_their_identity(crop: str, tmp_path: Path) -> None:
    for number in range(12):
        PIL.Image.fromarray(drawn(48, 60, number)).save(tmp_path / f"{number:02}.png")
    configs = [
        DataConfig.parse({"name": f"imagefolder:{tmp_path}", "resolution": R, "crop": crop, "resize": resize})
        for resize in ("antialiased", "released")
    ]
    ours, released = (load_images(config, "test") for config in configs)
    assert (ours.resize, released.resize) == ("antialiased", "released")
    assert ours.content_hash != released.content_hash
    wanted = inter_linear(drawn(48, 60), R, 20)[:, 2 : 2 + R]
    pixels_HWC = released.pixels(torch.tensor([0]))[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels_HWC - wanted).max() < CLOSE
    assert np.abs(ours.pixels(torch.tensor([0]))[0].permute(1, 2, 0).numpy() - wanted).max() > 20
