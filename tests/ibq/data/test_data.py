"""Sources of images: the images are the right ones, and every error message says what to do."""

from __future__ import annotations

import gzip
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import PIL.Image
import pytest
import torch

from ibq.cli.app import app
from ibq.config import DataConfig
from ibq.data import (
    Images,
    Split,
    cache_folder,
    crop_grid,
    data_hash,
    data_hash_of,
    fashion_mnist,
    load_images,
    photos,
    split_regions,
)
from ibq.data.packaged import PackagedFiles, apt_download
from ibq.errors import DataError

TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PHOTOS = DataConfig(name="photos", resolution=32)


@pytest.fixture(scope="module")
def fashion_test() -> Images:
    """The test split from wherever this machine has it, fetched if it has it nowhere."""
    return load_images(DataConfig(), "test")


@pytest.fixture(scope="module")
def idx_bytes(fashion_test: Images) -> dict[str, bytes]:
    """The true content of the four IDX files, by name."""
    files, _ = fashion_mnist.FILES.find()
    return {
        name: gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for name, path in files.items()
    }


@pytest.fixture
def no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without IBQ_DATA, Debian's package, a filled cache or a network; gives the cache folder."""
    monkeypatch.delenv("IBQ_DATA", raising=False)
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    nowhere = replace(fashion_mnist.FILES, folder=tmp_path / "no package", fetchers={})
    monkeypatch.setattr(fashion_mnist, "FILES", nowhere)
    return tmp_path / "cache"


def write_idx(folder: Path, contents: dict[str, bytes], ending: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}{ending}").write_bytes(gzip.compress(content, compresslevel=1) if ending else content)
    return folder


# --- The images themselves --------------------------------------------------------------------------------------------


