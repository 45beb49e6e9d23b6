"""`ibq sample MODEL OUT`: images from a transformer, as PNG files, a grid, and the file that evaluators
read.

What OUT holds then: `ibq.cli.sample_folder`. A sample follows from the model, its number, the seed and the settings:
neither from what else is drawn with it nor from who draws it, but for rounding. So that not even rounding differs after
a kill, samples are drawn in blocks of the same numbers always, and a block of which one is missing is drawn whole. A
--count below --batch-size makes the blocks smaller: what a greater count then adds is drawn in others.

Suffixes: B samples of a block, N tokens of an image, C channels, H W pixels or token grid.
"""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ibq import __version__
from ibq.cli.common import enough_memory, progress
from ibq.cli.sample_folder import SampleFolder
from ibq.data.images import quoted
from ibq.distributed import Processes, copy_of_first, device_name, is_writer, process_group, shared_errors
from ibq.errors import ConfigError, DataError, NonFiniteError
from ibq.evaluation.tokenizer import measuring
from ibq.evaluation.transformer import samples_are_cut
from ibq.metrics.distances import to_uint8
from ibq.pretrained.released import TrainedTransformer, Weights
from ibq.pretrained.transformer import load_transformer
from ibq.run_directory import source_commit
from ibq.sampling import Guidance, Sampler, Sampling, Schedule
from ibq.training.optimizer import AUTOCAST
from ibq.training.row import peak_memory_gib

A_CLASS, AT_MOST = 8, 80
"""Samples where no number is given: of each class, and in all."""
SHARED = (ConfigError, DataError, OSError)
"""Errors that one process may meet alone, which then end all of them."""


WRITERS = 8
"""Threads that write the files of a block."""


@dataclass(frozen=True)
class Options:
    """Arguments and options of the command, as `ibq.cli` describes them."""

    model: str
    out: Path
    classes: str | None
    count: int | None
    seed: int
    npz: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    guidance: float
    guidance_schedule: Schedule
    guidance_power: float
    guidance_start: float
    guidance_end: float
    tokenizer: str | None
    weights: Weights
    batch_size: int
    precision: Literal["fp32", "bf16"]
    depth: Literal["rounded", "cut"] | None
    compile: bool
    device: str


Block = tuple[range, list[int]]
"""The numbers of samples that are drawn together, and those of them that are lacking."""


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
            raise ConfigError(
                f"--classes {text}: {part.strip()!r} is neither a class nor a range; write for example 0,3,5-7"
            )
        begin, end = map(int, ends)
        if end >= classes:
            known = f"the model has {classes:,}, 0 to {classes - 1}" if classes > 1 else "the model has one, 0"
            raise ConfigError(f"--classes {text}: there is no class {end}; {known}")
        if begin > end:
            raise ConfigError(f"--classes {text}: the range {part.strip()} ends before it begins; write {end}-{begin}")
        named.extend(range(begin, end + 1))
    if twice := [label for label, times in Counter(named).items() if times > 1]:
        raise ConfigError(
            f"--classes {text}: class {twice[0]} is named twice; name each once, and choose --count for more samples"
        )
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


def _sampling(given: Options) -> Sampling:
    """ConfigError: an option is out of range."""
    guidance = Guidance(
        given.guidance, given.guidance_schedule, given.guidance_power, given.guidance_start, given.guidance_end
    )
    return Sampling(given.temperature, given.top_k, given.top_p, given.min_p, guidance)


def _depth(given: Options, trained: TrainedTransformer) -> str:
    """Bytes of samples: as asked for, else as an evaluation has them."""
    return given.depth or ("cut" if samples_are_cut(trained.tokenizer) else "rounded")


