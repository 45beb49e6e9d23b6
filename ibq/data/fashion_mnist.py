"""Fashion-MNIST: where it is sought, how it is fetched, and that it is the right one."""

from __future__ import annotations

import socket
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ibq.data.images import Images, Split
from ibq.data.packaged import PackagedFiles, apt_download
from ibq.errors import DataError

# Of the decompressed bytes: packagers compress the same files anew, so the hashes of the .gz files differ from source
# to source.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_RESOLUTION = 32
FASHION_MNIST_CONTENT_HASH = "883b6efd2db8951ac137aea78c00c7c26fbb6de75b8cc3451235b55e335e2d8f"
"""`Images.content_hash` of the training split, which follows from the hashes above: known without loading 60,000
images."""


def load_fashion_mnist(resolution: int, split: Split) -> Images:
    """One split as uint8 (N, 1, 32, 32) with labels; see `ibq.data.load_images` for where it is sought. DataError: not
    found, not it."""
    if resolution != FASHION_MNIST_RESOLUTION:
        raise DataError(
            f"fashion-mnist comes at resolution={FASHION_MNIST_RESOLUTION} only, not at resolution={resolution}"
        )
    files, source = FILES.find()
    prefix = "train" if split == "train" else "t10k"
    paths = files[f"{prefix}-images-idx3-ubyte"], files[f"{prefix}-labels-idx1-ubyte"]
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    return _read_split(split, source, prefix, paths, stamps)


@lru_cache(maxsize=2)
def _read_split(
    split: Split, source: str, prefix: str, paths: tuple[Path, Path], stamps: tuple[tuple[int, int], ...]
) -> Images:
    """A split as its two files hold it; read once as long as they stay the same, since a process and those forked from
    it can share it."""
    pixels = FILES.read(paths[0], f"{prefix}-images-idx3-ubyte")
    classes = FILES.read(paths[1], f"{prefix}-labels-idx1-ubyte")
    # The hashes vouch for the IDX headers: 16 bytes before 28 by 28 images, 8 before labels.
    images_NHW = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    images_N1HW = torch.from_numpy(np.pad(images_NHW, ((0, 0), (2, 2), (2, 2)))).unsqueeze(1)
    labels_N = torch.from_numpy(np.frombuffer(classes, np.uint8, offset=8).astype(np.int64))
    return Images("fashion-mnist", split, images_N1HW, labels_N, source)


def _torchvision_download(files: PackagedFiles, folder: Path) -> Path:
    """Fetcher: through torchvision, which keeps the four files in FashionMNIST/raw."""
    from torchvision.datasets import FashionMNIST

    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision sets none, and a firewall that drops packets would hang it
    try:
        FashionMNIST(str(folder), train=True, download=True)
    finally:
        socket.setdefaulttimeout(timeout_before)
    return folder


FILES = PackagedFiles(
    name="fashion-mnist",
    title="Fashion-MNIST",
    sha256=FASHION_MNIST_SHA256,
    package="dataset-fashion-mnist",
    folder=Path("/usr/share/datasets/fashion-mnist"),
    layouts=("FashionMNIST/raw",),
    size="30 MB",
    wanted=f"a folder that holds {', '.join(FASHION_MNIST_SHA256)} (raw or .gz), or the .deb of dataset-fashion-mnist",
    fetchers={
        "apt's download of dataset-fashion-mnist": apt_download,
        "torchvision's download": _torchvision_download,
    },
)
