"""Folders of images: which files make which split, and that no wrong file or folder gets further."""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from ibq import IBQConfig
from ibq.cli.app import app
from ibq.config import DataConfig, TrainConfig
from ibq.data import Images, Split, folder, load_images
from ibq.errors import DataError

R = 8


def load(path: Path | str, split: Split = "train", resolution: int = R) -> Images:
    return load_images(DataConfig(name=f"imagefolder:{path}", resolution=resolution), split)


def save(path: Path, image: Any = 0, mode: str = "RGB", size: tuple[int, int] = (R, R), **options: Any) -> Path:
    """An image file; `image` is a colour or an array."""
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else PIL.Image.new(mode, size, image)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def numbered(root: Path, count: int, pattern: str = "{:02d}.png") -> Path:
    """`count` files, each filled with its number."""
    for number in range(count):
        save(root / pattern.format(number), (number, 0, 0))
    return root


def first_values(images: Images) -> list[int]:
    return images.images_NCHW[:, 0, 0, 0].tolist()


def sentence_of(path: Path | str, split: Split = "train", resolution: int = R) -> str:
    with pytest.raises(DataError) as refusal:
        load(path, split, resolution)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- Splits, classes, order -------------------------------------------------------------------------------------------


def test_without_split_folders_every_tenth_file_is_for_testing(tmp_path: Path) -> None:
    numbered(tmp_path, 21)
    train, test = load(tmp_path), load(tmp_path, "test")
    assert first_values(test) == [0, 10, 20]
    assert first_values(train) == [n for n in range(21) if n % 10]
    assert train.labels_N is None
    assert (train.name, train.split, train.skipped) == ("imagefolder", "train", ())
    assert train.images_NCHW.shape == (18, 3, R, R)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "val"), [0, 1]),
        (("train", "test"), [0, 1]),
        (("train", "val", "test"), [0, 1]),
        (("train", "test", "val"), [0, 2]),
        (("Train", "Validation"), [0, 1]),
        (("training", "TESTING"), [0, 1]),
    ],
)
def test_split_folders_are_the_splits(names: tuple[str, ...], expected: list[int], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        save(tmp_path / name / "a.png", (number, 0, 0))
    save(tmp_path / "beside.png", (99, 0, 0))
    assert [first_values(load(tmp_path, "train")), first_values(load(tmp_path, "test"))] == [[n] for n in expected]


def test_subfolders_are_classes_numbered_alike_in_both_splits(tmp_path: Path) -> None:
    for number, name in enumerate(
        ("train/ant/a.png", "train/cat/deep/b.png", "val/bee/c.png", "val/cat/d.png", "val/.hidden/e.png")
    ):
        save(tmp_path / name, (number, 0, 0))
    (tmp_path / "train" / "README").touch()
    train, test = load(tmp_path), load(tmp_path, "test")
    assert train.labels_N is not None
    assert test.labels_N is not None
    assert (first_values(train), train.labels_N.tolist()) == ([0, 1], [0, 2])
    assert (first_values(test), test.labels_N.tolist()) == ([2, 3], [1, 2])
    save(tmp_path / "train" / "loose.png")
    assert load(tmp_path).labels_N is None


def test_endings_in_any_case_hidden_files_and_links(tmp_path: Path) -> None:
    data = tmp_path / "Grüße aus\nKöln"
    for number, ending in enumerate((".png", ".JPG", ".JpEg", ".webp", ".BMP", ".tif", ".TIFF", ".gif")):
        save(data / "train" / f"{number} ü\n{ending}", number * 20, mode="L")
    for ignored in (".hidden.png", ".cache/a.png", "notes.txt", "png"):
        (data / "train" / ignored).parent.mkdir(exist_ok=True)
        (data / "train" / ignored).touch()
    save(tmp_path / "elsewhere" / "deep" / "z.png", 200, mode="L")
    (data / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    (data / "val").symlink_to(data / "train")
    images = load(data)
    assert first_values(images) == pytest.approx(
        [0, 20, 40, 60, 80, 100, 120, 140, 200], abs=4
    )  # JPEG and WebP are not exact
    assert images.skipped == ()
    assert "\n" not in images.source
    assert load(data, "test").content_hash == images.content_hash


def test_the_same_files_give_the_same_bytes_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0)
    for n in range(30):
        save(tmp_path / "here" / f"{n}.png", pixels.integers(0, 256, (9 + n % 7, 12, 3), np.uint8))
    first = load(tmp_path / "here")
    assert load(tmp_path / "here").content_hash == first.content_hash != load(tmp_path / "here", "test").content_hash
    monkeypatch.setattr(folder, "_CHUNK", 4)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert {load(where).content_hash for where in ("there", "~/there", "./there/")} == {first.content_hash}
    save(tmp_path / "there" / "5.png", 1)
    assert load("there").content_hash != first.content_hash


# --- Files that cannot be used ----------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG whose header declares a size and whose pixels are missing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9)))


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def truncated(path: Path) -> None:
    save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:700])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text.png": (lambda path: path.write_text("I am no image"), "has not the content of a PNG"),
    "empty.jpg": (lambda path: path.touch(), "has not the content of a PNG"),
    "script.png": (
        lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EOF\n"),
        "has not the content of a PNG",
    ),
    "cut.jpg": (truncated, "cannot be read (image file is truncated"),
    "cut.png": (truncated, "truncated"),
    "dot.png": (lambda path: save(path, size=(1, 1)), "is 1×1 pixels, smaller than resolution=8"),
    "strip.png": (lambda path: save(path, size=(90, 7)), "is 90×7 pixels, smaller than resolution=8"),
    "bomb.png": (lambda path: path.write_bytes(png(100_000, 100_000)), "pixels"),
    "bomb.bmp": (lambda path: path.write_bytes(bmp(100_000, 100_000)), "pixels"),
    "big.bmp": (
        lambda path: path.write_bytes(bmp(13_000, 11_000)),
        "declares 13,000×11,000 pixels, over the limit of 134,217,728",
    ),
    "float.tif": (lambda path: save(path, np.zeros((R, R), np.float32)), "floating-point numbers"),
    "deep.tif": (lambda path: save(path, np.full((R, R), 65536, np.int32)), "beyond 16 bits"),
    "negative.tif": (lambda path: save(path, np.full((R, R), -1, np.int32)), "beyond 16 bits"),
    "pipe.png": (lambda path: os.mkfifo(path), "is not a regular file"),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), "cannot be read (No such file or directory)"),
    "loop.png": (lambda path: path.symlink_to("loop.png"), "cannot be read (Too many levels of symbolic links)"),
    "new\nline.png": (lambda path: path.touch(), "has not the content of a PNG"),
}


