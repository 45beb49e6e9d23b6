"""Classes of a folder of pictures, and the pictures of formats that are not read: what is passed over is named and
counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibq.cli.pictures import Framing, PictureFolder
from ibq.config import DataConfig
from ibq.data import ImageSource, Split, load_images
from ibq.errors import DataError

R = 8


def save(path: Path, form: str | None = None, size: int = R) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), 7, np.uint8)).save(path, form)


def load(root: Path, crop: str, split: Split = "train") -> ImageSource:
    return load_images(DataConfig.parse({"name": f"imagefolder:{root}", "resolution": R, "crop": crop}), split)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("split_folders", [True, False])
def test_a_class_is_a_folder_with_a_usable_picture(
    split_folders: bool, crop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "train" if split_folders else tmp_path
    for name in ("ant/a.png", "ant/b.png", "cat/a.png", "cat/b.png"):
        save(root / name)
        if split_folders:
            save(tmp_path / "val" / name)
    (root / "__MACOSX" / "ant").mkdir(parents=True)
    (root / "__MACOSX" / "ant" / "._a.png").write_bytes(b"Mac OS X")
    (root / "broken").mkdir()
    (root / "broken" / "a.png").write_bytes(b"no picture")
    (root / "broken" / "b.png").write_bytes(b"nor this")
    (root / "empty").mkdir()
    images = load(tmp_path, crop)
    assert images.labels_N is not None
    assert images.labels_N.unique().tolist() == [0, 1]
    assert set(load(tmp_path, crop, "test").labels_N.tolist()) <= {0, 1}  # type: ignore[union-attr]
    assert images.pixels(torch.arange(len(images))).shape == (len(images), 3, R, R)
    reasons = {
        "__MACOSX is no class: there is no picture in it",
        "broken is no class: a.png has not the content of a PNG, JPEG, WEBP, BMP, TIFF or GIF image, nor can any other "
        "picture in it be used",
        "empty is no class: there is no picture in it",
    }
    assert reasons == set(images.skipped)
    assert "imagefolder train: 3 skipped" in capsys.readouterr().err


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_class_of_one_split_keeps_its_number_in_the_other(crop: str, tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "train/dog/a.png", "val/ant/a.png", "val/dog/a.png"):
        save(tmp_path / name)
    (tmp_path / "train" / "bee").mkdir()
    (tmp_path / "val" / "bee").mkdir()
    assert load(tmp_path, crop).labels_N.tolist() == [1, 2]  # type: ignore[union-attr]
    assert load(tmp_path, crop, "test").labels_N.tolist() == [0, 2]  # type: ignore[union-attr]


def test_pictures_that_are_too_small_make_a_class_only_where_they_are_enlarged(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / split / "a" / "small.png", size=R // 2)
        save(tmp_path / split / "b" / "large.png")
    assert load(tmp_path, "center").labels_N.tolist() == [0]  # type: ignore[union-attr]
    assert load(tmp_path, "random").labels_N.tolist() == [0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_no_class_at_all_is_one_sentence(crop: str, tmp_path: Path) -> None:
    for name in ("train/a/x.png", "val/a/x.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"no image of .* can be used for train: a is no class: x\.png has not"):
        load(tmp_path, crop)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_other_formats_are_named_and_counted_and_jfif_is_read(
    crop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        save(tmp_path / split / "a.png")
        save(tmp_path / split / "b.JFIF", "JPEG")
        save(tmp_path / split / "c.jpe", "JPEG")
        for other in ("d.HEIC", "e.avif", "deep/f.jxl"):
            (tmp_path / split / other).parent.mkdir(exist_ok=True)
            (tmp_path / split / other).write_bytes(b"")
        (tmp_path / split / "notes.txt").touch()
    images = load(tmp_path, crop)
    assert len(images) == 3
    assert images.skipped == tuple(
        f"{name} is of a format that is not read; convert it to PNG" for name in ("d.HEIC", "deep/f.jxl", "e.avif")
    )
    assert "imagefolder train: 3 skipped" in capsys.readouterr().err
    folder = PictureFolder(tmp_path / "train", Framing(4, 3))
    assert folder.names == ["a.png", "b.JFIF", "c.jpe"]
    assert len(folder.skipped) == 3


def test_a_folder_of_other_formats_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(DataError, match=r"no image of .* can be used for train: a\.heic is of a format"):
        load(tmp_path, "center")
