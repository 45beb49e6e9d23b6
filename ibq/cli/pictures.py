"""A folder of pictures of any size, read one after another and never held whole: what a trained tokenizer is shown.

Which files count, and how any of them becomes upright RGB bytes, is `ibq.data.folder`'s word.

Suffixes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ibq.data.decoding import decoding, opaque_rgb, read_image, square_rgb, upright_rgb
from ibq.data.folder import image_files
from ibq.data.images import first_few, quoted
from ibq.data.resizing import RESIZING
from ibq.errors import ConfigError, DataError
from ibq.schema import Resize

Fit = Literal["whole", "crop"]
READ_AT_ONCE = 8
WAITING_BYTES = 2**28
"""Memory of decoded pictures that wait for others of their size: 256 MiB; beyond it the largest group goes ahead."""
AREA = 256 * 256
"""Pixels up to which a batch holds as many pictures as were asked for; of larger ones fewer, so that a batch takes the
same memory."""


@dataclass(frozen=True)
class Picture:
    """A picture as the tokenizer sees it.

    Args:
        name: path relative to the folder.
        position: its place in the sorted listing of the folder.
        pixels_CHW: uint8.
    """

    name: str
    position: int
    pixels_CHW: torch.Tensor


@dataclass(frozen=True)
class Framing:
    """Part of a picture that a tokenizer is shown, and its size.

    Args:
        factor: f, the down-sampling factor, which must divide height and width.
        channels: 3 (RGB) or 1 (grey: ITU-R 601 luma).
        fit: "whole" refuses a picture whose size f does not divide; "crop" takes its largest centre part that f
            divides.
        resize: R: the shorter side is scaled to R and the centre square taken, in place of `fit`; a picture is never
            enlarged.
        scaling: how it is; "released" also leaves a picture as it lies in the file.

    Raises:
        ConfigError: f does not divide R.
    """

    factor: int
    channels: int
    fit: Fit = "whole"
    resize: int | None = None
    scaling: Resize = "antialiased"

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize % self.factor:
            below = self.resize // self.factor * self.factor
            choices = " or ".join(str(size) for size in (below, below + self.factor) if size)
            raise ConfigError(
                f"--resize {self.resize} is not a multiple of the tokenizer's down-sampling factor {self.factor}; use "
                f"{choices}"
            )

    def __str__(self) -> str:
        size = {"whole": "at its own size", "crop": f"centre crop to multiples of {self.factor}"}[self.fit]
        if self.resize is not None:
            size = f"centre square, shorter side scaled to {self.resize}: {RESIZING[self.scaling]}"
        else:
            size += {"antialiased": ", upright as EXIF says", "released": ", not turned by EXIF"}[self.scaling]
        return f"{size}; {'RGB' if self.channels == 3 else 'grey'}, transparency on white"

    def apply(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]] | str:
        """The pixels shown as uint8 (C, H, W), or the words that say, after the picture's name, why there are none."""
        if self.resize is not None:
            if min(image.size) < self.resize:
                return (
                    f"is {image.width}×{image.height} pixels, smaller than --resize {self.resize}, and pictures "
                    f"are "
                    f"not enlarged"
                )
            shown = square_rgb(image, self.resize, resize=self.scaling)
        else:
            shown = opaque_rgb(image) if self.scaling == "released" else upright_rgb(image)
            width, height = (side // self.factor * self.factor for side in shown.size)
            if min(width, height) == 0:
                return (
                    f"is {shown.width}×{shown.height} pixels, smaller than the tokenizer's down-sampling factor "
                    f"{self.factor}"
                )
            if self.fit == "whole" and (width, height) != shown.size:
                return (
                    f"is {shown.width}×{shown.height} pixels, not multiples of the tokenizer's down-sampling factor "
                    f"{self.factor}; "
                    "use --fit crop or --resize"
                )
            left, top = (shown.width - width) // 2, (shown.height - height) // 2
            shown = shown.crop((left, top, left + width, top + height))
        pixels = np.asarray(shown.convert("RGB" if self.channels == 3 else "L"))
        return pixels.reshape(*pixels.shape[:2], self.channels).transpose(2, 0, 1).copy()


class PictureFolder:
    """The pictures of a folder and all below it, hidden files left out, links followed.

    Args:
        given: the folder; a leading ~ is the home folder.
        framing: how each is shown.
        limit: only the first so many files of the sorted listing.

    Attributes:
        names: paths relative to the folder, sorted part by part.
        skipped: a sentence for each closed subfolder and, once it has been read, each picture that cannot be used.

    Raises:
        DataError: the folder is absent, unreadable or holds no picture.
    """

    def __init__(self, given: str | Path, framing: Framing, limit: int | None = None) -> None:
        self.path = Path(os.path.expanduser(given)).absolute()
        self.framing = framing
        files, self.skipped = image_files(self.path)
        self.names = files[:limit]
        self._positions = {name: position for position, name in enumerate(self.names)}

    def batches(self, names: Iterable[str], batch_size: int) -> Iterator[list[Picture]]:
        """Pictures of one size at a time; in the order of the files within a size.

        Args:
            names: of `self.names`, drawn as reading gets on.
            batch_size: at most so many of up to AREA pixels each, and fewer of larger ones.
        """
        waiting: dict[torch.Size, list[Picture]] = {}
        for picture in self._read(names):
            size = picture.pixels_CHW.shape
            waiting.setdefault(size, []).append(picture)
            if len(waiting[size]) >= _at_once(size, batch_size):
                yield waiting.pop(size)
            elif sum(map(_bytes, waiting.values())) > WAITING_BYTES:
                yield waiting.pop(max(waiting, key=lambda size: _bytes(waiting[size])))
        yield from waiting.values()

    def _read(self, names: Iterable[str]) -> Iterator[Picture]:
        """A few at a time in threads, as Pillow lets go of Python's lock; what cannot be used is noted in `skipped`."""
        names = iter(names)
        with ThreadPoolExecutor(min(READ_AT_ONCE, os.cpu_count() or 1)) as pool:
            while chunk := list(itertools.islice(names, READ_AT_ONCE)):
                with decoding():
                    read = list(pool.map(lambda name: read_image(self.path / name, self.framing.apply), chunk))
                for name, pixels in zip(chunk, read, strict=True):
                    if isinstance(pixels, str):
                        self.skipped.append(f"{quoted(name)} {pixels}")
                    else:
                        yield Picture(name, self._positions[name], torch.from_numpy(pixels))

    def require_used(self, count: int) -> None:
        """DataError with the first reasons, where none of the pictures could be used."""
        if count == 0:
            raise DataError(f"no picture of {quoted(self.path)} can be used: {first_few(self.skipped)}")


def png(pixels_CHW: torch.Tensor) -> bytes:
    """The file of a picture, uint8 with one channel (grey) or three."""
    pixels = pixels_CHW.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _at_once(size: torch.Size, batch_size: int) -> int:
    return max(1, min(batch_size, batch_size * AREA // (size[-2] * size[-1])))


def _bytes(pictures: list[Picture]) -> int:
    return sum(picture.pixels_CHW.numel() for picture in pictures)
