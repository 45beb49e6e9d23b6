"""Training batches: which images each step trains on, and their pixels where they are wanted, for one process or its
share for one of many.

Suffixes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import torch

from ibq.config import DataConfig
from ibq.data.images import ImageSource, to_float
from ibq.data.stream import StreamedImages, random_squares
from ibq.errors import ConfigError


def batch_indices(seed: int, step: int, n_images: int, batch_size: int) -> torch.Tensor:
    """Images (B,) that a step trains on: a fresh permutation each epoch; a function of seed and step, so that resuming
    needs no state."""
    epoch, batch = _epoch_and_batch(step, n_images, batch_size)
    return _permutation(seed * 1_000_003 + epoch, n_images)[batch * batch_size : (batch + 1) * batch_size]


def images_seen(seed: int, steps: int, n_images: int, batch_size: int) -> torch.Tensor | None:
    """Images that the first steps of a run show, ascending; None where they are all, or nearly."""
    if steps * batch_size >= n_images:
        return None
    return torch.cat([batch_indices(seed, step, n_images, batch_size) for step in range(steps)]).sort().values


def _epoch_and_batch(step: int, n_images: int, batch_size: int) -> tuple[int, int]:
    return divmod(step, max(1, n_images // batch_size))


@lru_cache(maxsize=2)
def _permutation(seed: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class Batching(Protocol):
    """Fields about batches in the config of either stage."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def accumulate(self) -> int: ...

    @property
    def seed(self) -> int: ...


class TrainingBatches:
    """One process's share of the batches of a run, from any step on.

    The pixels of a step are a function of config, step and images alone; processes take contiguous shares of each
    micro-batch, so that those of all ranks together, in their order, are what a single process would see. Images in
    memory are gathered, those of a folder that is streamed come as random squares from processes that decode ahead.
    Close it, or use it in a `with`, to end these.

    Args:
        images: the training split.
        config: seed, batch_size, accumulate and data.flip count.
        device: where batches are wanted.
        first_step: the step that the first `next` is for.
        rank, world: this process's number and how many there are.
        workers: processes that decode, for each rank; 0: this one does, in `next`.

    Raises:
        ConfigError: batch_size cannot be shared out evenly.
    """

    def __init__(
        self,
        images: ImageSource,
        config: Batching,
        device: torch.device,
        *,
        first_step: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 4,
    ) -> None:
        self.waited_s = 0.0
        """Seconds spent waiting for pixels so far."""
        self._device = device
        drawn = shares(config, len(images), first_step, rank, world)
        self._pixels: Iterator[torch.Tensor]
        if isinstance(images, StreamedImages):
            draws = (images.draws(indices_B, config.seed, epoch) for epoch, indices_B in drawn)
            self._pixels = random_squares(images, draws, flip=config.data.flip, workers=workers, device=device)
        else:
            self._pixels = (images.pixels(indices_B) for _, indices_B in drawn)

    def next(self) -> torch.Tensor:
        """The share of the next step: float32 (B, C, H, W) in [-1, 1] on the device, in channels_last.

        Raises:
            DataError: too many images cannot be used, or a process that decodes was lost.
        """
        started = time.perf_counter()
        bytes_BCHW = next(self._pixels)
        self.waited_s += time.perf_counter() - started
        x_BCHW = to_float(bytes_BCHW.to(self._device, non_blocking=True), self._device)
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    def close(self) -> None:
        """End what decodes; no batch can be had afterwards."""
        self._pixels = iter(())

    def __enter__(self) -> TrainingBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_even_shares(config: Batching, world: int) -> None:
    """ConfigError: batch_size cannot be shared out evenly over so many processes."""
    if config.batch_size % (world * config.accumulate):
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared out evenly over {world} processes with "
            f"accumulate={config.accumulate}; "
            f"choose a multiple of {world * config.accumulate}"
        )


def shares(
    config: Batching, n_images: int, first_step: int, rank: int, world: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Epoch and images (B,) of one process's share of each step, from the first on, without end.

    Raises:
        ConfigError: as `require_even_shares`.
    """
    require_even_shares(config, world)
    return _shares(config, n_images, first_step, rank, world)


def _shares(
    config: Batching, n_images: int, first_step: int, rank: int, world: int
) -> Iterator[tuple[int, torch.Tensor]]:
    for step in itertools.count(first_step):
        epoch, _ = _epoch_and_batch(step, n_images, config.batch_size)
        indices_B = batch_indices(config.seed, step, n_images, config.batch_size)
        yield epoch, indices_B.view(config.accumulate, world, -1)[:, rank].flatten()
