"""`python -m ibq.cli.sample MODEL OUT`: images from a transformer, as PNG files, a grid, and the file that evaluators
read.

What OUT holds then: `ibq.cli.sample_folder`. A sample follows from the model, its number, the seed and the settings:
neither from what else is drawn with it nor from who draws it, but for rounding. So that not even rounding differs after
a kill, samples are drawn in blocks of the same numbers always, and a block of which one is missing is drawn whole. A
--count below --batch-size makes the blocks smaller: what a greater count then adds is drawn in others.

Suffixes: B samples of a block, N tokens of an image, C channels, H W pixels or token grid.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from ibq import __version__
from ibq.cli.common import enough_memory, positive, progress, run_command
from ibq.cli.sample_folder import SampleFolder
from ibq.data.images import DataError, quoted
from ibq.distributed import Processes, copy_of_first, device_name, is_writer, process_group, shared_errors
from ibq.errors import ConfigError, NonFiniteError
from ibq.evaluation.tokenizer import measuring
from ibq.metrics.distances import to_uint8
from ibq.pretrained.released import TrainedTransformer, Weights
from ibq.pretrained.transformer import load_transformer
from ibq.run_directory import source_commit
from ibq.sampling import Guidance, Sampler, Sampling, Schedule
from ibq.training.runtime import AUTOCAST, peak_memory_gib

A_CLASS, AT_MOST = 8, 80
"""Samples where no number is given: of each class, and in all."""
SHARED = (ConfigError, DataError, OSError)
"""Errors that one process may meet alone, which then end all of them."""


WRITERS = 8
"""Threads that write the files of a block."""

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


def _sampling(given: argparse.Namespace) -> Sampling:
    """ConfigError: an option is out of range."""
    guidance = Guidance(
        given.guidance, given.guidance_schedule, given.guidance_power, given.guidance_start, given.guidance_end
    )
    return Sampling(given.temperature, given.top_k, given.top_p, given.min_p, guidance)


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

    def __init__(
        self, given: argparse.Namespace, trained: TrainedTransformer, folder: SampleFolder, device: torch.device
    ) -> None:
        transformer, self._tokenizer, _ = trained
        self._grid, self._folder = transformer.config.grid, folder
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
        pixels_BCHW = to_uint8(images_BCHW).cpu()
        with ThreadPoolExecutor(WRITERS) as pool:  # Pillow lets go of Python's lock; a disk takes its time
            for written in [
                pool.submit(self._folder.write, number, pixels_BCHW[number - block[0]]) for number in lacking
            ]:
                written.result()


def _folder(given: argparse.Namespace, trained: TrainedTransformer) -> SampleFolder:
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
    given: argparse.Namespace, trained: TrainedTransformer, folder: SampleFolder, processes: Processes
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
    }
    protocol = {
        "transformer": f"depth {transformer.depth}, width {transformer.width}, {transformer.classes:,} classes",
        "tokens": f"{transformer.grid} x {transformer.grid} of {quantizer.method}, K = {quantizer.codebook_size:,}",
        "weights": "averaged (EMA)" if trained.averaged else "as they are, not averaged",
        "images": f"{width} x {height} pixels, {'RGB' if channels == 3 else 'grey'}, decoded in fp32, clamped, rounded "
        f"to 8 bits once",
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


def _sample(given: argparse.Namespace) -> None:
    _sampling(given)  # what is out of range is said before anything is read
    with process_group(given.device) as processes, ExitStack() as claims:
        blocks: list[Block] = []
        with shared_errors(*SHARED):
            tokenizer = Path(given.tokenizer).expanduser() if given.tokenizer else None
            trained = load_transformer(Path(given.model).expanduser(), given.weights, tokenizer)
            folder = _folder(given, trained)
            given.batch_size = min(given.batch_size, folder.count)
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


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**64):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0 and below 2**64")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Draw images from a transformer: OUT gets a PNG file of each, a grid (grid.png) and what they were made with
    (samples.json)."""
    parser = argparse.ArgumentParser(prog="python -m ibq.cli.sample", description=main.__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a transformer's finished run, or a transformer's released checkpoint (.ckpt)",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="folder for what is written, made if absent; given again, only what is missing is made",
    )
    what = parser.add_argument_group("what is drawn")
    what.add_argument("--classes", metavar="LIST", help="such as 0,3,5-7 (all)")
    what.add_argument(
        "--count",
        type=positive,
        metavar="N",
        help=f"samples in all, given to the classes in turn; a greater N adds to a folder ({A_CLASS} a class, but at "
        f"most {AT_MOST})",
    )
    what.add_argument(
        "--seed", type=_seed, default=0, help="of the random numbers: another seed, other samples (%(default)s)"
    )
    what.add_argument("--npz", action="store_true", help="also write samples.npz, as the ADM evaluator reads it")
    how, none = parser.add_argument_group("how a token is drawn"), Sampling()
    how.add_argument(
        "--temperature", type=float, default=none.temperature, help="0 takes the most probable (%(default)s)"
    )
    how.add_argument("--top-k", type=int, metavar="K", help="only the K most probable (all)")
    how.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=none.top_p,
        help="only the fewest that have probability P (%(default)s)",
    )
    how.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        default=none.min_p,
        help="only those P times as probable as the first (%(default)s)",
    )
    how.add_argument(
        "--guidance", type=float, metavar="S", default=none.guidance.scale, help="scale; 1 is none (%(default)s)"
    )
    how.add_argument(
        "--guidance-schedule", choices=get_args(Schedule), default=none.guidance.schedule, help="(%(default)s)"
    )
    how.add_argument(
        "--guidance-power",
        type=float,
        default=none.guidance.power,
        help="of the cosine: the larger, the later it rises (%(default)s)",
    )
    how.add_argument(
        "--guidance-start",
        type=float,
        default=none.guidance.start,
        help="of the interval, a share of the tokens (%(default)s)",
    )
    how.add_argument("--guidance-end", type=float, default=none.guidance.end, help="(%(default)s)")
    where = parser.add_argument_group("with which weights, and where")
    where.add_argument(
        "--tokenizer", metavar="FOLDER", help="the tokenizer of a run's folder that was copied without it"
    )
    where.add_argument(
        "--weights", choices=get_args(Weights), default="ema", help="of a released checkpoint's tokenizer (%(default)s)"
    )
    where.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="samples drawn together (%(default)s)"
    )
    where.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the transformer (%(default)s)")
    where.add_argument("--compile", action="store_true", help="torch.compile: pays where many samples are drawn")
    where.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda or cuda:N; under torchrun each process has a GPU (%(default)s)",
    )
    run_command(parser, _sample, arguments, when_stopped="the same command goes on from there")


if __name__ == "__main__":
    main()
