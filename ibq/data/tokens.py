"""Training data of a transformer: the tokens of a split's images, encoded once and kept, or those of fresh squares at
each step.

Suffixes: N images of a split, M those that are wanted, B those of a batch, T tokens of an image in row-major order, C
    channels, H W pixels.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ibq.config import TransformerTrainConfig
from ibq.data import ImageSource, cache_folder
from ibq.data.loader import TrainingBatches, shares
from ibq.data.shards import Parts
from ibq.distributed import any_rank, is_writer, shared_errors
from ibq.errors import ConfigError, DataError
from ibq.evaluation.tokenizer import evaluating, measuring
from ibq.models.tokenizer import Tokenizer
from ibq.training.runtime import StopRequested

SHARD = 4096
"""Images of a file of tokens."""
IMAGES_AT_ONCE, PIXELS_AT_ONCE = 64, 2**21
"""Pixels that are encoded or decoded together at most: of images of 256×256 pixels 32. The images alone decide it, not
the caller, so that the same tokens come out wherever they are encoded."""
ENCODING = "tokens 1: center squares, fp32"
"""Part of the cache's name; the number is raised when a change of the code changes what an image is encoded to."""
POLL_S = 0.5


@dataclass(frozen=True, eq=False)
class Tokens:
    """The images of a split as tokens.

    Args:
        tokens_NT: int32, or int64 where K needs it, in [0, K), each image's row by row, on the CPU.
        labels_N: int64 class of every image.
    """

    tokens_NT: torch.Tensor
    labels_N: torch.Tensor


def labels_of(images: ImageSource, classes: int) -> torch.Tensor:
    """The class of every image, int64 (N,); all 0 where the data has no labels.

    Raises:
        ConfigError: `classes` does not fit the labels.
    """
    labels_N = images.labels_N
    if labels_N is None:
        if classes != 1:
            raise ConfigError(
                f"{images.name} has no labels and classes={classes}; set classes=1, or sort the images into a folder a "
                f"class"
            )
        return torch.zeros(len(images), dtype=torch.int64)
    if (last := int(labels_N.max())) >= classes:
        raise ConfigError(
            f"labels of {images.name} {images.split} go up to {last} and classes={classes}; set classes={last + 1} or "
            f"more"
        )
    return labels_N


def encode_split(
    tokenizer: Tokenizer,
    images: ImageSource,
    *,
    classes: int,
    wanted: torch.Tensor | None = None,
    beat: Callable[[], bool] = lambda: False,
) -> Tokens:
    """The tokens of the images of a split (centre squares), in whole float32; with several processes a collective that
    shares the work.

    They are kept under what they follow from, the tokenizer's digest and the content of the split, in the folder
    `tokens` where fetched data lie too (IBQ_CACHE), in files of 4,096 images. What is there is not encoded again, but
    for damaged files; a folder that cannot be written costs the time of encoding again, no more. Another run that is at
    the same tokens is waited for.

    Args:
        tokenizer: on the device to compute on.
        images: the split.
        classes: of the labels; 1 where there are none.
        wanted: int64, the images whose tokens are needed, ascending, where a short run needs few; the tokens of all
            others are then -1. They are kept for themselves: neither taken from those of the whole split nor added to
            them, nor to those of another choice.
        beat: called before every batch and while waiting, a sign of life; it may do no collective, and True on any
            process stops all.

    Raises:
        ConfigError: `classes` does not fit the labels.
        DataError: images cannot be read.
        NonFiniteInputError: the tokenizer's features have NaN or infinite values.
        StopRequested: what is finished is kept.
    """
    labels_N = labels_of(images, classes)
    wanted_M = torch.arange(len(images)) if wanted is None or len(wanted) == len(images) else wanted
    with shared_errors(DataError):
        shape = images.pixels(wanted_M[:1]).shape[1:]
    key = _key(tokenizer, images, shape, wanted_M)
    folder = _cache(key)
    T = shape[1] * shape[2] // tokenizer.config.model.downsampling**2
    doing, device = f"encoding {images.name} {images.split}", next(tokenizer.parameters()).device
    parts = Parts(folder, key, len(wanted_M), SHARD, T, tokenizer.config.quantizer.codebook_size, doing)

    def encoded(numbers_B: torch.Tensor) -> torch.Tensor:
        return encode(tokenizer, images.batch(wanted_M[numbers_B], device))

    with _claim(folder, beat), measuring(tokenizer):
        tokens_MT = parts.collect(encoded, images_at_once(shape), beat)
    if len(wanted_M) == len(images):
        return Tokens(tokens_MT, labels_N)
    return Tokens(tokens_MT.new_full((len(images), T), -1).index_copy_(0, wanted_M, tokens_MT), labels_N)


