"""Crops of 273 photographs of landscapes, cities and spacecraft, split by photograph.

They are the 720×360 RGB pictures in images/land of the game Endless Sky 0.9.8, as Debian 12 packages them; most are in
the public domain, the others CC-BY-SA-3.0, CC-BY-SA-4.0 or CC-BY-4.0, as the file `copyright` beside the cache says.
Later versions of the game have replaced 33 of them and dropped one, so that only this version is landscapes.

Crops: a grid of disjoint squares from the top left corner, but those that are flat (standard deviation of grey below 8
of 255: clear sky, night, fog), which hold nothing to reconstruct. How many remain of 66,066, 15,015 and 2,730:

| resolution | train (238 photographs) | test (35 photographs) |
|---|---|---|
| 32 | 38,296 | 6,128 |
| 64 | 10,609 | 1,652 |
| 128 | 2,215 | 337 |

Split: in each class an eighth of the photographs is for testing, by whole series. A series is what one photographer
gave of one scene (mountain-harro), what is named after its source (bwerner) or a run of numbers (canyon01 to canyon05);
any other photograph is a series of its own.

Labels: the scene, by which most files are named, where it has at least five photographs. The 43 that are named after
their source, and the only ones of industry and earthrise, are the last class, "other": to leave them out would cost a
sixth of the data, and to name their scenes by eye would be a labelling of our own.

Order: by a hash of photograph and place, so that any number of images from the start of a split is a sample of it.

Suffixes: N crops, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import PIL
import torch
from PIL import Image, features

from ibq.data.images import Images, Split, one_line
from ibq.data.packaged import PackagedFiles, apt_download
from ibq.data.photos import crop_grid
from ibq.errors import DataError

SCENES = (
    "badlands",
    "beach",
    "canyon",
    "city",
    "desert",
    "dune",
    "fields",
    "fog",
    "forest",
    "hills",
    "lava",
    "mountain",
    "sea",
    "sky",
    "snow",
    "space",
    "station",
    "valley",
    "water",
)
CLASSES = (*SCENES, "other")
RESOLUTIONS = (32, 64, 128)
FLAT_BELOW = 8
"""Standard deviation of a crop's grey values (ITU-R 601 luma, 0 to 255) below which it is left out."""
TEST_SHARE = 8
"""One photograph of so many is for testing."""
PIXELS_SHA256 = "302940119f0ab308fe103ccc22b077b98724659060145a31e9d89bc4687c34f2"
"""Of the decoded photographs, one after another. A run's id stands on pixels, since these are what a tokenizer sees,
and JPEG leaves a decoder some freedom: with this hash the files' own fix the pixels, and so the hashes below."""
CONTENT_HASHES = {
    32: "2859be335204f987569e0a9564783cee2387c59f3fa0985ba21e49c68ef9b0bb",
    64: "7a3e2211965e772cbf909f3256f6e8e5db97ae1a33d4bb7ffdbe45262d21e0ab",
    128: "90bc056ca93ddafac26e75c6ede48c7d6f0d7687249d53fd6511427ab4c19fed",
}
"""`Images.content_hash` of the training split by resolution, known without decoding."""


def load_landscapes(resolution: int, split: Split) -> Images:
    """One split as uint8 (N, 3, resolution, resolution), labelled by CLASSES.

    Raises:
        DataError: the photographs are nowhere to be had, not the right ones, or decoded to other pixels; or they do
            not come at this resolution.
    """
    if resolution not in RESOLUTIONS:
        raise DataError(f"landscapes comes at resolution=32, 64 or 128, not at resolution={resolution}")
    files, source = FILES.find()
    paths = tuple(files.values())
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    return _read_splits(paths, source, resolution, stamps)[split]


