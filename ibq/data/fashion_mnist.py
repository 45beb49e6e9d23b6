"""Fashion-MNIST: where it is sought, how it is fetched, and that it is the right one."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ibq.data.images import Images, Split, one_line
from ibq.errors import DataError

# Of the decompressed bytes: packagers compress the same files anew, so the hashes of the .gz files differ from source
# to source.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FOUR_FILES = ", ".join(FASHION_MNIST_SHA256) + " (raw or .gz)"
FASHION_MNIST_RESOLUTION = 32
FASHION_MNIST_CONTENT_HASH = "883b6efd2db8951ac137aea78c00c7c26fbb6de75b8cc3451235b55e335e2d8f"
"""`Images.content_hash` of the training split, which follows from the hashes above: known without loading 60,000
images."""
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load_fashion_mnist(resolution: int, split: Split) -> Images:
    """One split as uint8 (N, 1, 32, 32) with labels; see `ibq.data.load_images` for where it is sought. DataError: not
    found, not it."""
    if resolution != FASHION_MNIST_RESOLUTION:
        raise DataError(
            f"fashion-mnist comes at resolution={FASHION_MNIST_RESOLUTION} only, not at resolution={resolution}"
        )
    files, source = _find_fashion_mnist()
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
    pixels = _read_verified(paths[0], f"{prefix}-images-idx3-ubyte")
    classes = _read_verified(paths[1], f"{prefix}-labels-idx1-ubyte")
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
        raise DataError(
            "this user has no home folder to cache data in; set IBQ_CACHE to a folder that can be written"
        ) from None


def fashion_mnist_is_here() -> bool:
    """True if loading it would find it, and so fetch nothing."""
    try:
        return isinstance(_seek_fashion_mnist(), tuple)
    except DataError:
        return False


def _find_fashion_mnist() -> tuple[dict[str, Path], str]:
    """Path of each of the four IDX files, fetched where they are not here, and a phrase that says which source they are
    from."""
    sought = _seek_fashion_mnist()
    return sought if isinstance(sought, tuple) else _fetch_fashion_mnist(cache_folder() / "fashion-mnist", sought)


def _seek_fashion_mnist() -> tuple[dict[str, Path], str] | list[str]:
    """As `_find_fashion_mnist`, or which places were passed over in vain."""
    passed_over = ["IBQ_DATA is not set"]
    if given := os.environ.get("IBQ_DATA"):
        if not os.path.isdir(folder := Path(given).expanduser()):
            raise DataError(f"IBQ_DATA={given} is not a folder; point it at one that holds {_FOUR_FILES}, or unset it")
        found = _idx_files(folder)
        if len(found) == len(FASHION_MNIST_SHA256):
            return found, f"IBQ_DATA {folder}"
        if found:
            missing = ", ".join(name for name in FASHION_MNIST_SHA256 if name not in found)
            raise DataError(
                f"IBQ_DATA={given} lacks {missing} (raw or .gz) of Fashion-MNIST; add what is missing, or unset "
                f"IBQ_DATA"
            )
        passed_over = [f"IBQ_DATA={given} holds none of its files"]
    for place, source in (
        (lambda: DEBIAN_FOLDER, f"Debian's package {DEBIAN_PACKAGE}"),
        (lambda: cache_folder() / "fashion-mnist", "the cache"),  # asked last: a user without a home has none
    ):
        folder = place()
        if len(found := _idx_files(folder)) == len(FASHION_MNIST_SHA256):
            return found, f"{source} in {folder}"
        passed_over.append(f"{source} in {folder} is absent or incomplete")
    return passed_over


def _idx_files(folder: Path) -> dict[str, Path]:
    """The IDX files in `folder` or in a subfolder of a usual name, whichever holds most of them; raw before .gz, as it
    reads faster."""
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
        raise DataError(f"{path} cannot be read ({one_line(error)}); replace it or delete it") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != FASHION_MNIST_SHA256[name]:
        raise DataError(
            f"{path} is not Fashion-MNIST's {name}: its content has sha256 {digest} where {FASHION_MNIST_SHA256[name]} "
            f"is expected; "
            "replace it or delete it"
        )
    return content


def _fetch_fashion_mnist(cache: Path, passed_over: list[str]) -> tuple[dict[str, Path], str]:
    """Fill the cache from the first source that delivers. Each file arrives whole by a rename, so several processes may
    fetch at once."""
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
                except (
                    DataError,
                    OSError,
                    RuntimeError,
                    subprocess.SubprocessError,
                    http.client.HTTPException,
                ) as error:
                    passed_over.append(f"{source} failed ({one_line(error)})")
                    continue
                for path in found.values():
                    os.replace(path, cache / path.name)
            return _idx_files(cache), f"{source}, now in {cache}"
    except OSError as error:
        passed_over.append(f"the cache {cache} cannot be written ({one_line(error)}; IBQ_CACHE moves it)")
    raise DataError(
        f"Fashion-MNIST was not found: {'; '.join(passed_over)}; set IBQ_DATA to a folder that holds {_FOUR_FILES}"
    )


def _fetch_debian(folder: Path) -> Path:
    """Download and unpack Debian's package with an apt state of its own: no root, no system list, nothing of the
    system's changed."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not on the PATH")
    # The system's hooks around an update or a download clean up the system's own cache: not wanted here, and only a
    # file can clear them.
    (folder / "apt.conf").write_text("#clear APT::Update;\n#clear DPkg;\n")
    (folder / "status").touch()
    private = {
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
    }
    network = {
        "Acquire::Languages": "none",
        "Acquire::Retries": 1,
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    # As root, apt would otherwise download as another user, who may not enter this folder.
    options = private | {"Dir::Cache::archives": folder / "archives"} | network | {"APT::Sandbox::User": "root"}
    for subfolder in ("lists/partial", "archives/partial"):
        (folder / subfolder).mkdir(parents=True)
    apt = [
        "apt-get",
        "-q",
        "-c",
        str(folder / "apt.conf"),
        *(part for key, value in options.items() for part in ("-o", f"{key}={value}")),
    ]
    _, update_complaint = _run(
        [*apt, "update"], folder
    )  # one dead repository among many fails it; the download is what counts
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
    """True if a command succeeded, and the first line of its complaints."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode == 0, one_line(done.stderr.strip().partition("\n")[0])
