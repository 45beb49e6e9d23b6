"""Conversion of every kind of pixel in a folder of images."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ibq.data import folder

R = 8


def save(path: Path, image: PIL.Image.Image | np.ndarray, **options: Any) -> Path:
    (PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def read(path: Path) -> np.ndarray:
    """The image as the loader sees it, uint8 (3, R, R)."""
    image_CHW = folder.read_square(path, R)
    assert not isinstance(image_CHW, str), image_CHW
    assert (image_CHW.shape, image_CHW.dtype) == ((3, R, R), np.uint8)
    return image_CHW


def corner(mode: str, colour: Any) -> PIL.Image.Image:
    return PIL.Image.new(mode, (R, R), colour)


def palette(transparent: bool) -> PIL.Image.Image:
    image = PIL.Image.new("P", (R, R), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("rgb.png", corner("RGB", (1, 2, 3)), (1, 2, 3)),
        ("grey.png", corner("L", 77), (77, 77, 77)),
        ("bit.png", corner("1", 1), (255, 255, 255)),
        ("grey alpha.png", corner("LA", (100, 51)), (224, 224, 224)),  # 0.2 of 100 on 0.8 of white
        ("alpha.png", corner("RGBA", (0, 100, 255, 51)), (204, 224, 255)),
        ("clear.webp", corner("RGBA", (9, 9, 9, 0)), (255, 255, 255)),
        ("palette.png", palette(False), (10, 200, 30)),
        ("palette.gif", palette(False), (10, 200, 30)),
        ("clear palette.png", palette(True), (255, 255, 255)),
        ("clear palette.gif", palette(True), (255, 255, 255)),
        ("cmyk.tif", corner("CMYK", (255, 0, 51, 0)), (0, 255, 204)),
        ("ycbcr.tif", corner("YCbCr", (128, 128, 128)), (128, 128, 128)),
        *(
            (f"{bits}.png", np.full((R, R), bits, np.uint16), 3 * (grey,))
            for bits, grey in ((0, 0), (128, 0), (129, 1), (25700, 100))
        ),
        ("white 16.png", np.full((R, R), 65535, np.uint16), (255, 255, 255)),
        ("16.tif", np.full((R, R), 51400, np.uint16), (200, 200, 200)),
        ("32.tif", np.full((R, R), 51400, np.int32), (200, 200, 200)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_kind_of_pixel_becomes_rgb(name: str, image: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    save(tmp_path / name, image)
    assert {tuple(pixel) for pixel in read(tmp_path / name).reshape(3, -1).T.tolist()} == {expected}


def test_cmyk_jpegs_and_big_endian_16_bit(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", corner("CMYK", (0, 255, 255, 0)), quality=100)
    # A big-endian grey TIFF of 8 by 8 pixels of 16 bits, each 51,400, written by hand: Pillow writes none.
    tags = [
        (256, 3, R),
        (257, 3, R),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 3, 8),
        (277, 3, 1),
        (278, 3, R),
        (279, 3, 2 * R * R),
    ]
    entries = b"".join(struct.pack(">HHIHH", tag, kind, 1, value, 0) for tag, kind, value in tags)
    pixels = struct.pack(">H", 51400) * R * R
    header = struct.pack(">2sHI", b"MM", 42, 8 + len(pixels))
    (tmp_path / "b.tif").write_bytes(header + pixels + struct.pack(">H", len(tags)) + entries + bytes(4))
    assert read(tmp_path / "a.jpg")[:, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert np.unique(read(tmp_path / "b.tif")).tolist() == [200]


@pytest.mark.parametrize("ending", ["gif", "tif", "webp"])
def test_only_the_first_frame_counts(ending: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a.{ending}", corner("L", 40), save_all=True, append_images=[corner("L", 250)])
    assert read(path).ravel().tolist() == pytest.approx([40] * 3 * R * R, abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "lzw.tif"])
def test_images_stand_upright(orientation: int, ending: str, tmp_path: Path) -> None:
    upright_HW = np.zeros((R, R + 4), np.uint8)
    upright_HW[: R // 2, 2 : R // 2 + 2] = 200  # the top left of the centre square
    ways = [
        lambda a: a,
        np.fliplr,
        lambda a: np.rot90(a, 2),
        np.flipud,
        np.transpose,
        np.rot90,
        lambda a: np.rot90(a, 2).T,
        lambda a: np.rot90(a, -1),
    ]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(ways[orientation - 1](upright_HW))
    options = {"compression": "tiff_lzw"} if ending == "lzw.tif" else {}
    path = save(tmp_path / f"a.{ending}", stored, exif=exif, **options)
    assert read(path)[0].tolist() == upright_HW[:, 2:-2].tolist()


def test_a_damaged_exif_costs_no_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", corner("L", 90), exif=b"Exif\0\0no TIFF header follows here")
    assert np.unique(read(path)).tolist() == [90]


def test_the_centre_square_is_kept_as_it_is_or_scaled_with_antialiasing(tmp_path: Path) -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (R, R + 5, 3), np.uint8)
    checker_HW = (np.indices((8 * R, 12 * R)).sum(0) % 2 * 255).astype(np.uint8)
    ramp_HW = np.broadcast_to(np.arange(12 * R, dtype=np.uint8) * 2, (8 * R, 12 * R))
    exact = read(save(tmp_path / "a.png", pixels_HWC))
    checker = read(save(tmp_path / "b.png", checker_HW))
    ramp, jpeg = (read(save(tmp_path / f"c.{ending}", ramp_HW.copy())) for ending in ("png", "jpg"))
    assert exact.transpose(1, 2, 0).tolist() == pixels_HWC[:, 2 : R + 2].tolist()
    assert ((checker >= 126) & (checker <= 129)).all(), "without antialiasing it would be black or white"
    centres = [2 * (2 * R + 8 * column + 3.5) for column in range(1, R - 1)]
    for image_CHW in (ramp, jpeg):
        assert image_CHW[0, 3, 1:-1].tolist() == pytest.approx(centres, abs=2)