def _key(tokenizer: Tokenizer, images: ImageSource, shape: torch.Size, wanted_M: torch.Tensor) -> str:
    """Hash that names the tokens of images of shape (C, H, W); that of a whole split does not depend on how it was
    asked for."""
    digest = hashlib.sha256(f"{ENCODING} {tokenizer.digest()} {images.content_hash} {tuple(shape)}".encode())
    if len(wanted_M) < len(images):
        digest.update(wanted_M.numpy().data)
    return digest.hexdigest()


def encode(tokenizer: Tokenizer, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T) of images, in batches that the images alone decide."""
    batches = x_BCHW.contiguous(memory_format=torch.channels_last).split(images_at_once(x_BCHW.shape[1:]))
    return torch.cat([tokenizer.encode(x_BCHW).flatten(1) for x_BCHW in batches])


def decode(tokenizer: Tokenizer, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), nominally in [-1, 1], of the tokens of square ones, on the tokenizer's device; in batches as
    of `encode`."""
    grid, device = math.isqrt(tokens_BT.shape[1]), next(tokenizer.parameters()).device
    side = grid * tokenizer.config.model.downsampling
    batches = tokens_BT.to(device, torch.int64).view(-1, grid, grid).split(images_at_once(torch.Size((1, side, side))))
    return torch.cat([tokenizer.decode(indices_BHW) for indices_BHW in batches])


def images_at_once(shape: torch.Size) -> int:
    """Number of images of shape (C, H, W) that a tokenizer encodes or decodes together."""
    return max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // (shape[1] * shape[2])))


def _cache(key: str) -> Path | None:
    try:
        return cache_folder() / "tokens" / key
    except DataError:
        return None


@contextmanager
def _claim(folder: Path | None, beat: Callable[[], bool]) -> Iterator[None]:
    """Waits until no other run is at work in the folder, and keeps others out: a lock of the operating system, which
    dies with its holder.

    Raises:
        StopRequested: while waiting.
    """
    lock = None if folder is None or not is_writer() else FileLock(folder / ".lock")
    said = False
    try:
        while True:
            stop, taken = any_rank(beat(), lock is not None and _is_taken(lock))
            if stop:
                raise StopRequested("asked to stop before anything was encoded")
            if not taken:
                break
            if is_writer() and not said:
                print(
                    "another run is encoding the same images with the same tokenizer; waiting for it",
                    file=sys.stderr,
                    flush=True,
                )
                said = True
            time.sleep(POLL_S)
        yield
    finally:
        if lock is not None:
            lock.release()


def _is_taken(lock: FileLock) -> bool:
    """Takes the lock, unless another process holds it; where there can be none, as in a folder that cannot be written,
    nobody holds it."""
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return False
    return False


class TokenBatches:
    """One process's share of the tokens and classes of each step, from any step on; which images, as `TrainingBatches`
    has it.

    Args:
        config: seed, batch_size, accumulate, data.flip and classes count.
        tokenizer: what encodes fresh squares, on the device; in float32 as torch has it, so on a GPU with TF32 in
            convolutions, which is several times faster than what tokens that are kept are encoded in.
        images: the training split.
        tokens: those of the split, encoded once; None: each step's squares are encoded when it comes.
        device: where the batches are wanted.
        first_step: the step that the first `next` is for.
        rank, world: this process's number and how many there are.
        workers: processes that decode fresh squares, for each rank; 0: this one does.

    Raises:
        ConfigError: batch_size cannot be shared out evenly, or `classes` does not fit the labels.
    """

    def __init__(
        self,
        config: TransformerTrainConfig,
        tokenizer: Tokenizer,
        images: ImageSource,
        tokens: Tokens | None,
        device: torch.device,
        *,
        first_step: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 4,
    ) -> None:
        self._tokenizer, self._tokens, self._device = tokenizer, tokens, device
        self._labels_N = labels_of(images, config.classes) if tokens is None else tokens.labels_N
        self._shares = shares(config, len(images), first_step, rank, world)
        self._squares: TrainingBatches | None = None
        if tokens is None:
            self._squares = TrainingBatches(
                images, config, device, first_step=first_step, rank=rank, world=world, workers=workers
            )

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for pixels so far."""
        return self._squares.waited_s if self._squares else 0.0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of the next step: tokens_BT and classes_B, int64 on the device.

        Raises:
            DataError: as `TrainingBatches.next`.
            NonFiniteInputError: the tokenizer's features have NaN or infinite values.
        """
        _, indices_B = next(self._shares)
        if self._tokens is not None:
            tokens_BT = self._tokens.tokens_NT[indices_B].to(self._device, torch.int64)
        else:
            assert self._squares is not None
            x_BCHW = self._squares.next()
            with evaluating(self._tokenizer), torch.autocast(x_BCHW.device.type, enabled=False):
                tokens_BT = encode(self._tokenizer, x_BCHW)
        return tokens_BT, self._labels_N[indices_B].to(self._device)

    def close(self) -> None:
        """End what decodes; no batch can be had afterwards."""
        self._shares = iter(())
        if self._squares:
            self._squares.close()

    def __enter__(self) -> TokenBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
