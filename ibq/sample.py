"""`python -m ibq.sample MODEL OUT`: images from a generator, as PNG files, a grid, and the file that evaluators read.

What OUT holds then: `ibq.sample_folder`. A sample follows from the model, its number, the seed and the settings: neither from what else is
drawn with it nor from who draws it, but for rounding. So that not even rounding differs after a kill, samples are drawn in blocks of the
same numbers always, and a block of which one is missing is drawn whole.

Suffixes: B samples of a block, N tokens of an image, C channels, H W pixels or token grid.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ibq import __version__
from ibq.commands import enough_memory, positive, progress, run_command
from ibq.data.images import DataError, quoted
from ibq.distributed import Processes, copy_of_first, device_name, is_writer, process_group, shared_errors, sum_of_numbers
from ibq.errors import ConfigError
from ibq.evaluation import measuring
from ibq.generator import Generator, load_generator
from ibq.metrics.distances import to_uint8
from ibq.run_directory import source_commit
from ibq.sample_folder import SampleFolder
from ibq.sampling import Guidance, Sampler, Sampling
from ibq.training import AUTOCAST, peak_memory_gib

A_CLASS, AT_MOST = 8, 80
"""Samples where no number is given: of each class, and in all."""
SHARED = (ConfigError, DataError, OSError)
"""Errors that one process may meet alone, which then end all of them."""


def parse_classes(text: str | None, classes: int) -> tuple[int, ...]:
    """The classes that a list of numbers and ranges names, such as "0,3,5-7", in its order; None: all.

    Raises:
        ConfigError: there is no such class, one is named twice, or a part is no number and no range.
    """
    if text is None:
        return tuple(range(classes))
    named: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdigit() for end in ends):
            raise ConfigError(f"--classes {text}: {part.strip()!r} is neither a class nor a range; write for example 0,3,5-7")
        begin, end = map(int, ends)
        if end >= classes:
            known = f"the model has {classes:,}, 0 to {classes - 1}" if classes > 1 else "the model has one, 0"
            raise ConfigError(f"--classes {text}: there is no class {end}; {known}")
        if begin > end:
            raise ConfigError(f"--classes {text}: the range {part.strip()} ends before it begins; write {end}-{begin}")
        named.extend(range(begin, end + 1))
    if twice := next((label for label in named if named.count(label) > 1), None):
        raise ConfigError(f"--classes {text}: class {twice} is named twice; name each once, and choose --count for more samples")
    return tuple(named)


def as_text(classes: tuple[int, ...]) -> str:
    """The list that `parse_classes` reads, as short as it can be."""
    runs: list[list[int]] = []
    for label in classes:
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _require_place(out: Path, *models: str | None) -> None:
    """ConfigError: OUT is one of these folders, or lies in it."""
    for folder in (Path(model).expanduser() for model in models if model):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{quoted(out)} lies inside {quoted(folder)}, the model's own folder; choose an OUT outside")


def _sampling(given: argparse.Namespace) -> Sampling:
    """ConfigError: an option is out of range."""
    guidance = Guidance(given.guidance, given.guidance_schedule, given.guidance_power, given.guidance_start, given.guidance_end)
    return Sampling(given.temperature, given.top_k, given.top_p, given.min_p, guidance)


def _protocol(generator: Generator, shape: tuple[int, int, int]) -> dict[str, Any]:
    transformer, quantizer = generator.transformer.config, generator.tokenizer.config.quantizer
    height, width, channels = shape
    return {
        "transformer": f"depth {transformer.depth}, width {transformer.width}, {transformer.classes:,} classes",
        "tokens": f"{transformer.grid} × {transformer.grid} of {quantizer.method}, K = {quantizer.codebook_size:,}",
        "weights": "averaged (EMA)" if generator.averaged else "as trained, not averaged",
        "images": f"{width} × {height} pixels, {'RGB' if channels == 3 else 'grey'}, decoded in fp32, clamped, rounded to 8 bits once",
        "classes": "sample i has the (i mod n)-th of the n classes in settings.classes, counted from 0",
    }


def _blocks(folder: SampleFolder, batch_size: int) -> list[tuple[range, list[int]]]:
    """The numbers of every block that lacks a sample, and those that it lacks."""
    lacking: dict[int, list[int]] = {}
    for number in folder.missing():
        lacking.setdefault(number // batch_size, []).append(number)
    return [(range(b * batch_size, min((b + 1) * batch_size, folder.count)), numbers) for b, numbers in lacking.items()]


class _Maker:
    """Draws blocks of samples and writes them."""

    def __init__(self, generator: Generator, folder: SampleFolder, sampling: Sampling, device: torch.device, given: argparse.Namespace) -> None:
        transformer, self._tokenizer, _ = generator
        self._grid, self._folder, self._device = transformer.config.grid, folder, device
        self._memory = f"{given.batch_size} samples at a time on {device}; lower --batch-size"
        with enough_memory(self._memory):
            self._tokenizer.to(device)
            transformer.to(device, AUTOCAST[given.precision])
            self._draw = Sampler(transformer, sampling, seed=given.seed, batch_size=given.batch_size, compile=given.compile)

    def __call__(self, block: range, lacking: list[int]) -> None:
        """ConfigError: memory does not suffice, or the model gives numbers that are not finite."""
        numbers_B = torch.tensor(block)
        classes_B = torch.tensor([self._folder.class_of(number) for number in block])
        with enough_memory(self._memory):
            tokens_BN = self._draw(numbers_B.to(self._device), classes_B.to(self._device))
            with measuring(self._tokenizer):
                images_BCHW = self._tokenizer.decode(tokens_BN.unflatten(1, (self._grid, self._grid)))
        if not bool(images_BCHW.isfinite().all()):
            raise ConfigError("images came out as no finite numbers; the model's weights are damaged")
        pixels_BCHW = to_uint8(images_BCHW).cpu()
        for number in lacking:
            self._folder.write(number, pixels_BCHW[number - block.start])