def test_fashion_mnist_has_its_published_size_and_balance(fashion_test: Images) -> None:
    train = load_images(DataConfig(), "train")
    for images, count in ((train, 60_000), (fashion_test, 10_000)):
        assert images.images_NCHW.shape == (count, 1, 32, 32)
        assert len(images) == count
        assert images.images_NCHW.dtype == torch.uint8
        assert images.images_NCHW.is_contiguous()
        assert int(images.images_NCHW.min()) == 0
        assert int(images.images_NCHW.max()) == 255
        assert images.labels_N is not None
        assert images.labels_N.bincount().tolist() == [count // 10] * 10
    # The mean that is commonly used to normalise this data set's 28 by 28 training images.
    assert train.images_NCHW[:, :, 2:30, 2:30].double().mean().item() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert train.content_hash != fashion_test.content_hash


def test_padding_keeps_the_interior_and_leaves_a_background_border(
    fashion_test: Images, idx_bytes: dict[str, bytes]
) -> None:
    pixels = torch.frombuffer(bytearray(idx_bytes["t10k-images-idx3-ubyte"][16:]), dtype=torch.uint8).reshape(
        -1, 28, 28
    )
    labels = torch.frombuffer(bytearray(idx_bytes["t10k-labels-idx1-ubyte"][8:]), dtype=torch.uint8)
    assert torch.equal(fashion_test.images_NCHW[:, 0, 2:30, 2:30], pixels)
    assert int(fashion_test.images_NCHW.long().sum()) == int(pixels.long().sum())
    assert fashion_test.labels_N is not None
    assert torch.equal(fashion_test.labels_N, labels.long())


def test_batch_maps_bytes_to_minus_one_to_one_and_back_exactly() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = Images("bytes", "test", torch.cat((every_byte, every_byte.flip(2))))
    batch_BCHW = images.batch(torch.tensor([1, 0, 1]), torch.device("cpu"))
    assert batch_BCHW.shape == (3, 1, 16, 16)
    assert batch_BCHW.dtype == torch.float32
    assert batch_BCHW.min().item() == -1.0
    assert batch_BCHW.max().item() == 1.0
    back_BCHW = ((batch_BCHW + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back_BCHW, images.images_NCHW[[1, 0, 1]])
    assert int(images.images_NCHW.long().sum()) == 2 * sum(range(256)), "the stored bytes must not change"


def test_content_hash_sees_shape_and_bytes_and_nothing_else() -> None:
    pixels = torch.arange(64, dtype=torch.uint8).reshape(4, 1, 4, 4)
    altered = pixels.clone()
    altered[3, 0, 3, 3] += 1
    images = Images("a", "train", pixels, torch.zeros(4, dtype=torch.int64), "here")
    assert images.content_hash == Images("b", "test", pixels.clone(), None, "there").content_hash
    assert images.content_hash == hashlib.sha256(b"(4, 1, 4, 4)" + bytes(range(64))).hexdigest()
    assert images.content_hash != Images("a", "train", altered).content_hash
    assert images.content_hash != Images("a", "train", pixels.reshape(1, 1, 8, 8)).content_hash


@pytest.mark.parametrize(
    ("images_NCHW", "labels_N", "message"),
    [
        (torch.zeros(2, 1, 4, 4), None, "uint8.*float32"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), None, r"\(2, 4, 4\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2), None, "not contiguous"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), None, r"1 or 3 channels.*\(2, 2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), None, r"square.*\(2, 3, 4, 5\)"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), None, r"at least one.*\(0, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "int64.*float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\(2,\).*\(3,\)"),
    ],
)
def test_images_refuse_what_a_trainer_cannot_use(
    images_NCHW: torch.Tensor, labels_N: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Images("x", "train", images_NCHW, labels_N)


def test_what_cannot_be_loaded_is_named() -> None:
    with pytest.raises(DataError, match=r"resolution=32.*resolution=64"):
        load_images(DataConfig(resolution=64), "train")
    with pytest.raises(DataError, match=r"'validation'.*'train' or 'test'"):
        load_images(DataConfig(), "validation")  # type: ignore[arg-type]


# --- Finding Fashion-MNIST --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subfolder", ["", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_ibq_data_is_read_raw_or_compressed_in_every_layout(
    subfolder: str,
    ending: str,
    no_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fashion_test: Images,
    idx_bytes: dict[str, bytes],
) -> None:
    # The training files are not read for the test split, so that stubs do.
    contents = {name: content if name in TEST_FILES else b"" for name, content in idx_bytes.items()}
    write_idx(tmp_path / "Bücher und Daten" / subfolder, contents, ending)
    monkeypatch.setenv("IBQ_DATA", str(tmp_path / "Bücher und Daten"))
    images = load_images(DataConfig(), "test")
    assert images.content_hash == fashion_test.content_hash
    assert "Bücher und Daten" in images.source
    assert not no_source.exists(), "nothing may be written where IBQ_DATA has it all"


def test_debian_package_comes_before_the_cache(
    no_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx_bytes: dict[str, bytes]
) -> None:
    stubs = {name: content if name in TEST_FILES else b"" for name, content in idx_bytes.items()}
    write_idx(no_source / "fashion-mnist", stubs)
    assert "the cache" in load_images(DataConfig(), "test").source
    write_idx(tmp_path / "no package", stubs, ".gz")
    assert "Debian" in load_images(DataConfig(), "test").source


def test_a_process_reads_a_split_once_unless_its_files_change(
    no_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx_bytes: dict[str, bytes]
) -> None:
    assert not fashion_mnist.FILES.are_here()
    folder = write_idx(
        tmp_path / "here", {name: content if name in TEST_FILES else b"" for name, content in idx_bytes.items()}
    )
    monkeypatch.setenv("IBQ_DATA", str(folder))
    assert fashion_mnist.FILES.are_here()
    images = load_images(DataConfig(), "test")
    assert load_images(DataConfig(), "test") is images
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"other labels")
    with pytest.raises(DataError, match="is not t10k-labels-idx1-ubyte of Fashion-MNIST"):
        load_images(DataConfig(), "test")
    monkeypatch.setenv("IBQ_DATA", str(tmp_path / "nowhere"))
    assert not fashion_mnist.FILES.are_here()


def test_a_corrupted_file_is_named_with_both_hashes_and_a_remedy(
    no_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx_bytes: dict[str, bytes]
) -> None:
    corrupted = bytearray(idx_bytes["t10k-labels-idx1-ubyte"])
    corrupted[-1] ^= 1
    folder = write_idx(tmp_path / "Größe 28", idx_bytes | {"t10k-labels-idx1-ubyte": bytes(corrupted)})
    monkeypatch.setenv("IBQ_DATA", str(folder))
    with pytest.raises(DataError) as refusal:
        load_images(DataConfig(), "test")
    sentence = str(refusal.value)
    assert str(folder / "t10k-labels-idx1-ubyte") in sentence
    assert hashlib.sha256(corrupted).hexdigest() in sentence
    assert fashion_mnist.FASHION_MNIST_SHA256["t10k-labels-idx1-ubyte"] in sentence
    assert "replace it or delete it" in sentence
    assert "\n" not in sentence


