"""Parts of the commands: a tokenizer and pictures, the loop over batches, a progress bar.

Suffixes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from ibq.cli.data_pictures import DataPictures
from ibq.cli.pictures import Fit, Framing, Picture, PictureFolder
from ibq.data.images import first_few, one_line, quoted, to_float
from ibq.distributed import is_writer, resolve_device
from ibq.errors import ConfigError, NonFiniteInputError
from ibq.evaluation.tokenizer import measuring
from ibq.models.tokenizer import Reconstruction, Tokenizer, load_tokenizer
from ibq.pretrained.released import RELEASED_SUFFIXES, load_released
from ibq.run_directory import RunDirectory
from ibq.schema import Resize
from ibq.training.row import peak_memory_gib


@dataclass(frozen=True)
class PictureOptions:
    """Arguments and options of all commands on pictures, as `ibq.cli` describes them."""

    model: str
    pictures: str | None
    fit: Fit | None = None
    resize: int | None = None
    scaling: Resize | None = None
    limit: int | None = None
    batch_size: int = 16
    weights: Literal["ema", "raw"] = "ema"
    device: str = "auto"
    data: str | None = None
    """A data set whose test split is shown in place of pictures."""


@dataclass(frozen=True)
class Model:
    """A tokenizer on its device, and where it comes from.

    Args:
        tokenizer: in eval mode.
        source: the path that was given.
        weights: which weights these are, for people.
    """

    tokenizer: Tokenizer
    source: str
    weights: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of architecture and weights, wherever they were read from."""
        return self.tokenizer.digest()

    def facts(self, seen: str) -> dict[str, str]:
        """Facts on model, weights and the pictures that were seen, above every table of numbers."""
        config = self.tokenizer.config
        quantizer, device = config.quantizer, next(self.tokenizer.parameters()).device
        return {
            "model": f"{quoted(self.source)} (sha256 {self.digest[:12]})",
            "weights": self.weights,
            "quantizer": f"{quantizer.method}, K = {quantizer.codebook_size:,}, D = {quantizer.code_dim}, f = "
            f"{config.model.downsampling}",
            "pictures seen": seen,
            "precision": f"fp32 on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'the CPU'}, torch "
            f"{torch.__version__}",
        }


class Batch(NamedTuple):
    """Pictures of one size, as the tokenizer read them, and what it returned."""

    pictures: list[Picture]
    originals_BCHW: torch.Tensor
    output: Reconstruction


def open_model(given: PictureOptions) -> tuple[Model, PictureFolder]:
    """The model on the device, and the pictures framed for it.

    Raises:
        ConfigError, DataError: one of them cannot be used.
    """
    assert given.pictures is not None
    if given.fit and given.resize:
        raise ConfigError(f"--fit {given.fit} and --resize {given.resize} contradict each other; leave one out")
    model = _model(given)
    config = model.tokenizer.config
    scaling = given.scaling or config.data.resize
    framing = Framing(config.model.downsampling, config.data.channels, given.fit or "whole", given.resize, scaling)
    pictures = PictureFolder(given.pictures, framing, given.limit)
    if framing.channels == 1:
        print("the tokenizer has one channel, so it is shown every picture in grey", file=sys.stderr)
    return model, pictures


def open_model_and_data(given: PictureOptions) -> tuple[Model, DataPictures]:
    """The model on the device, and the test split that `given.data` names.

    Raises:
        ConfigError, DataError: one of them cannot be used.
    """
    assert given.data is not None
    if unfit := [name for name in ("pictures", "fit", "resize", "scaling") if getattr(given, name) is not None]:
        option = "PICTURES" if unfit[0] == "pictures" else f"--{unfit[0]}"
        raise ConfigError(
            f"--data {given.data} and {option} {getattr(given, unfit[0])} contradict each other; leave one out"
        )
    model = _model(given)
    return model, DataPictures(given.data, model.tokenizer.config.data, given.limit)


def _model(given: PictureOptions) -> Model:
    device = resolve_device(given.device)
    tokenizer, weights = read_tokenizer(given.model, given.weights)
    if given.weights == "raw" and Path(given.model).expanduser().is_dir():
        raise ConfigError(
            f"--weights raw is for released checkpoints; {quoted(given.model)} holds one set of weights ({weights})"
        )
    return Model(tokenizer.to(device).eval(), given.model, weights)