def _blocks(folder: SampleFolder, batch_size: int) -> list[Block]:
    """Those that lack a sample."""
    lacking: dict[int, list[int]] = {}
    for number in folder.missing():
        lacking.setdefault(number // batch_size, []).append(number)
    return [(range(b * batch_size, min((b + 1) * batch_size, folder.count)), numbers) for b, numbers in lacking.items()]


class _Maker:
    """Draws blocks of samples and writes them.

    Raises:
        ConfigError: memory does not suffice.
    """

    def __init__(self, given: Options, trained: TrainedTransformer, folder: SampleFolder, device: torch.device) -> None:
        transformer, self._tokenizer, _ = trained
        self._grid, self._folder, self._cut = transformer.config.grid, folder, _depth(given, trained) == "cut"
        self._memory = f"{given.batch_size} samples at a time on {device}; lower --batch-size"
        with enough_memory(self._memory):
            self._tokenizer.to(device)
            transformer.to(device, AUTOCAST[given.precision])
            sampling = _sampling(given)
            self._draw = Sampler(
                transformer, sampling, seed=given.seed, batch_size=given.batch_size, compile=given.compile
            )

    def __call__(self, block: range, lacking: list[int]) -> None:
        """Draw a block and write those samples of it that are lacking.

        Raises:
            ConfigError: memory does not suffice, or the model gives numbers that are not finite.
        """
        classes_B = torch.tensor([self._folder.class_of(number) for number in block])
        try:
            with enough_memory(self._memory):
                tokens_BN = self._draw(torch.tensor(block), classes_B)
                with measuring(self._tokenizer):
                    images_BCHW = self._tokenizer.decode(tokens_BN.unflatten(1, (self._grid, self._grid)))
        except NonFiniteError as error:
            raise ConfigError(f"{error}; the model's weights are damaged") from None
        if not bool(images_BCHW.isfinite().all()):
            raise ConfigError(
                f"an image of samples {block[0]} to {block[-1]} is not finite; the tokenizer's weights are damaged"
            )
        pixels_BCHW = to_uint8(images_BCHW, cut=self._cut).cpu()
        with ThreadPoolExecutor(WRITERS) as pool:  # Pillow lets go of Python's lock; a disk takes its time
            for written in [
                pool.submit(self._folder.write, number, pixels_BCHW[number - block[0]]) for number in lacking
            ]:
                written.result()


def _folder(given: Options, trained: TrainedTransformer) -> SampleFolder:
    """OUT as it is to be. ConfigError: an argument does not fit the model, or OUT lies in the model's folder."""
    transformer, tokenizer = trained.transformer.config, trained.tokenizer.config
    if _sampling(given).guided and not transformer.class_dropout:
        raise ConfigError(
            f"--guidance {given.guidance:g} needs an unconditional class, and the transformer (class_dropout=0) was "
            f"trained without; "
            "leave it at 1"
        )
    out = Path(given.out).expanduser().absolute()
    for model in (Path(path).expanduser() for path in (given.model, given.tokenizer) if path):
        if model.is_dir() and out.resolve().is_relative_to(model.resolve()):
            raise ConfigError(
                f"{quoted(out)} lies inside {quoted(model)}, the model's own folder; choose an OUT outside"
            )
    classes = parse_classes(given.classes, transformer.classes)
    side = transformer.grid * tokenizer.model.downsampling
    return SampleFolder(
        out, classes, given.count or min(A_CLASS * len(classes), AT_MOST), (side, side, tokenizer.data.channels)
    )


def _facts(
    given: Options, trained: TrainedTransformer, folder: SampleFolder, processes: Processes
) -> tuple[dict[str, Any], ...]:
    """Settings, protocol and machine, as `SampleFolder.claim` takes them."""
    transformer, quantizer = trained.transformer.config, trained.tokenizer.config.quantizer
    height, width, channels = folder.shape
    settings = {
        "model": trained.digest(),
        "seed": given.seed,
        "classes": as_text(folder.classes),
        "sampling": asdict(_sampling(given)),
        "precision": given.precision,
        "bytes": _depth(given, trained),
    }
    protocol = {
        "transformer": f"depth {transformer.depth}, width {transformer.width}, {transformer.classes:,} classes",
        "tokens": f"{transformer.grid} x {transformer.grid} of {quantizer.method}, K = {quantizer.codebook_size:,}",
        "weights": "averaged (EMA)" if trained.averaged else "as they are, not averaged",
        "images": f"{width} x {height} pixels, {'RGB' if channels == 3 else 'grey'}, decoded in fp32, clamped, "
        f"{_depth(given, trained)} to 8 bits once",
        "classes": "sample i has the (i mod n)-th of the n classes in settings.classes, counted from 0",
        "random_numbers": "each sample has a stream of its own, from settings.seed and its number",
    }
    made_on = {
        "device": device_name(processes.device),
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "batch_size": given.batch_size,
        "compile": given.compile,
        "ibq": __version__,
        "commit": source_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return settings, protocol, made_on


def sample(given: Options) -> None:
    """Draw the samples that are not in the folder `out` yet, and put together its grid and npz file; a collective.

    Raises:
        ConfigError, DataError: an option cannot be used, or the model gives numbers that are not finite.
    """
    _sampling(given)  # what is out of range is said before anything is read
    with process_group(given.device) as processes, ExitStack() as claims:
        blocks: list[Block] = []
        with shared_errors(*SHARED):
            tokenizer = Path(given.tokenizer).expanduser() if given.tokenizer else None
            trained = load_transformer(Path(given.model).expanduser(), given.weights, tokenizer)
            folder = _folder(given, trained)
            given = replace(given, batch_size=min(given.batch_size, folder.count))
            if is_writer():
                claims.enter_context(folder.claim(*_facts(given, trained, folder, processes)))
                blocks = _blocks(folder, given.batch_size)
        blocks = copy_of_first(blocks)
        made, started = sum(len(lacking) for _, lacking in blocks), time.perf_counter()
        make: _Maker | None = None
        with progress(folder.count, "sample", done=folder.count - made) as bar:
            for first in range(0, len(blocks), processes.world):
                this_round = blocks[first : first + processes.world]
                with shared_errors(*SHARED):
                    if processes.rank < len(this_round):
                        make = make or _Maker(given, trained, folder, processes.device)
                        make(*this_round[processes.rank])
                bar.update(sum(len(lacking) for _, lacking in this_round))
        seconds = time.perf_counter() - started
        with shared_errors(*SHARED):
            if is_writer():
                _put_together(folder, npz=given.npz, anew=made > 0)
                already = f" ({folder.count - made:,} were there and are unchanged)" if made < folder.count else ""
                pace = f", {made / seconds:.2f} a second" if made else ""
                print(
                    f"{folder.count:,} samples{already}{pace}; peak memory {peak_memory_gib(processes.device):.2f} GiB",
                    file=sys.stderr,
                )
                print(folder.grid)


def _put_together(folder: SampleFolder, *, npz: bool, anew: bool) -> None:
    """Write the grid and, if wanted, the npz, where they are not there yet or have changed."""
    if anew or not folder.grid.is_file():
        folder.write_grid()
    if npz and (anew or not folder.npz.is_file()):
        with progress(folder.count, "sample (npz)") as bar:
            folder.write_npz(bar.update)
