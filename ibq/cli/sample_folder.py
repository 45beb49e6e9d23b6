"""The folder of a transformer's samples: which are there, what they were made with, and what is put together from them.

OUT/samples/000012-class207.png   a sample: its number and its class
OUT/grid.png                      some of them, a row a class, the class before its row
OUT/samples.json                  what all samples have in common, and where they were made; written before the first
OUT/samples.npz                   if asked for: `arr_0` uint8 (N, H, W, 3), grey three times over, and `arr_1` int64
                                  (N,), the classes; by
                                  names and order what the evaluator of "Diffusion Models Beat GANs" (ADM) reads and its
                                  sampler writes

Suffixes: N samples, C channels, H W pixels.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont

from ibq.cli.pictures import png
from ibq.data.images import one_line, quoted
from ibq.errors import ConfigError
from ibq.run_directory import replacing, write_bytes, write_json
from ibq.schema import flatten

GRID_ROWS, GRID_COLUMNS = 20, 10
GAP, LEGEND = 2, 36
"""Pixels between the grid's images and around them, and of the column on its left where the classes stand."""
SMALL = 64
"""Pixels that a side of the grid's images has at least, or more than half of it: smaller ones are shown two, three, ...
times as large."""
WHITE, INK = 255, 96

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class SampleFolder:
    """OUT. Sample number i has class i mod n of the n classes.

    Args:
        path: made by `claim` if absent.
        classes: each at most once.
        count: N, of all classes together.
        shape: H, W and C of every sample.
    """

    def __init__(self, path: Path, classes: tuple[int, ...], count: int, shape: tuple[int, int, int]) -> None:
        self.path, self.classes, self.count, self.shape = path, classes, count, shape
        self.samples, self.record = path / "samples", path / "samples.json"
        self.grid, self.npz = path / "grid.png", path / "samples.npz"
        self.rows = min(len(classes), count, GRID_ROWS)
        self.columns = min(math.ceil(count / len(classes)), GRID_COLUMNS)

    def class_of(self, number: int) -> int:
        return self.classes[number % len(self.classes)]

    def file(self, number: int) -> Path:
        return self.samples / f"{number:06d}-class{self.class_of(number)}.png"

    @contextmanager
    def claim(self, settings: dict[str, Any], protocol: dict[str, Any], made_on: dict[str, Any]) -> Iterator[None]:
        """Make the folder this command's own for the length of the block.

        Args:
            settings: what decides the samples, as JSON has it; those of a folder that has samples already must be the
                same.
            protocol: what else is said of all samples.
            made_on: where and how these are computed, which changes them by rounding at most; noted beside what others
                noted.

        Raises:
            ConfigError: OUT is a file, holds other things, samples of other settings or more than `count`; or another
                command is at it.
        """
        out = quoted(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{out} is a file; choose a folder for OUT")
        if (
            self.path.is_dir()
            and not self.record.is_file()
            and any(not name.startswith(".") for name in os.listdir(self.path))
        ):
            raise ConfigError(f"{out} holds other files than samples; choose an empty or a new folder for OUT")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                noted = self._noted(settings)
                if made_on not in noted:
                    noted.append(made_on)
                grid = {"rows": self.classes[: self.rows], "columns": self.columns}
                record = {
                    "samples": self.count,
                    "settings": settings,
                    "protocol": protocol,
                    "grid": grid,
                    "made_on": noted,
                }
                write_json(self.record, record)
                self.samples.mkdir(
                    exist_ok=True
                )  # after the record, without which other files than these are taken to be someone else's
                for torn in self._torn():
                    torn.unlink()
                yield
        except Timeout:
            raise ConfigError(
                f"another command is writing samples into {out}; wait for it, or choose another OUT"
            ) from None

    def _noted(self, settings: dict[str, Any]) -> list[Any]:
        """Machines that made the samples that are there, if any; a grid and an npz of fewer samples are removed."""
        if not self.record.is_file():
            return []
        try:
            record = json.loads(self.record.read_text())
            theirs, samples, noted = flatten(record["settings"]), int(record["samples"]), list(record["made_on"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{quoted(self.record)} cannot be read ({one_line(error)}); choose another OUT") from None
        if next(self.samples.glob("*.png"), None) is None:
            return []
        mine = flatten(json.loads(json.dumps(settings)))
        for field in [*mine, *theirs]:
            if mine.get(field) != theirs.get(field):
                raise ConfigError(
                    f"{quoted(self.path)} holds samples with {field}={theirs.get(field)!r}, not {mine.get(field)!r}; "
                    f"choose another OUT"
                )
        if samples > self.count:
            raise ConfigError(
                f"{quoted(self.path)} holds {samples:,} samples, more than --count {self.count}; choose another OUT"
            )
        if samples < self.count:
            self.grid.unlink(missing_ok=True)
            self.npz.unlink(missing_ok=True)
        return noted

    def _torn(self) -> list[Path]:
        """Torn files of a kill during a write."""
        singles = (torn for path in (self.record, self.grid, self.npz) for torn in self.path.glob(f".{path.name}.*"))
        return [*singles, *self.samples.glob(".*.png.*")]

    def missing(self) -> list[int]:
        """Numbers of the samples that are not there, ascending."""
        there = set(os.listdir(self.samples))
        return [number for number in range(self.count) if self.file(number).name not in there]

    def write(self, number: int, pixels_CHW: torch.Tensor) -> None:
        write_bytes(self.file(number), png(pixels_CHW))

    def read(self, number: int) -> Pixels:
        """A sample's pixels (H, W, C). ConfigError: its file is absent or damaged."""
        path = self.file(number)
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image)
        except FileNotFoundError:
            raise ConfigError(
                f"{quoted(path)} has gone; run the command again, all its processes with the same folder OUT"
            ) from None
        except (OSError, ValueError, SyntaxError) as error:  # the last one is how Pillow reports a broken PNG
            raise ConfigError(
                f"{quoted(path)} is damaged ({one_line(error)}); delete it and run the command again"
            ) from None
        if pixels.size != math.prod(self.shape) or pixels.shape[:2] != self.shape[:2]:
            raise ConfigError(f"{quoted(path)} is none of these samples; delete it and run the command again")
        return pixels.reshape(self.shape)

    def write_grid(self) -> None:
        """The first GRID_COLUMNS samples of each of the first GRID_ROWS classes, on white; every pixel stays a square
        of one colour."""
        times, channels = max(1, SMALL // min(self.shape[:2])), self.shape[2]
        height, width = (times * side for side in self.shape[:2])
        size = (LEGEND + self.columns * (width + GAP) + GAP, self.rows * (height + GAP) + GAP)
        ink, white = ((INK,) * channels, (WHITE,) * channels) if channels > 1 else (INK, WHITE)
        canvas = Image.new("RGB" if channels > 1 else "L", size, white)
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
        for row in range(self.rows):
            top = GAP + row * (height + GAP)
            draw.text((LEGEND - GAP, top + height / 2), str(self.classes[row]), fill=ink, font=font, anchor="rm")
            for column, number in enumerate(range(row, self.count, len(self.classes))[: self.columns]):
                pixels = self.read(number).repeat(times, 0).repeat(times, 1)
                canvas.paste(
                    Image.fromarray(pixels[..., 0] if channels == 1 else pixels),
                    (LEGEND + GAP + column * (width + GAP), top),
                )
        with replacing(self.grid) as temporary:
            canvas.save(temporary, "PNG")

    def write_npz(self, beat: Callable[[], object]) -> None:
        """The file that `np.savez(path, images_NHWC, classes_N)` would write, image by image; `beat` is called after
        each."""
        height, width, _ = self.shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, height, width, 3)}
        with replacing(self.npz) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as images:
                np.lib.format.write_array_header_1_0(images, header)
                for number in range(self.count):
                    images.write(np.broadcast_to(self.read(number), (height, width, 3)).tobytes())
                    beat()
            with archive.open("arr_1.npy", "w", force_zip64=True) as classes:
                labels_N = np.resize(np.array(self.classes, dtype=np.int64), self.count)
                np.lib.format.write_array(classes, labels_N, allow_pickle=False)