def test_a_truncated_gz_is_an_error_not_a_traceback(
    no_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx(
        tmp_path / "cut", dict.fromkeys(fashion_mnist.FASHION_MNIST_SHA256, bytes(range(256)) * 9), ".gz"
    )
    monkeypatch.setenv("IBQ_DATA", str(folder))
    images_gz = folder / "t10k-images-idx3-ubyte.gz"
    for damage in (images_gz.read_bytes()[:40], b"no gzip at all"):
        images_gz.write_bytes(damage)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz cannot be read .*replace it or delete it"):
            load_images(DataConfig(), "test")


def test_ibq_data_must_exist_and_be_complete_or_hold_other_data(
    no_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx_bytes: dict[str, bytes]
) -> None:
    folder = tmp_path / "data"
    monkeypatch.setenv("IBQ_DATA", str(folder))
    with pytest.raises(DataError, match=r"IBQ_DATA=.*data is neither a folder nor a Debian package.*unset it"):
        load_images(DataConfig(), "test")

    write_idx(no_source / "fashion-mnist", idx_bytes)
    write_idx(folder, {"photograph": b"of something else"})
    assert "the cache" in load_images(DataConfig(), "test").source

    write_idx(folder, {name: idx_bytes[name] for name in TEST_FILES})
    with pytest.raises(DataError, match=r"lacks train-images-idx3-ubyte, train-labels-idx1-ubyte .*unset IBQ_DATA"):
        load_images(DataConfig(), "test")


# --- Fetching it ------------------------------------------------------------------------------------------------------


def test_fetching_passes_over_bad_sources_and_survives_a_second_fetcher(
    no_source: Path, monkeypatch: pytest.MonkeyPatch, fashion_test: Images, idx_bytes: dict[str, bytes]
) -> None:
    def forged(files: PackagedFiles, folder: Path) -> Path:
        return write_idx(folder, dict.fromkeys(idx_bytes, b"something else"))

    def honest(files: PackagedFiles, folder: Path) -> Path:
        return write_idx(folder / "FashionMNIST" / "raw", idx_bytes).parents[1]

    fetchers = {"the forger": forged, "the friend": honest}
    monkeypatch.setattr(fashion_mnist, "FILES", replace(fashion_mnist.FILES, fetchers=fetchers))
    write_idx(
        no_source / "fashion-mnist",
        {"t10k-images-idx3-ubyte": b"left by a process that was killed between two renames"},
    )
    with ThreadPoolExecutor(2) as two:
        results = list(two.map(lambda _: load_images(DataConfig(), "test"), range(2)))
    assert {images.content_hash for images in results} == {fashion_test.content_hash}
    assert all("the friend" in images.source or "the cache" in images.source for images in results)
    assert sorted(path.name for path in (no_source / "fashion-mnist").iterdir()) == sorted(idx_bytes), (
        "no temporary folder may stay behind"
    )
    monkeypatch.setattr(fashion_mnist, "FILES", replace(fashion_mnist.FILES, fetchers={}))
    assert "the cache" in load_images(DataConfig(), "test").source


def test_when_every_source_fails_one_sentence_says_why(no_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(files: PackagedFiles, folder: Path) -> Path:
        raise RuntimeError("no route\nto host.")

    def incomplete(files: PackagedFiles, folder: Path) -> Path:
        return folder

    fetchers = {"apt": apt_download, "torchvision": unplugged, "a mirror": incomplete}
    monkeypatch.setattr(fashion_mnist, "FILES", replace(fashion_mnist.FILES, fetchers=fetchers))
    monkeypatch.setenv("PATH", str(no_source))
    with pytest.raises(DataError) as refusal:
        load_images(DataConfig(), "train")
    sentence = str(refusal.value)
    for part in (
        "IBQ_DATA is not set",
        f"{no_source.parent / 'no package'} is absent",
        f"the cache in {no_source / 'fashion-mnist'} is absent",
        "apt failed (apt-get is not on the PATH)",
        "torchvision failed (no route to host)",
        "a mirror failed (what it gave lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte "
        "and 1 more)",
        "set IBQ_DATA to a folder that holds train-images-idx3-ubyte, ",
    ):
        assert part in sentence
    assert "\n" not in sentence


def test_apts_own_complaint_reaches_the_user(no_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\necho more >&2\nexit 100\n")
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(fashion_mnist, "FILES", replace(fashion_mnist.FILES, fetchers={"apt": apt_download}))
    with pytest.raises(DataError, match=r"apt failed \(E: Unable to locate package, E: Unable to locate package\)"):
        load_images(DataConfig(), "test")


def test_a_cache_that_cannot_be_written_is_named(no_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_source.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"the cache .* cannot be written .*IBQ_CACHE moves it"):
        load_images(DataConfig(), "test")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IBQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ibq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ibq"
    monkeypatch.setenv("IBQ_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_a_user_without_a_home_is_told_of_ibq_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("IBQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(DataError, match=r"no home folder.*set IBQ_CACHE"):
        cache_folder()


# --- Photographs ------------------------------------------------------------------------------------------------------


def test_train_and_test_crops_of_a_photo_share_no_pixel() -> None:
    height, width, resolution = 40, 83, 8
    photo_CHW = (
        torch.arange(height * width).reshape(1, height, width).expand(3, -1, -1)
    )  # every pixel's value is its position
    train_CHW, test_CHW = split_regions(photo_CHW)
    assert train_CHW.shape[2] == 62
    assert test_CHW.shape[2] == 21
    train_pixels = set(crop_grid(train_CHW, resolution, resolution // 2).flatten().tolist())
    test_pixels = set(crop_grid(test_CHW, resolution, resolution).flatten().tolist())
    assert not train_pixels & test_pixels
    assert max(pixel % width for pixel in train_pixels) < 62 <= min(pixel % width for pixel in test_pixels)


def test_crops_stand_on_a_regular_grid_in_a_fixed_order() -> None:
    region_CHW = torch.arange(2 * 5 * 7).reshape(2, 5, 7)
    crops_NCHW = crop_grid(region_CHW, resolution=3, stride=2)
    corners = [(top, left) for top in (0, 2) for left in (0, 2, 4)]
    assert torch.equal(
        crops_NCHW, torch.stack([region_CHW[:, top : top + 3, left : left + 3] for top, left in corners])
    )
    assert crops_NCHW.is_contiguous()
    assert torch.equal(crop_grid(region_CHW[:, :, :5], resolution=5, stride=2)[0], region_CHW[:, :, :5])
    with pytest.raises(DataError, match="resolution=6 does not fit a region 5 pixels high and 7 wide"):
        crop_grid(region_CHW, resolution=6, stride=3)


def test_a_loaded_photo_is_cut_densely_for_training_and_without_overlap_for_testing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = 64, 96
    rows_HW, columns_HW = np.mgrid[:height, :width].astype(np.uint8)
    PIL.Image.fromarray(np.stack((rows_HW, columns_HW, 0 * rows_HW), axis=2)).save(tmp_path / "positions.png")
    monkeypatch.setattr(photos, "_photo_paths", lambda: [tmp_path / "positions.png"] * 2)
    train, test = (
        load_images(DataConfig(name="photos", resolution=16), split).images_NCHW for split in get_args(Split)
    )
    corners_train = [[top, left, 0] for top in range(0, 49, 8) for left in range(0, 57, 8)]
    corners_test = [[top, 72, 0] for top in (0, 16, 32, 48)]
    assert train[:, :, 0, 0].tolist() == 2 * corners_train
    assert test[:, :, 0, 0].tolist() == 2 * corners_test
    assert int(train[:, 1].max()) == 71
    assert int(test[:, 1].min()) == 72


def test_photos_are_colour_crops_and_the_same_every_time() -> None:
    train, test = load_images(PHOTOS, "train"), load_images(PHOTOS, "test")
    assert len(train) > len(test) > 300
    for images in (train, test):
        assert images.images_NCHW.shape[1:] == (3, 32, 32)
        assert images.labels_N is None
        assert float((images.images_NCHW[:, 0] != images.images_NCHW[:, 2]).float().mean()) > 0.5, "colour, not grey"
    assert load_images(PHOTOS, "train").content_hash == train.content_hash != test.content_hash


def test_photos_say_what_resolution_they_allow() -> None:
    for split in get_args(
        Split
    ):  # a resolution that only the training regions allow is refused before training, not after
        with pytest.raises(DataError, match=r"resolution=113 at most.*resolution=114"):
            load_images(DataConfig(name="photos", resolution=114), split)
    assert len(load_images(DataConfig(name="photos", resolution=113), "test")) >= 7


def test_absent_or_damaged_photos_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, message in (
        (
            {"no_such_package_of_photos": ("a.png",)},
            "no_such_package_of_photos, which is not installed; pip install 'ibq-study",
        ),
        ({"skimage": ("data/absent.png",)}, "absent.png is not in the installed package; pip install"),
        ({"skimage": ("data/README.txt",)}, "README.txt cannot be read .*pip install"),
    ):
        monkeypatch.setattr(photos, "PHOTOS", named)
        with pytest.raises(DataError, match=message):
            load_images(PHOTOS, "train")


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_per_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert not app(["data", "photos", "--resolution", "64"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    expected = load_images(DataConfig(name="photos", resolution=64), "test")
    assert len(lines) == 2
    assert lines[0].startswith("photos train: ")
    assert lines[1] == (
        f"photos test: {len(expected)} images of 3x64x64, hash {expected.content_hash[:12]}, from the packages skimage "
        f"and sklearn"
    )


@pytest.mark.parametrize("resolution", ["4", "64"])
def test_the_command_refuses_in_one_sentence(resolution: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        app(["data", "fashion-mnist", "--resolution", resolution])
    assert re.fullmatch(rf"error: .*{resolution}[^\n]*\n", capsys.readouterr().err)


def test_the_known_hash_is_that_of_the_loaded_images() -> None:
    train, test = (load_images(DataConfig(), split) for split in ("train", "test"))
    assert data_hash_of(DataConfig()) == data_hash(train, test)
