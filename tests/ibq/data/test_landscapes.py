"""Landscapes: the right photographs, split by photograph, and a package that is found, unpacked and refused in one
sentence."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from ibq.config import DataConfig
from ibq.data import Images, data_hash, data_hash_of, fashion_mnist, load_images
from ibq.data import landscapes as module
from ibq.data.landscapes import CLASSES, FILES, class_of, is_flat, photographs_for_testing, series_of
from ibq.data.packaged import apt_download
from ibq.errors import DataError

LANDSCAPES = DataConfig(name="landscapes", resolution=32)
NAMES = ("beach0.jpg", "city1.jpg", "city2.jpg", "nasa3.jpg")
INNER = "usr/share/games/of-tests/images/land"
STATEMENT = "usr/share/doc/endless-sky-data/copyright"


# --- The photographs, from wherever this machine has them, fetched if it has them nowhere -----------------------------


@pytest.fixture(scope="module")
def real() -> dict[str, Images]:
    return {split: load_images(LANDSCAPES, split) for split in ("train", "test")}


def test_crops_are_the_counted_ones_in_colour_with_classes_in_both_splits(real: dict[str, Images]) -> None:
    for split, count in (("train", 38_296), ("test", 6_128)):
        images = real[split]
        assert images.images_NCHW.shape == (count, 3, 32, 32)
        assert images.labels_N is not None
        per_class = images.labels_N.bincount().tolist()
        assert len(per_class) == len(CLASSES) == 20
        assert min(per_class) > 100
        # A sample of the split stands at its beginning: no class is more than twice its share among the first 1,000.
        first = images.labels_N[:1000].bincount(minlength=20)
        assert bool((first <= 2 * 1000 / count * torch.tensor(per_class) + 10).all())
        weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
        grey_N1HW = (images.images_NCHW.float() * weights).sum(1, keepdim=True)
        assert float(grey_N1HW.flatten(1).std(1, correction=0).min()) == pytest.approx(8, abs=0.2)


def test_two_independent_loads_give_the_known_hash(real: dict[str, Images]) -> None:
    first = [real[split] for split in ("train", "test")]
    module._read_splits.cache_clear()
    second = [load_images(LANDSCAPES, split) for split in ("train", "test")]
    assert second[0] is not first[0]
    assert [images.content_hash for images in first] == [images.content_hash for images in second]
    assert data_hash_of(LANDSCAPES) == data_hash(*first)


# --- The split --------------------------------------------------------------------------------------------------------


def test_no_series_is_in_both_splits_and_an_eighth_is_for_testing() -> None:
    testing = photographs_for_testing(FILES.sha256)
    series = {name: series_of(name) for name in FILES.sha256}
    assert len(series) == 273
    assert len(testing) == 35
    assert not {series[name] for name in testing} & {series[name] for name in series if name not in testing}
    for names in (testing, FILES.sha256.keys() - testing):
        assert {class_of(name) for name in names} == set(range(len(CLASSES)))
    assert not {"badlands3.jpg", "bwerner2.jpg"} & testing, "they show the same rocks"
    assert Counter(map(class_of, FILES.sha256))[CLASSES.index("other")] == 45


def test_series_are_of_one_photographer_one_source_or_one_run_of_numbers() -> None:
    names = ("mountain10-sfiera", "mountain10", "mountain1", "canyon01", "canyon05", "canyon0", "nasa3", "earthrise")
    expected = ["mountain-sfiera", "mountain10", "mountain1", "canyon0x", "canyon0x", "canyon0", "nasa", "earthrise"]
    assert [series_of(f"{name}.jpg") for name in names] == expected
    assert [CLASSES[class_of(f"{name}.jpg")] for name in names[:1] + names[-2:]] == ["mountain", "other", "other"]


def test_flat_is_a_standard_deviation_below_eight() -> None:
    half = torch.tensor([0, 1]).repeat(512).reshape(1, 1, 32, 32)  # of a standard deviation of one half
    crops_N1HW = torch.cat([15 * half, 16 * half, 200 + 16 * half, 0 * half]).to(torch.uint8)
    assert is_flat(crops_N1HW).tolist() == [True, False, False, True]


# --- A package of four photographs ------------------------------------------------------------------------------------


def jpeg(seed: int) -> bytes:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (16, 32, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels_HWC).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_xz(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def write_deb(path: Path, contents: dict[str, bytes], package: str = "endless-sky-data") -> Path:
    """A Debian package: an ar archive whose members begin at even places."""
    control = tar_xz({"control": f"Package: {package}\nVersion: 1\n".encode()})
    members = {"debian-binary": b"2.0\n", "control.tar.xz": control, "data.tar.xz": tar_xz(contents)}
    packed = b"!<arch>\n"
    for name, content in members.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        packed += content + b"\n" * (len(content) % 2)
    path.write_bytes(packed)
    return path


@pytest.fixture
def contents() -> dict[str, bytes]:
    return {f"{INNER}/{name}": jpeg(seed) for seed, name in enumerate(NAMES)} | {
        f"{INNER}/extra.jpg": b"of no interest",
        STATEMENT: b"Files: *\nLicense: public-domain\n",
    }


@pytest.fixture
def cache(contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four photographs are landscapes, on a machine that has them nowhere and no network; gives the cache folder."""
    sha256 = {name: hashlib.sha256(contents[f"{INNER}/{name}"]).hexdigest() for name in NAMES}
    monkeypatch.setattr(module, "FILES", replace(FILES, sha256=sha256, fetchers={}, folder=Path("/", INNER)))
    pixels = [PIL.Image.open(io.BytesIO(contents[f"{INNER}/{name}"])).tobytes() for name in NAMES]
    monkeypatch.setattr(module, "PIXELS_SHA256", hashlib.sha256(b"".join(pixels)).hexdigest())
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IBQ_DATA", raising=False)
    return tmp_path / "cache" / "landscapes"