def test_unusable_files_are_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (make, _) in BROKEN.items():
        (tmp_path / "train").mkdir(exist_ok=True)
        make(tmp_path / "train" / name)
    save(tmp_path / "train" / "sound.png", (3, 0, 0))
    save(tmp_path / "val" / "any.png")
    started = time.process_time()
    images = load(tmp_path)
    assert time.process_time() - started < 20, "a bomb is refused before it is decoded"
    assert first_values(images) == [3]
    assert len(images.skipped) == len(BROKEN)
    for name, sentence in zip(sorted(BROKEN), images.skipped, strict=True):
        assert sentence.startswith(f"{folder.quoted(name)} ")
        assert BROKEN[name][1] in sentence
        assert "\n" not in sentence
        assert str(tmp_path) not in sentence
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(
        f"imagefolder train: {len(BROKEN)} skipped and 1 kept of {tmp_path / 'train'}: big.bmp declares "
    )
    assert line.endswith(f"; and {len(BROKEN) - 3} more")
    assert line.count("; ") == 3


def test_the_limit_holds_where_pillows_own_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(png(100_000, 100_000))
    assert (
        folder.read_square(tmp_path / "a.png", R)
        == "declares 100,000×100,000 pixels, over the limit of 134,217,728 in all"
    )


def test_warnings_of_pillow_neither_print_nor_fail_nor_change_the_filters(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.bmp").write_bytes(
        bmp(10_000, 9_000)
    )  # Pillow warns of this size, and its pixels are missing
    save(tmp_path / "val" / "b.png")
    save(tmp_path / "train" / "b.png")
    before = list(warnings.filters)
    assert "truncated" in load(tmp_path, "test").skipped[0]
    assert list(warnings.filters) == before


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder that anyone may enter, and this process without root's right to read everything."""
    with tempfile.TemporaryDirectory() as path:
        root = Path(path)
        root.chmod(0o755)
        save(root / "train" / "a.png")
        save(root / "val" / "a.png")
        load(root)  # Pillow's plugins are imported as long as they can be read
        yield root
        for below in [root, *root.rglob("*")]:
            below.chmod(0o700)


@contextmanager
def without_privileges() -> Iterator[None]:
    if os.geteuid():
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("root that cannot become another user")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_what_may_not_be_read_is_named() -> None:
    with as_nobody() as root:
        closed = save(root / "train" / "closed.png")
        save(root / "train" / "sub" / "b.png")
        closed.chmod(0)
        (root / "train" / "sub").chmod(0)
        with without_privileges():
            images = load(root)
        assert images.skipped == (
            "sub cannot be read (Permission denied)",
            "closed.png cannot be read (Permission denied)",
        )
        for unreadable in (root / "train", root):
            unreadable.chmod(stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
            with without_privileges():
                assert sentence_of(root) == f"the image folder {unreadable} cannot be read (Permission denied)"


# --- Folders that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "split", "words"),
    [
        ([], "train", "holds no image: nothing in it or below it ends in .png, .jpg"),
        (["notes.txt", ".hidden.png", "sub/more.txt"], "test", "holds no image"),
        (["one.png"], "train", "holds a single image file"),
        (["one.png"], "test", "holds a single image file"),
        (["test/a.png", "test/b.png"], "train", "holds test but no folder train or training beside it"),
        (["test/a.png"], "test", "holds test but no folder train or training"),
        (["train/a.png"], "train", "holds train but no folder val, valid, validation, test or testing beside it"),
        (["train/a.txt", "test/a.png"], "train", "/train' holds no image"),
        (["train/a.png", "val/a.txt"], "test", "/val' holds no image"),
    ],
)
def test_folders_without_what_is_needed_are_one_sentence(
    content: list[str], split: Split, words: str, tmp_path: Path
) -> None:
    root = tmp_path / "my\nimages"
    root.mkdir()
    for name in content:
        (root / name).parent.mkdir(exist_ok=True)
        save(root / name) if name.endswith(".png") else (root / name).touch()
    sentence = sentence_of(root, split)
    assert words in sentence
    assert "my\\nimages" in sentence


