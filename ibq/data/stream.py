"""A folder of images that is read while it is used: centre squares on demand, and random squares for training from
processes of their own.

A square is what is left of an image whose shorter side is scaled to R when a part as wide as that side is cut out
(docs/method.md section 5). Here the part is cut out first and then scaled, by the same factor both ways (what scales
first must round the longer side to a whole number of pixels, and stretches the image by that little). Unlike those of a
folder that is held in memory, images whose shorter side is below R are
scaled up: in a folder of this size there are many.

Suffixes: B images, C channels, H W pixels; R pixels a side.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ibq.data.decoding import decoding, read_square
from ibq.data.folder import DECODING_THREADS, Listing, list_split
from ibq.data.images import Split, first_few, one_line, quoted, to_float
from ibq.data.resizing import Pixels
from ibq.distributed import exit_with_parent
from ibq.errors import DataError
from ibq.schema import Resize

UNUSABLE_SHARE, UNUSABLE_FILES = 0.01, 10
"""More than this share of the files, and more than this number of them, is not bad luck any more but a damaged or a
wrong folder."""
TRIES = 16
"""So many files one after another that cannot be used are taken to be all of them."""
FETCHED_AHEAD = 2


class Draw(NamedTuple):
    """One image that a step trains on: its file, relative to the folder, and (seed, epoch, position in the split), from
    which everything random about it follows; nothing depends on the process that reads it, on the batch it is in, or on
    what came before."""

    file: str
    key: tuple[int, int, int]

    def chance(self, *attempt: int) -> np.random.Generator:
        return np.random.default_rng((*self.key, *attempt))


Read = Callable[[str, np.random.Generator], Pixels | str]
"""From a file and where its chance comes from to the square, or the words that say why there is none."""


@dataclass(eq=False)
class Unusable:
    """Files that could not be decoded: counted, named once, and replaced; that some are broken is known only when they
    are read."""

    listing: Listing
    split: Split
    sentences: dict[str, str] = field(default_factory=dict)
    images_read: int = 0

    def replacement(self, draw: Draw, reason: str, read: Read) -> Pixels:
        """Another image of the split, and of its class where there are classes, drawn from what belongs to this one
        alone, so that the same always stands in.

        Raises:
            DataError: too many files cannot be used, or none.
        """
        self._note(draw.file, reason)
        name = self._class_of(draw.file)
        tried, files = [self.sentences[draw.file]], self._files[name]
        for attempt in range(1, TRIES):
            chance = draw.chance(attempt)
            file = files[chance.integers(len(files))]
            square = read(file, chance)
            if not isinstance(square, str):
                return square
            self._note(file, square)
            tried.append(self.sentences[file])
        source = quoted(self.listing.folder / name) if name else self.listing.source
        raise DataError(f"no image of {source} can be used for {self.split}, it seems: {first_few(tried)}")

    def _class_of(self, file: str) -> str:
        return file.split(os.sep)[0] if self.listing.classes else ""

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """The files of each class, by its folder; where there are no classes all files, by ""."""
        files: dict[str, list[str]] = {}
        for file in self.listing.files:
            files.setdefault(self._class_of(file), []).append(file)
        return files

    def _note(self, file: str, reason: str) -> None:
        if file in self.sentences:
            return
        self.sentences[file] = f"{quoted(file)} {reason}"
        if len(self.sentences) == 1:
            what = f"another image of {self.listing.source} stands in for it, as for every other that cannot be used"
            print(f"imagefolder {self.split}: {self.sentences[file]}; {what}", file=sys.stderr)
        known = min(self.images_read, len(self.listing.files))
        if len(self.sentences) > max(UNUSABLE_FILES, UNUSABLE_SHARE * known):
            raise DataError(
                f"{len(self.sentences):,} of the {known:,} images read so far of {self.listing.source} cannot be used, "
                f"over the limit of "
                f"{UNUSABLE_SHARE:.0%}: {first_few(list(self.sentences.values()))}; mend or remove them"
            )


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """One split of a folder, as `ibq.data.images.ImageSource` asks for it: centre squares, decoded when they are wanted
    by a few threads.

    An image that cannot be decoded is replaced by another of its class; `skipped` tells of those met so far.

    Args:
        listing: the files.
        split: "train" or "test".
        resolution: R, pixels a side.
        resize: how they are scaled.
    """

    listing: Listing
    split: Split
    resolution: int
    resize: Resize = "antialiased"
    name: str = "imagefolder"

    @cached_property
    def unusable(self) -> Unusable:
        return Unusable(self.listing, self.split)

    @property
    def source(self) -> str:
        return self.listing.source

    @property
    def skipped(self) -> tuple[str, ...]:
        return (*self.listing.closed, *self.unusable.sentences.values())

    @cached_property
    def labels_N(self) -> torch.Tensor | None:  # noqa: N802 (a shape suffix)
        return self.listing.labels(self.listing.files)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over how images are scaled and the sorted relative paths and sizes in bytes of the split's
        files, not over what is in them: to read the 150 GB of ImageNet takes an hour, and every start of a run needs
        this. Files changed at equal size go unnoticed."""
        digest = hashlib.sha256(self.resize.encode())
        for file in self.listing.files:
            digest.update(b"%s\0%d\0" % (os.fsencode(file), _size(self.listing.folder / file)))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.listing.files)

    def pixels(self, indices_B: torch.Tensor) -> torch.Tensor:
        """Centre squares of chosen images as bytes, uint8 (B, 3, R, R).

        Raises:
            DataError: too many files cannot be used, or none.
        """
        self.unusable.images_read += len(indices_B)
        draws = self.draws(indices_B, seed=0, epoch=0)
        with decoding(), ThreadPoolExecutor(DECODING_THREADS) as pool:
            squares = list(pool.map(lambda draw: self._centre_square(draw.file), draws))
            for position, square in enumerate(squares):
                if isinstance(square, str):
                    squares[position] = self.unusable.replacement(
                        draws[position], square, lambda file, _: self._centre_square(file)
                    )
        return torch.from_numpy(np.stack([square for square in squares if not isinstance(square, str)]))

    def batch(self, indices_B: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """Centre squares of chosen images as float32 (B, 3, R, R) on the device; 0 becomes exactly -1 and 255 exactly
        1."""
        return to_float(self.pixels(indices_B), device)

    def draws(self, indices_B: torch.Tensor, seed: int, epoch: int) -> list[Draw]:
        return [Draw(self.listing.files[index], (seed, epoch, index)) for index in indices_B.tolist()]

    def _centre_square(self, file: str) -> Pixels | str:
        return read_square(self.listing.folder / file, self.resolution, enlarge=True, resize=self.resize)


def stream_split(given: str, resolution: int, split: Split, resize: Resize = "antialiased") -> StreamedImages:
    """One split of a folder, none of its images opened yet; arguments as for `ibq.data.folder.load_folder`.

    Raises:
        DataError: the folder is absent, unreadable, or without image files for this split.
    """
    listing = list_split(given, split, resolution, enlarge=True)
    if not listing.files:
        raise DataError(f"no image of {listing.source} can be used for {split}: {first_few(listing.closed)}")
    if listing.closed:
        print(
            f"imagefolder {split}: {len(listing.closed):,} skipped of {listing.source}: {first_few(listing.closed)}",
            file=sys.stderr,
        )
    return StreamedImages(listing, split, resolution, resize)


def _size(path: Path) -> int:
    """In bytes; -1 where there is no telling, as of a dangling link."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


# --- Random squares, decoded by other processes -----------------------------------------------------------------------


@dataclass(frozen=True)
class RandomSquares(Dataset[tuple[torch.Tensor, list[tuple[int, str]]]]):
    """Data set of a process that decodes; it holds no list of files, as each step brings its own.

    Args:
        folder: where the files are.
        resolution: R, pixels a side.
        flip: mirror every other image, drawn at random.
        resize: how they are scaled.
    """

    folder: Path
    resolution: int
    flip: bool
    resize: Resize = "antialiased"

    def __getitem__(self, draws: list[Draw]) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """The squares, uint8 (B, 3, R, R), and, for those that are missing, their positions among them and why."""
        squares_BCHW = np.zeros((len(draws), 3, self.resolution, self.resolution), np.uint8)
        missing = []
        with decoding():
            for position, draw in enumerate(draws):
                square = self.read(draw.file, draw.chance())
                if isinstance(square, str):
                    missing.append((position, square))
                else:
                    squares_BCHW[position] = square
        return torch.from_numpy(squares_BCHW), missing

    def read(self, file: str, chance: np.random.Generator) -> Pixels | str:
        mirrored = chance.random() < 0.5  # drawn in any case: `flip` does not change where the square is

        def place(width: int, height: int) -> tuple[float, float]:
            """At a whole pixel of the image that is scaled until its shorter side is R."""
            side = min(width, height)
            steps = [
                int(chance.integers(length * self.resolution // side - self.resolution + 1))
                for length in (width, height)
            ]
            left, top = (
                min(step * side / self.resolution, length - side)
                for step, length in zip(steps, (width, height), strict=True)
            )
            return left, top

        square = read_square(self.folder / file, self.resolution, place, enlarge=True, resize=self.resize)
        return square if isinstance(square, str) or not (mirrored and self.flip) else square[:, :, ::-1]


def random_squares(
    images: StreamedImages, steps: Iterable[list[Draw]], *, flip: bool, workers: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Random squares of what each step draws, uint8 (B, 3, R, R) on the CPU, in page-locked memory where the device is
    a GPU.

    The processes begin to decode at once, a few steps ahead, and end when the iterator is closed or forgotten, or this
    process ends in any way. They are spawned (a fork of a process that computes is not safe), so a script that trains
    guards its top level by `if __name__ == "__main__"`. torch's and numpy's random numbers in this process are not
    touched.

    Args:
        images: a split.
        steps: what each step draws; may be endless.
        flip: mirror every other image, drawn at random.
        workers: processes that decode; 0: this one does.
        device: where the batches are going.

    Raises:
        DataError: (from the iterator) too many files cannot be used, or a process that decodes was lost.
    """
    if workers and multiprocessing.current_process().daemon:
        print(
            "imagefolder: a daemonic process may start no others, so it decodes the images itself, one after another",
            file=sys.stderr,
        )
        workers = 0
    squares = RandomSquares(images.listing.folder, images.resolution, flip, images.resize)
    drawn: list[list[Draw]] = []  # what is under way, the oldest first

    def remembered() -> Iterator[list[Draw]]:
        for draws in steps:
            drawn.append(draws)
            yield draws

    pinned = device.type == "cuda"
    with warnings.catch_warnings(), _no_interruption():
        warnings.simplefilter("ignore")  # torch's, that there be more processes than cores: those may wait for a disk
        loader = DataLoader(
            squares,
            batch_size=None,  # what the sampler yields is a batch already
            sampler=remembered(),
            num_workers=workers,
            prefetch_factor=FETCHED_AHEAD if workers else None,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_begin_to_decode if workers else None,
            # else a seed for the workers is drawn from the numbers that training draws from
            generator=torch.Generator(),
            pin_memory=pinned,
        )
        with torch.cuda.device(device) if pinned else nullcontext():  # where the thread that locks pages belongs
            loaded = iter(loader)
    return _whole(loaded, drawn, squares, images.unusable)


def _whole(
    loaded: Iterator[tuple[torch.Tensor, list[tuple[int, str]]]],
    drawn: list[list[Draw]],
    squares: RandomSquares,
    unusable: Unusable,
) -> Iterator[torch.Tensor]:
    """Batches with something in the place of what is missing; other processes' failures as one sentence."""
    failure = ""
    while not failure:
        try:
            squares_BCHW, missing = next(loaded)
        except StopIteration:
            return
        except Exception as error:  # the boundary to other processes
            failure = _what_was_lost(error)
            traceback.clear_frames(error.__traceback__)  # they hold the loader, and so its processes
            break
        draws = drawn.pop(0)
        unusable.images_read += len(draws)
        with decoding():
            for position, reason in missing:
                squares_BCHW[position] = torch.from_numpy(
                    unusable.replacement(draws[position], reason, squares.read).copy()
                )
        yield squares_BCHW
    del loaded
    raise DataError(failure)


def _what_was_lost(error: Exception) -> str:
    last_line = one_line(str(error).strip().rpartition("\n")[2])
    if isinstance(error, (ConnectionError, EOFError)) or (
        isinstance(error, RuntimeError) and "exited unexpectedly" in str(error)
    ):
        return (
            f"a process that decodes images was lost, killed by hand or for lack of memory or of space in /dev/shm "
            f"({last_line}); "
            "run again, with fewer workers if need be"
        )
    return f"decoding images failed: {last_line or type(error).__name__}"


@contextmanager
def _no_interruption() -> Iterator[None]:
    """torch would have the death of a worker raise an error in whatever line the main thread has come to; `next` finds
    out by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _begin_to_decode(_: int) -> None:
    """In a new process. Ctrl-C and a scheduler's SIGTERM go to a whole group: the trainer decides what they mean, and
    ends this process."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    atexit.register(
        os._exit, 0
    )  # an interpreter that a spawned process takes down in good order aborts now and then in torch's threads
