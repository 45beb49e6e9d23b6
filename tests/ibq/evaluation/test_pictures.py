"""The part of a picture that a tokenizer is shown, and batches of pictures of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import draw, pixels
from PIL import Image

from ibq.cli import pictures as pictures_module
from ibq.cli.pictures import Framing, PictureFolder
from ibq.errors import ConfigError


def test_crop_takes_the_largest_centre_part_and_resize_the_centre_square(tmp_path: Path) -> None:
    draw(tmp_path / "odd.png", 31, 34)
    whole = pixels(tmp_path / "odd.png")
    (crop,) = next(PictureFolder(tmp_path, Framing(4, 3, "crop")).batches(["odd.png"], 1))
    assert torch.equal(crop.pixels_CHW, whole[0, :, 1:33, 1:29])
    (square,) = next(PictureFolder(tmp_path, Framing(4, 3, resize=12)).batches(["odd.png"], 1))
    with Image.open(tmp_path / "odd.png") as image:
        expected = np.asarray(image.resize((12, 12), Image.Resampling.BICUBIC, box=(0, 1, 31, 32)))
    assert np.array_equal(square.pixels_CHW.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("framing", "size", "words"),
    [
        (Framing(16, 3, "crop"), (12, 40), "smaller than the tokenizer's down-sampling factor 16"),
        (Framing(4, 3, resize=16), (12, 40), "16"),
    ],
)
def test_pictures_too_small_for_the_framing(
    framing: Framing, size: tuple[int, int], words: str, tmp_path: Path
) -> None:
    draw(tmp_path / "a.png", *size)
    pictures = PictureFolder(tmp_path, framing)
    assert list(pictures.batches(pictures.names, 4)) == []
    assert "a.png is 12×40 pixels" in pictures.skipped[0]
    assert words in pictures.skipped[0]


def test_a_resolution_that_the_factor_does_not_divide() -> None:
    with pytest.raises(
        ConfigError, match=r"--resize 30 is not a multiple of the tokenizer's down-sampling factor 16; use 16 or 32"
    ):
        Framing(16, 3, resize=30)
    with pytest.raises(ConfigError, match=r"use 16$"):
        Framing(16, 3, resize=3)


def test_batches_hold_one_size_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        draw(tmp_path / f"{number:02d}.png", 8 + 4 * (number % 3), 8)
    pictures = PictureFolder(tmp_path, Framing(4, 3))

    def names(batch_size: int) -> list[list[str]]:
        return [[picture.name[:2] for picture in batch] for batch in pictures.batches(pictures.names, batch_size)]

    assert names(4) == [["00", "03", "06", "09"], ["01", "04", "07", "10"], ["02", "05", "08", "11"]]
    monkeypatch.setattr(pictures_module, "AREA", 8 * 12)
    assert names(4) == [
        ["02", "05", "08"],
        ["00", "03", "06", "09"],
        ["01", "04", "07", "10"],
        ["11"],
    ]  # 16x8 pixels: fewer at a time
    monkeypatch.setattr(pictures_module, "WAITING_BYTES", 8 * 8 * 3 * 2)
    assert max(map(len, names(4))) <= 2
    assert sorted(name for batch in names(4) for name in batch) == [f"{number:02d}" for number in range(12)]