@lru_cache(maxsize=1)
def _read_splits(
    paths: tuple[Path, ...], source: str, resolution: int, stamps: tuple[tuple[int, int], ...]
) -> dict[Split, Images]:
    """Both splits, read once as long as the files stay the same, since decoding takes seconds."""
    crops: dict[Split, list[tuple[bytes, int, torch.Tensor]]] = {split: [] for split in get_args(Split)}
    for_testing, digest = photographs_for_testing(FILES.sha256), hashlib.sha256()
    for name, path in zip(FILES.sha256, paths, strict=True):
        photo_CHW, grey_1HW = _decoded(path, name)
        digest.update(photo_CHW.permute(1, 2, 0).contiguous().numpy().data)
        crops_NCHW = crop_grid(photo_CHW, resolution, stride=resolution)
        flat_N = is_flat(crop_grid(grey_1HW, resolution, stride=resolution))
        for place in (~flat_N).nonzero().flatten().tolist():
            rank = hashlib.sha256(f"{name} {place}".encode()).digest()
            crops["test" if name in for_testing else "train"].append((rank, class_of(name), crops_NCHW[place]))
    if digest.hexdigest() != PIXELS_SHA256:
        raise DataError(
            f"Pillow {PIL.__version__} with libjpeg {features.version('jpg')} decodes the photographs of landscapes to "
            f"pixels of sha256 {digest.hexdigest()} where {PIXELS_SHA256} is expected; pip install "
            f"--force-reinstall pillow"
        )
    splits: dict[Split, Images] = {}
    for split, found in crops.items():
        found.sort(key=lambda crop: crop[0])
        labels_N = torch.tensor([label for _, label, _ in found])
        splits[split] = Images("landscapes", split, torch.stack([crop for *_, crop in found]), labels_N, source)
    return splits


def _decoded(path: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph as RGB (3, H, W) and as grey (1, H, W), uint8."""
    content = FILES.read(path, name)
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as photo:
            rgb = photo.convert("RGB")
    except OSError as error:
        raise DataError(
            f"{path} cannot be decoded by Pillow {PIL.__version__} ({one_line(error)}); pip install "
            f"--force-reinstall pillow"
        ) from None
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1), torch.from_numpy(np.array(rgb.convert("L")))[None]


def is_flat(grey_N1HW: torch.Tensor) -> torch.Tensor:
    """True for each crop whose standard deviation is below FLAT_BELOW; bool (N,). In whole numbers, so that no machine
    rounds one across."""
    values_NP = grey_N1HW.flatten(1).long()
    pixels = values_NP.shape[1]
    return pixels * values_NP.square().sum(1) - values_NP.sum(1).square() < (FLAT_BELOW * pixels) ** 2


def class_of(name: str) -> int:
    """Index in CLASSES of a photograph."""
    scene = _parts(name)[0]
    return CLASSES.index(scene if scene in SCENES else "other")


def series_of(name: str) -> str:
    """The series of a photograph: what may show one place twice, and therefore stays in one split."""
    scene, number, photographer = _parts(name)
    if photographer or scene not in SCENES:
        return scene + photographer
    return scene + (number if len(number) == 1 or number[0] != "0" else "0x")


def _parts(name: str) -> tuple[str, str, str]:
    """Scene or source, number and photographer in a file's name: mountain, 10 and -sfiera in mountain10-sfiera.jpg."""
    match = re.fullmatch(r"([a-z]+)(\d*)(-[a-z]+|)\.jpg", name)
    assert match, name
    return match[1], match[2], match[3]


def photographs_for_testing(names: Iterable[str]) -> set[str]:
    """The photographs for testing: of each class the series that come first by hash and fit into its share."""
    classes: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        classes[class_of(name)][series_of(name)].append(name)
    chosen: set[str] = set()
    for series in classes.values():
        room = max(1, round(sum(map(len, series.values())) / TEST_SHARE))
        for key in sorted(series, key=lambda key: hashlib.sha256(key.encode()).digest()):
            if len(series[key]) <= room:
                chosen.update(series[key])
                room -= len(series[key])
    return chosen


FILES = PackagedFiles(
    name="landscapes",
    title="landscapes",
    sha256={
        name: digest
        for digest, name in map(str.split, Path(__file__).with_name("landscapes.sha256").read_text().splitlines())
    },
    package="endless-sky-data",
    folder=Path("/usr/share/games/endless-sky/images/land"),
    layouts=("images/land",),
    size="70 MB",
    wanted="Debian 12's endless-sky-data_0.9.8-1.2_all.deb, the folder unpacked from it or its folder images/land",
    fetchers={"apt's download of endless-sky-data": apt_download},
)
