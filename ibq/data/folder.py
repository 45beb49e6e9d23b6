"""A folder of one's own images: which files make which split and which class, what cannot be used and why."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ibq.data.decoding import decoding, read_square
from ibq.data.images import Images, Split, either, first_few, one_line, quoted
from ibq.data.resizing import Pixels
from ibq.errors import DataError
from ibq.schema import Resize

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
OTHER_ENDINGS = re.compile(
    r"\.(heic|heif|avif|jxl|jp2|j2k|jpx|jxr|psd|xcf|tga|svg|ico|icns|dng|cr2|cr3|nef|arw|orf|rw2|raf|ppm|pgm|pbm|pnm|pfm"
    r"|exr|hdr|qoi|dds|mpo|apng|pcx|sgi|eps)$"
)
"""Of pictures that are not read, and therefore named and counted."""
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test", "testing")}
MAX_BYTES = 8 * 2**30
"""Memory that the images of one split may take: 8 GiB."""
DECODING_THREADS = min(8, os.cpu_count() or 1)
"""Pillow lets go of Python's lock while it decodes."""
_CHUNK = 1024


def load_folder(given: str, resolution: int, split: Split, resize: Resize = "antialiased") -> Images:
    """One split of a folder's images, decoded into memory; `ibq.data.load_images` tells how files become splits and
    classes.

    Args:
        given: the folder; a leading ~ is the home folder.
        resolution: R, pixels a side.
        split: "train" or "test".
        resize: how they are scaled.

    Returns:
        uint8 (N, 3, R, R) in the order of the sorted paths; the same bytes for the same files, wherever the folder
        lies.

    Raises:
        DataError: the folder is absent, unreadable, without usable images for this split, or its images would take more
            than MAX_BYTES.
    """
    listing = list_split(given, split, resolution, enlarge=False)
    images_NCHW, kept, unusable = _decode_all(listing.folder, listing.files, resolution, resize)
    skipped = listing.closed + unusable
    if not kept:
        raise DataError(f"no image of {listing.source} can be used for {split}: {first_few(skipped)}")
    if skipped:
        counts = f"{len(skipped):,} skipped and {len(kept):,} kept"
        print(f"imagefolder {split}: {counts} of {listing.source}: {first_few(skipped)}", file=sys.stderr)
    return Images("imagefolder", split, images_NCHW, listing.labels(kept), listing.source, tuple(skipped), resize)


# --- Files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The image files of one split of a folder, none of them opened yet.

    Args:
        folder: where they are.
        files: their paths relative to it, sorted part by part; at least one, unless there is a closed subfolder.
        closed: a sentence for every subfolder that cannot be read or is no class, and every picture of another format.
        source: the folder, and which part of its files this is, for people.
        classes: number of each class by the name of its subfolder; empty where the folder has none.
    """

    folder: Path
    files: list[str]
    closed: list[str]
    source: str
    classes: dict[str, int]

    def labels(self, files: list[str]) -> torch.Tensor | None:
        """Classes of some of the files, int64; None where there are none."""
        return torch.tensor([self.classes[name.split(os.sep)[0]] for name in files]) if self.classes else None


def list_split(given: str, split: Split, resolution: int, *, enlarge: bool) -> Listing:
    """The files of one split; arguments and errors as for `load_folder` and `read_square`, but for what only opening
    them can tell. Of each class pictures are opened until one can be used."""
    root = Path(os.path.expanduser(given)).absolute()
    folders = _split_folders(root)
    place = folders.get(split, root)
    files, closed = image_files(place)
    source = quoted(place)
    if not folders:
        if len(files) == 1:
            raise DataError(
                f"{source} holds a single image file, which cannot be both for training and for testing; add more "
                f"images"
            )
        files = files[::10] if split == "test" else [name for position, name in enumerate(files) if position % 10]
        source += f" ({'every tenth file' if split == 'test' else 'nine files in ten'})"
    if not _classes(place):
        return Listing(place, files, closed, source, {})
    others = [folder for folder in folders.values() if folder != place]
    faults = _class_faults(place, others, files, lambda path: read_square(path, resolution, enlarge=enlarge))
    closed = sorted(closed + [f"{quoted(name)} is no class: {why}" for name, why in faults.items() if why])
    classes = {name: number for number, name in enumerate(name for name, why in faults.items() if not why)}
    return Listing(place, [file for file in files if file.split(os.sep)[0] in classes], closed, source, classes)


def _class_faults(
    place: Path, others: list[Path], files: list[str], read: Callable[[Path], Pixels | str]
) -> dict[str, str]:
    """Reasons by the sorted names of the splits' subfolders why each is no class; empty where it is one."""
    files_of: dict[str, list[str]] = {}
    for file in files:
        files_of.setdefault(file.split(os.sep)[0], []).append(file)

    def fault(name: str) -> str:
        why = ""
        elsewhere = (other / name / file for other in others for file in _files_below(other / name))
        for path in itertools.chain((place / file for file in files_of.get(name, ())), elsewhere):
            if not isinstance(found := read(path), str):
                return ""
            why = why or f"{quoted(path.name)} {found}, nor can any other picture in it be used"
        return why or "there is no picture in it"

    names = sorted(set().union(*map(_classes, (place, *others))))
    with decoding(), ThreadPoolExecutor(DECODING_THREADS) as pool:
        return dict(zip(names, pool.map(fault, names), strict=True))


