"""The images that tokenizers train on: Fashion-MNIST, and crops of photographs that arrive inside Python wheels.

`python -m ibq.data` fetches what is missing and prints one line per split, so that a training run never waits for a download.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import http.client
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import ValidationError

from ibq.config import DataConfig
from ibq.errors import one_sentence

Split = Literal["train", "test"]

# Of the decompressed bytes: packagers compress the same files anew, so the hashes of the .gz files differ from source to source.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FOUR_FILES = ", ".join(FASHION_MNIST_SHA256) + " (raw or .gz)"
FASHION_MNIST_RESOLUTION = 32
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PHOTOS = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg", "data/motorcycle_left.png"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


class DataError(ValueError):
    """Data that is absent, damaged or does not fit; the message is one sentence that a user can act on."""


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a data set, whole in memory.

    Args:
        name: the data set.
        split: "train" or "test".
        images_NCHW: uint8, contiguous, square, C of 1 or 3, at least one image.
        labels_N: int64 class of every image, or None.
        source: where the images came from, for people; no part of their identity.

    Raises:
        DataError: a tensor has another type or shape.
    """

    name: str
    split: str
    images_NCHW: torch.Tensor
    labels_N: torch.Tensor | None = None
    source: str = "memory"

    def __post_init__(self) -> None:
        images, labels, shape = (self.images_NCHW, self.labels_N, tuple(self.images_NCHW.shape))
        if images.dtype != torch.uint8 or images.ndim != 4 or not images.is_contiguous():
            layout = "contiguous" if images.is_contiguous() else "not contiguous"
            raise DataError(f"images must be a contiguous uint8 tensor (N, C, H, W), but these are {images.dtype} {shape}, {layout}")
        if len(images) == 0 or shape[1] not in (1, 3) or shape[2] != shape[3] or shape[2] == 0:
            raise DataError(f"images must be square, of 1 or 3 channels and at least one, but their shape (N, C, H, W) is {shape}")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != shape[:1]):
            raise DataError(f"labels must be int64 of shape {shape[:1]}, but these are {labels.dtype} {tuple(labels.shape)}")

    def __len__(self) -> int:
        return len(self.images_NCHW)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over the shape and the bytes of the images: their part in a run's identity."""
        digest = hashlib.sha256(repr(tuple(self.images_NCHW.shape)).encode())
        digest.update(self.images_NCHW.cpu().numpy().data)
        return digest.hexdigest()

    def batch(self, indices_B: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """Chosen images as a network reads them.

        Args:
            indices_B: int64 positions in this split.
            device: where the batch is wanted; the bytes travel, and are widened there.

        Returns:
            float32 (B, C, H, W); 0 becomes exactly -1 and 255 exactly 1.
        """
        bytes_BCHW = self.images_NCHW[indices_B.to(self.images_NCHW.device)]
        return bytes_BCHW.to(device).to(torch.float32).div_(127.5).sub_(1.0)


def load_images(config: DataConfig, split: Split) -> Images:
    """One split of the images that `config` names, fetched on first use.

    Fashion-MNIST's 28×28 images stand in the middle of 32×32 with the background value 0 around them. It is sought in the folder IBQ_DATA,
    in Debian's package dataset-fashion-mnist, in the cache folder, and then fetched. An IBQ_DATA folder that holds none of the four files
    may belong to other data and is passed over; one that does not exist or holds some of the four is an error.

    Args:
        config: name and resolution (pixels a side).
        split: "train" or "test".

    Returns:
        The images: 60,000 or 10,000 with labels for Fashion-MNIST; for photos, overlapping (train) or adjacent (test) RGB crops.

    Raises:
        DataError: the data is absent, damaged, or does not come at this resolution.
    """
    if split not in get_args(Split):
        raise DataError(f"there is no split {split!r}; choose 'train' or 'test'")
    return _load_fashion_mnist(config.resolution, split) if config.name == "fashion-mnist" else _load_photos(config.resolution, split)


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------------------------------


def _load_fashion_mnist(resolution: int, split: Split) -> Images:
    if resolution != FASHION_MNIST_RESOLUTION:
        raise DataError(f"fashion-mnist comes at resolution={FASHION_MNIST_RESOLUTION} only, not at resolution={resolution}")
    files, source = _find_fashion_mnist()
    prefix = "train" if split == "train" else "t10k"
    pixels = _read_verified(files[f"{prefix}-images-idx3-ubyte"], f"{prefix}-images-idx3-ubyte")
    classes = _read_verified(files[f"{prefix}-labels-idx1-ubyte"], f"{prefix}-labels-idx1-ubyte")
    # The hashes vouch for the IDX headers: 16 bytes before 28 by 28 images, 8 before labels.
    images_NHW = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    images_N1HW = torch.from_numpy(np.pad(images_NHW, ((0, 0), (2, 2), (2, 2)))).unsqueeze(1)
    labels_N = torch.from_numpy(np.frombuffer(classes, np.uint8, offset=8).astype(np.int64))
    return Images("fashion-mnist", split, images_N1HW, labels_N, source)


def cache_folder() -> Path:
    """The folder for fetched data: IBQ_CACHE, else `ibq` in XDG_CACHE_HOME or ~/.cache; it need not exist yet."""
    if given := os.environ.get("IBQ_CACHE"):
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ibq"
    except RuntimeError:
        raise DataError("this user has no home folder to cache data in; set IBQ_CACHE to a folder that can be written") from None


def _find_fashion_mnist() -> tuple[dict[str, Path], str]:
    """Path of each of the four IDX files, and a phrase that says which source they are from."""
    passed_over = ["IBQ_DATA is not set"]
    if given := os.environ.get("IBQ_DATA"):
        if not os.path.isdir(folder := Path(given).expanduser()):
            raise DataError(f"IBQ_DATA={given} is not a folder; point it at one that holds {_FOUR_FILES}, or unset it")
        found = _idx_files(folder)
        if len(found) == len(FASHION_MNIST_SHA256):
            return found, f"IBQ_DATA {folder}"
        if found:
            missing = ", ".join(name for name in FASHION_MNIST_SHA256 if name not in found)
            raise DataError(f"IBQ_DATA={given} lacks {missing} (raw or .gz) of Fashion-MNIST; add what is missing, or unset IBQ_DATA")
        passed_over = [f"IBQ_DATA={given} holds none of its files"]
    cache = cache_folder() / "fashion-mnist"
    for folder, source in ((DEBIAN_FOLDER, f"Debian's package {DEBIAN_PACKAGE}"), (cache, "the cache")):
        if len(found := _idx_files(folder)) == len(FASHION_MNIST_SHA256):
            return found, f"{source} in {folder}"
        passed_over.append(f"{source} in {folder} is absent or incomplete")
    return _fetch_fashion_mnist(cache, passed_over)


def _idx_files(folder: Path) -> dict[str, Path]:
    """The IDX files in `folder` or in a subfolder of a usual name, whichever holds most of them; raw before .gz, as it reads faster."""
    layouts = []
    for place in (folder, folder / "fashion-mnist", folder / "FashionMNIST" / "raw"):
        candidates = [(name, place / f"{name}{ending}") for name in FASHION_MNIST_SHA256 for ending in (".gz", "")]
        layouts.append({name: path for name, path in candidates if os.path.isfile(path)})
    return max(layouts, key=len)


def _read_verified(path: Path, name: str) -> bytes:
    """The decompressed bytes of the IDX file `name`; a DataError if they are not Fashion-MNIST's."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}); replace it or delete it") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != FASHION_MNIST_SHA256[name]:
        raise DataError(
            f"{path} is not Fashion-MNIST's {name}: its content has sha256 {digest} where {FASHION_MNIST_SHA256[name]} is expected; "
            "replace it or delete it"
        )
    return content


def _fetch_fashion_mnist(cache: Path, passed_over: list[str]) -> tuple[dict[str, Path], str]:
    """Fill the cache from the first source that delivers. Each file arrives whole by a rename, so several processes may fetch at once."""
    print(f"Fetching Fashion-MNIST (30 MB) into {cache}", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for source, fetch in FETCHERS.items():
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as folder:
                try:
                    found = _idx_files(fetch(Path(folder)))
                    for name in FASHION_MNIST_SHA256:
                        if name not in found:
                            raise DataError(f"what it gave lacks {name}")
                        _read_verified(found[name], name)
                except (DataError, OSError, RuntimeError, subprocess.SubprocessError, http.client.HTTPException) as error:
                    passed_over.append(f"{source} failed ({_one_line(error)})")
                    continue
                for path in found.values():
                    os.replace(path, cache / path.name)
            return _idx_files(cache), f"{source}, now in {cache}"
    except OSError as error:
        passed_over.append(f"the cache {cache} cannot be written ({_one_line(error)}; IBQ_CACHE moves it)")
    raise DataError(f"Fashion-MNIST was not found: {'; '.join(passed_over)}; set IBQ_DATA to a folder that holds {_FOUR_FILES}")


def _fetch_debian(folder: Path) -> Path:
    """Download and unpack Debian's package with an apt state of its own: no root, no system list, nothing of the system's changed."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not on the PATH")
    # The system's hooks around an update or a download clean up the system's own cache: not wanted here, and only a file can clear them.
    (folder / "apt.conf").write_text("#clear APT::Update;\n#clear DPkg;\n")
    (folder / "status").touch()
    private = {"Dir::State": folder, "Dir::State::lists": folder / "lists", "Dir::State::status": folder / "status", "Dir::Cache": folder}
    network = {"Acquire::Languages": "none", "Acquire::Retries": 1, "Acquire::http::Timeout": 30, "Acquire::https::Timeout": 30}
    # As root, apt would otherwise download as another user, who may not enter this folder.
    options = private | {"Dir::Cache::archives": folder / "archives"} | network | {"APT::Sandbox::User": "root"}
    for subfolder in ("lists/partial", "archives/partial"):
        (folder / subfolder).mkdir(parents=True)
    apt = ["apt-get", "-q", "-c", str(folder / "apt.conf"), *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    _, update_complaint = _run([*apt, "update"], folder)  # one dead repository among many fails it; the download is what counts
    downloaded, complaint = _run([*apt, "download", DEBIAN_PACKAGE], folder)
    packages = list(folder.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if not downloaded or not packages:
        raise DataError(", ".join(filter(None, (update_complaint, complaint))) or "apt-get gave no package")
    unpacked, complaint = _run(["dpkg-deb", "-x", str(packages[0]), str(folder / "package")], folder)
    if not unpacked:
        raise DataError(complaint)
    return folder / "package" / DEBIAN_FOLDER.relative_to("/")


def _fetch_torchvision(folder: Path) -> Path:
    """Download through torchvision, which keeps the four files in FashionMNIST/raw."""
    from torchvision.datasets import FashionMNIST

    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision sets none, and a firewall that drops packets would hang it
    try:
        FashionMNIST(str(folder), train=True, download=True)
    finally:
        socket.setdefaulttimeout(timeout_before)
    return folder


FETCHERS: dict[str, Callable[[Path], Path]] = {
    f"apt's download of {DEBIAN_PACKAGE}": _fetch_debian,
    "torchvision's download": _fetch_torchvision,
}


def _run(command: list[str], folder: Path) -> tuple[bool, str]:
    """Whether a command succeeded, and the first line of its complaints."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    return done.returncode == 0, _one_line(done.stderr.strip().partition("\n")[0])


def _one_line(reason: object) -> str:
    text = " ".join(str(reason).split()).rstrip(".")
    return text or ("" if isinstance(reason, str) else type(reason).__name__)


# --- Photographs -------------------------------------------------------------------------------------------------------------------------


def _load_photos(resolution: int, split: Split) -> Images:
    regions = [split_regions(_read_photo(path)) for path in _photo_paths()]
    largest = min(min(region.shape[1:]) for pair in regions for region in pair)
    if resolution > largest:
        raise DataError(f"photos come at resolution={largest} at most, as the smallest test region allows, not at resolution={resolution}")
    if split == "train":
        crops = [crop_grid(train_CHW, resolution, stride=resolution // 2) for train_CHW, _ in regions]
    else:
        crops = [crop_grid(test_CHW, resolution, stride=resolution) for _, test_CHW in regions]
    return Images("photos", split, torch.cat(crops), None, f"the packages {' and '.join(PHOTOS)}")


def _photo_paths() -> list[Path]:
    """The photographs in their fixed order, found without importing the packages (which takes seconds)."""
    paths = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"photos are files of the package {package}, which is not installed; pip install 'ibq-study[study]'")
        paths += [Path(spec.submodule_search_locations[0]) / name for name in names]
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"the photo {path} is not in the installed package; pip install --force-reinstall 'ibq-study[study]'")
    return paths


def _read_photo(path: Path) -> torch.Tensor:
    from PIL import Image

    try:
        with Image.open(path) as photo:
            photo_HWC = np.array(photo.convert("RGB"))
    except OSError as error:
        raise DataError(f"the photo {path} cannot be read ({_one_line(error)}); pip install --force-reinstall 'ibq-study[study]'") from None
    return torch.from_numpy(photo_HWC).permute(2, 0, 1)


def split_regions(photo_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The left three quarters of a photo, for training, and the right quarter, for testing: views that share no pixel."""
    border = photo_CHW.shape[2] * 3 // 4
    return photo_CHW[:, :, :border], photo_CHW[:, :, border:]


def crop_grid(region_CHW: torch.Tensor, resolution: int, stride: int) -> torch.Tensor:
    """Square crops on a regular grid, row by row from the top left; pixels beyond the last whole crop are left out.

    Args:
        region_CHW: a photo or a part of one.
        resolution: side of a crop in pixels.
        stride: distance in pixels between neighbouring crops.

    Returns:
        (N, C, resolution, resolution), contiguous, of the region's type.

    Raises:
        DataError: the region is smaller than a crop.
    """
    channels, height, width = region_CHW.shape
    if resolution > min(height, width):
        raise DataError(f"resolution={resolution} does not fit a region {height} pixels high and {width} wide")
    windows_CYXHW = region_CHW.unfold(1, resolution, stride).unfold(2, resolution, stride)
    return windows_CYXHW.permute(1, 2, 0, 3, 4).reshape(-1, channels, resolution, resolution).contiguous()


def main(arguments: list[str] | None = None) -> None:
    """Fetch a data set where need be and print, for each split: number, shape, content hash, source."""
    parser = argparse.ArgumentParser(prog="python -m ibq.data", description=main.__doc__)
    parser.add_argument("name", nargs="?", default="fashion-mnist", choices=get_args(DataConfig.model_fields["name"].annotation))
    parser.add_argument("--resolution", type=int, default=FASHION_MNIST_RESOLUTION, help="pixels a side (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        config = DataConfig(name=given.name, resolution=given.resolution)
        for split in get_args(Split):
            images = load_images(config, split)
            shape = "x".join(str(size) for size in images.images_NCHW.shape[1:])
            print(f"{images.name} {split}: {len(images):,} images of {shape}, hash {images.content_hash[:12]}, from {images.source}")
    except ValidationError as error:
        sys.exit(f"ibq.data: {one_sentence(error)}")
    except DataError as error:
        sys.exit(f"ibq.data: {error}")


if __name__ == "__main__":
    main()