def test_a_folder_must_be_there_and_be_one(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    archive.touch()
    assert sentence_of(tmp_path / "nowhere") == f"the image folder {tmp_path / 'nowhere'} does not exist"
    assert sentence_of(archive) == f"{archive} is not a folder; name the folder that holds the images"
    assert "cannot be read (File name too long)" in sentence_of("x" * 300)


def test_when_nothing_is_left_the_reasons_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        save(tmp_path / f"{number}.png", size=(1, 1))
    sentence = sentence_of(tmp_path)
    assert sentence.startswith(
        f"no image of {tmp_path} (nine files in ten) can be used for train: 1.png is 1×1 pixels, smaller than "
    )
    assert sentence.endswith("; and 2 more")
    assert capsys.readouterr().err == ""


def test_more_than_memory_may_hold_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        (tmp_path / f"{number}.png").touch()
    sentence = sentence_of(tmp_path, "train", 4096)
    assert "180 images of " in sentence
    assert (
        "at resolution=4096 take 8.44 GiB, over the limit of 8.00 GiB that are held in memory; choose a smaller "
        "resolution" in sentence
    )
    monkeypatch.setattr(folder, "MAX_BYTES", 180 * 3 * R * R - 1)
    assert "over the limit" in sentence_of(tmp_path)


# --- The config and the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fashon-mnist", "did you mean 'fashion-mnist'? (a folder is 'imagefolder:PATH') (given 'fashon-mnist')"),
        ("photo", "did you mean 'photos'?"),
        ("ImageFoldr:/data", "did you mean 'imagefolder'? (a folder is 'imagefolder:PATH')"),
        (
            "zzz\n",
            "valid names are fashion-mnist, imagefolder, landscapes, photos (a folder is 'imagefolder:PATH') (given "
            "'zzz\\n')",
        ),
        ("", "valid names are"),
        ("photos:x", "did you mean 'photos'?"),
        ("imagefolder", "a folder of images is written 'imagefolder:PATH'"),
        ("imagefolder: ", "a folder of images is written 'imagefolder:PATH'"),
        ("imagefolder:a\0b", "a folder of images is written 'imagefolder:PATH'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(name=name)
    with pytest.raises(SystemExit, match="2"):
        app(["data", name])
    (sentence,) = capsys.readouterr().err.splitlines()
    assert words in sentence


def test_a_folder_has_three_channels_and_its_path_is_no_part_of_a_runs_identity() -> None:
    config = TrainConfig(quantizer=IBQConfig(), data=DataConfig(name="imagefolder:/a b/c:d"))
    data = config.data
    assert (data.channels, data.kind, data.folder) == (3, "imagefolder", "/a b/c:d")
    moved = config.with_fields(**{"data.name": "imagefolder:elsewhere"})
    assert moved != config
    assert moved.identity() == config.identity()
    assert moved.run_id("hash") == config.run_id("hash") != config.run_id("other")
    assert config.identity()["data"] == {
        "name": "imagefolder", "resolution": 32, "crop": "center", "flip": False, "resize": "antialiased"
    }  # fmt: skip
    assert config.run_id("hash") != config.with_fields(**{"data.name": "photos"}).run_id("hash")
    plain = TrainConfig(quantizer=IBQConfig())
    assert plain.identity() == plain.to_json_dict()


def test_the_command_prints_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered(tmp_path, 12, "{:02d} ä.png")
    shutil.copy(tmp_path / "00 ä.png", tmp_path / "99.png")
    (tmp_path / "05 ä.png").write_text("broken")
    assert not app(["data", f"imagefolder:{tmp_path}", "--resolution", "8"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    hashes = [load(tmp_path, split).content_hash[:12] for split in ("train", "test")]
    assert lines == [
        f"imagefolder train: 10 images of 3x8x8, hash {hashes[0]}, from {tmp_path} (nine files in ten), 1 skipped",
        f"imagefolder test: 2 images of 3x8x8, hash {hashes[1]}, from {tmp_path} (every tenth file), 0 skipped",
    ]
    with pytest.raises(SystemExit, match="2"):
        app(["data", f"imagefolder:{tmp_path}/none"])
    assert re.fullmatch(r"error: the image folder .* does not exist", capsys.readouterr().err.splitlines()[-1])