def _files_below(folder: Path) -> list[str]:
    try:
        return image_files(folder)[0]
    except DataError:  # absent, closed or empty
        return []


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder, hidden ones left out; a DataError if it is none or cannot be read."""
    try:
        return _scan(folder)
    except FileNotFoundError:
        raise DataError(f"the image folder {quoted(folder)} does not exist") from None
    except NotADirectoryError:
        raise DataError(f"{quoted(folder)} is not a folder; name the folder that holds the images") from None
    except OSError as error:
        raise DataError(f"the image folder {quoted(folder)} cannot be read ({one_line(error.strerror)})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the two splits, or none where `root` has neither; a DataError where it has but one."""
    by_name = {
        entry.name.casefold(): Path(entry.path)
        for entry in sorted(_entries(root), key=lambda e: e.name)
        if _is_folder(entry)
    }
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        if present := [by_name[name] for name in names if name in by_name]:
            found[split] = present[0]
    if len(found) == 1:
        (there,), absent = found.values(), SPLIT_FOLDERS["test" if "train" in found else "train"]
        raise DataError(
            f"{quoted(root)} holds {quoted(there.name)} but no folder {either(absent)} beside it; add one, or name the "
            f"folder "
            "that holds the images, of which every tenth is then for testing"
        )
    return found


def _classes(folder: Path) -> set[str]:
    """Names of the subfolders of a folder that holds no image itself; else none."""
    entries = _entries(folder)
    names = {entry.name for entry in entries if _is_folder(entry)}
    return (
        set() if any(entry.name not in names and entry.name.lower().endswith(ENDINGS) for entry in entries) else names
    )


def image_files(root: Path) -> tuple[list[str], list[str]]:
    """Paths of the image files below `root`, relative to it and sorted part by part, and a sentence for each subfolder
    that is closed and each picture of another format.

    Raises:
        DataError: the folder is absent or unreadable, or there is neither a file nor a sentence.
    """
    _entries(root)
    prefix = os.path.join(root, "")
    files, skipped = [], []
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status, entries = os.stat(folder), _scan(folder)
        except OSError as error:
            skipped.append(f"{quoted(folder.relative_to(root))} cannot be read ({one_line(error.strerror)})")
            continue
        this = (status.st_dev, status.st_ino)
        if this in above:  # a link to a folder that it lies in
            continue
        for entry in entries:
            if _is_folder(entry):
                waiting.append((Path(entry.path), above | {this}))
            elif entry.name.lower().endswith(ENDINGS):
                files.append(entry.path.removeprefix(prefix))
            elif OTHER_ENDINGS.search(entry.name.lower()):
                name = entry.path.removeprefix(prefix)
                skipped.append(f"{quoted(name)} is of a format that is not read; convert it to PNG")
    if not files and not skipped:
        raise DataError(
            f"{quoted(root)} holds no image: nothing in it or below it ends in {either(ENDINGS)} (hidden files are "
            f"left out)"
        )
    return sorted(files, key=lambda name: name.split(os.sep)), sorted(skipped)


# --- Pixels -----------------------------------------------------------------------------------------------------------


def _decode_all(
    place: Path, files: list[str], resolution: int, resize: Resize
) -> tuple[torch.Tensor, list[str], list[str]]:
    """The usable images as uint8 (N, 3, R, R), their N names, and a sentence for every other file."""
    shape, size = (len(files), 3, resolution, resolution), len(files) * 3 * resolution**2
    what = f"{len(files):,} images of {quoted(place)} at resolution={resolution} take {size / 2**30:,.2f} GiB"
    remedy = "choose a smaller resolution or a folder with a part of them"
    if size > MAX_BYTES:
        raise DataError(f"{what}, over the limit of {MAX_BYTES / 2**30:.2f} GiB that are held in memory; {remedy}")
    try:
        images_NCHW = np.empty(shape, np.uint8)
    except MemoryError:
        raise DataError(f"{what}, which this machine does not have; {remedy}") from None
    kept: list[str] = []
    unusable: list[str] = []
    with decoding(), ThreadPoolExecutor(DECODING_THREADS) as pool:  # in chunks, so that few images wait to be copied
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            for name, image_CHW in zip(
                chunk, pool.map(lambda name: read_square(place / name, resolution, resize=resize), chunk), strict=True
            ):
                if isinstance(image_CHW, str):
                    unusable.append(f"{quoted(name)} {image_CHW}")
                else:
                    images_NCHW[len(kept)] = image_CHW
                    kept.append(name)
    return torch.from_numpy(images_NCHW[: len(kept)]), kept, unusable