def read_tokenizer(given: str | Path, weights: Literal["ema", "raw"] = "ema") -> tuple[Tokenizer, str]:
    """A tokenizer in eval mode on the CPU, and which weights it has, for people.

    Args:
        given: the folder of a finished run or of Tokenizer.save, or a released checkpoint; of a transformer's the
            tokenizer in it.
        weights: of a released checkpoint, as `load_released`.

    Raises:
        ConfigError, DataError: there is none, or it cannot be used.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        if (copy := path / "tokenizer").is_dir():  # in the folder of a transformer's run
            return load_tokenizer(copy), "as the transformer was trained on"
        return load_tokenizer(path), "averaged (EMA)" if RunDirectory(path).finished else "as saved"
    if path.is_file() and path.suffix in RELEASED_SUFFIXES:
        released = load_released(path, weights)
        if isinstance(released, Tokenizer):
            tokenizer, averaged, as_they_are = released, weights == "ema", "as trained, not averaged"
        else:
            tokenizer, averaged, as_they_are = (
                released.tokenizer,
                released.averaged,
                "as in the transformer's checkpoint",
            )
        return tokenizer, "averaged (EMA), as released" if averaged else as_they_are
    wrong = "is neither a folder nor a .ckpt, .pt or .pth file" if path.exists() else "does not exist"
    raise ConfigError(
        f"{quoted(path)} {wrong}; pass the folder of a finished run or of Tokenizer.save, or a released checkpoint "
        f"file (.ckpt)"
    )


def reconstructed(
    model: Model, pictures: PictureFolder | DataPictures, names: Iterable[str], batch_size: int
) -> Iterator[Batch]:
    """Batches of pictures of one size with their reconstructions, in float32.

    Args:
        names: of `pictures.names`, drawn as the work gets on.
        batch_size: as `PictureFolder.batches`; it changes the numbers by rounding at most.

    Raises:
        ConfigError: memory does not suffice, or the model gives numbers that are not finite.
    """
    tokenizer = model.tokenizer
    device = next(tokenizer.parameters()).device
    for batch in pictures.batches(names, batch_size):
        height, width = batch[0].pixels_CHW.shape[1:]
        this = f"{quoted(batch[0].name)} ({width}×{height} pixels, {len(batch)} at a time)"
        try:
            with (
                enough_memory(f"{this}; lower --batch-size, or use --resize or another --device"),
                measuring(tokenizer),
            ):
                x_BCHW = to_float(torch.stack([picture.pixels_CHW for picture in batch]), device)
                output: Reconstruction = tokenizer(x_BCHW)
        except NonFiniteInputError as error:
            raise ConfigError(f"the model cannot reconstruct {this}: {one_line(error)}") from None
        if not bool(output.images.isfinite().all()):
            raise ConfigError(f"the model's reconstruction of {this} is not finite; its weights are damaged")
        yield Batch(batch, x_BCHW, output)


@contextlib.contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """ConfigError where memory, the CPU's or a GPU's, does not suffice for `what`, a noun and a remedy."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise ConfigError(f"there is not enough memory for {what}") from None


@contextlib.contextmanager
def progress(total: int, unit: str = "picture", done: int = 0) -> Iterator[tqdm[None]]:
    """A bar on stderr with what is left; where no one watches, a line every half minute. Of several processes the first
    one has it."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    pace = {"mininterval": interval, "maxinterval": max(10.0, interval)}
    with tqdm(total=total, unit=unit, initial=done, disable=not is_writer(), **pace) as bar:
        yield bar


def closing_line(pictures: PictureFolder | DataPictures, used: int, device: torch.device) -> str:
    """Numbers of pictures used and skipped, the first reasons, and the peak memory."""
    skipped = f", {len(pictures.skipped):,} skipped ({first_few(pictures.skipped)})" if pictures.skipped else ""
    return f"{used:,} picture{'s' * (used != 1)}{skipped}; peak memory {peak_memory_gib(device):.2f} GiB"