def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("layout", ["", "landscapes", "images/land", INNER])
def test_ibq_data_is_read_in_every_layout(
    layout: str, cache: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = {Path(path).name: content for path, content in contents.items() if path.startswith(INNER)}
    write_files(tmp_path / "Größe" / layout, photographs)
    monkeypatch.setenv("IBQ_DATA", str(tmp_path / "Größe"))
    images = load_images(LANDSCAPES, "test")
    assert len(images) == 3 * 32
    assert "Größe" in images.source
    assert not cache.exists(), "nothing may be written where IBQ_DATA has it all"


@pytest.mark.parametrize("named", ["the package", "its folder"])
def test_a_package_is_unpacked_once_with_its_statement_of_copyright(
    named: str, cache: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    deb = write_deb(tmp_path / "here" / "endless-sky-data_1_all.deb", contents)
    monkeypatch.setenv("IBQ_DATA", str(deb if named == "the package" else deb.parent))
    assert module.FILES.are_here()
    images = load_images(LANDSCAPES, "train")
    assert images.source == f"IBQ_DATA {deb}, unpacked in {cache}"
    assert sorted(path.name for path in cache.iterdir()) == sorted([*NAMES, "copyright"])
    assert (cache / "copyright").read_bytes() == contents[STATEMENT]
    stamp = (cache / NAMES[0]).stat().st_mtime_ns
    assert load_images(LANDSCAPES, "train") is images
    assert (cache / NAMES[0]).stat().st_mtime_ns == stamp
    monkeypatch.delenv("IBQ_DATA")
    assert load_images(LANDSCAPES, "train").source == f"the cache in {cache}"


def test_a_folder_may_hold_both_data_sets_and_a_package_of_one_is_passed_over_by_the_other(
    cache: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = write_files(tmp_path / "both", contents | dict.fromkeys(fashion_mnist.FILES.sha256, b""))
    monkeypatch.setenv("IBQ_DATA", str(both))
    assert module.FILES.find().source == fashion_mnist.FILES.find().source == f"IBQ_DATA {both}"
    fashion = replace(fashion_mnist.FILES, folder=Path("/", INNER), fetchers={})
    monkeypatch.setenv("IBQ_DATA", str(write_deb(tmp_path / "x.deb", contents)))
    assert module.FILES.are_here()
    with pytest.raises(
        DataError, match=r"IBQ_DATA=.*x.deb holds none of its files; .*, or the .deb of dataset-fashion"
    ):
        fashion.find()
    inner = {f"{INNER}/{name}.gz": b"" for name in fashion.sha256}
    monkeypatch.setenv("IBQ_DATA", str(write_deb(tmp_path / "y.deb", inner, "dataset-fashion-mnist")))
    with pytest.raises(
        DataError, match=r"cannot be used: its train-images-idx3-ubyte.gz is not .* of Fashion-MNIST: .* sha"
    ):
        fashion.find()


def test_what_cannot_be_used_is_one_sentence_and_leaves_nothing(
    cache: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deb = write_deb(tmp_path / "a.deb", contents)
    whole = deb.read_bytes()
    (tmp_path / "short.deb").write_bytes(whole[:-100])
    (tmp_path / "shorter.deb").write_bytes(whole[:100])
    (tmp_path / "broken.deb").write_bytes(whole[:-5000] + bytes(5000))
    (tmp_path / "photo.jpg").write_bytes(jpeg(0))
    write_deb(tmp_path / "other.deb", {path: contents[path] for path in list(contents)[1:]})
    write_deb(tmp_path / "changed.deb", contents | {f"{INNER}/city1.jpg": jpeg(9)})
    for name, message in (
        (
            "short.deb",
            r"cannot be used: .*short.deb cannot be unpacked: it ends after [\d,]+ of [\d,]+ bytes of data.tar",
        ),
        ("shorter.deb", r"cannot be used: .*shorter.deb cannot be unpacked: it ends before control.tar"),
        ("broken.deb", r"cannot be used: .*broken.deb cannot be unpacked: "),
        ("photo.jpg", r"photo.jpg is neither a folder nor a Debian package \(.deb\); point IBQ_DATA at Debian 12's"),
        ("nowhere", r"nowhere is neither a folder nor a Debian package"),
        ("other.deb", r"cannot be used: other.deb lacks beach0.jpg; point IBQ_DATA at"),
        (
            "changed.deb",
            r"its city1.jpg is not city1.jpg of landscapes: its content has sha256 \w+ where \w+ is expected",
        ),
    ):
        monkeypatch.setenv("IBQ_DATA", str(tmp_path / name))
        with pytest.raises(DataError, match=message) as refusal:
            load_images(LANDSCAPES, "train")
        assert "\n" not in str(refusal.value)
        assert "unset it" in str(refusal.value)
        assert not cache.exists() or not list(cache.iterdir()), name


def test_without_package_and_network_one_sentence_says_what_was_tried(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILES", replace(module.FILES, fetchers={"apt's download": apt_download}))
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: Could not resolve the mirror' >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    for path, complaint in ((str(tmp_path / "no tools"), "apt-get is not on"), (str(tmp_path), "E: Could not resolve")):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(DataError, match=rf"^landscapes was not found: .*{complaint}.*set IBQ_DATA to Debian 12's"):
            load_images(LANDSCAPES, "train")
        assert not list(cache.iterdir())


def test_a_damaged_photograph_is_named(
    cache: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "data", contents) / INNER
    monkeypatch.setenv("IBQ_DATA", str(tmp_path / "data"))
    (folder / "city2.jpg").write_bytes(jpeg(5))
    with pytest.raises(
        DataError, match=rf"^{folder}/city2.jpg is not city2.jpg of landscapes: .* replace it or delete"
    ):
        load_images(LANDSCAPES, "train")
    cut = jpeg(2)[:900]
    (folder / "city2.jpg").write_bytes(cut)
    monkeypatch.setitem(module.FILES.sha256, "city2.jpg", hashlib.sha256(cut).hexdigest())
    with pytest.raises(
        DataError, match=r"city2.jpg cannot be decoded by Pillow [\d.]+ \(.*\); pip install --force-reinstall pillow"
    ):
        load_images(LANDSCAPES, "train")
    (folder / "city2.jpg").unlink()
    with pytest.raises(
        DataError, match=r"^IBQ_DATA=.*data lacks city2.jpg of landscapes; add what is missing, or unset"
    ):
        load_images(LANDSCAPES, "train")


def test_another_decoder_and_another_resolution_are_refused(
    cache: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IBQ_DATA", str(write_files(tmp_path / "data", contents)))
    with pytest.raises(DataError, match=r"^landscapes comes at resolution=32, 64 or 128, not at resolution=48$"):
        load_images(DataConfig(name="landscapes", resolution=48), "train")
    assert load_images(DataConfig(name="landscapes", resolution=64), "test").images_NCHW.shape == (3 * 8, 3, 64, 64)
    monkeypatch.setattr(module, "PIXELS_SHA256", "0" * 64)
    module._read_splits.cache_clear()
    with pytest.raises(DataError, match=r"libjpeg .* to pixels of sha256 \w{64} where 0{64} is expected; pip install"):
        load_images(LANDSCAPES, "train")
