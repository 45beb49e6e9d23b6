"""Trainer process of the explorer: the sweep's (`experiments.runner.worker`), which also writes `live.safetensors`.

`live.safetensors` in the run's directory is replaced while the run goes on. It holds what `take_snapshot` gives,
`step`, and images_BCHW and reconstructions_BCHW (uint8) of the first test images.

Suffixes: B images, C channels, H W pixels, K codes.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import cached_property

import torch

from experiments.runner import worker
from experiments.runner.pool import GRACE_S
from ibq.config import TrainConfig
from ibq.data import ImageSource, load_images
from ibq.errors import NonFiniteInputError
from ibq.evaluation.tokenizer import SHOWN_IMAGES, measuring
from ibq.metrics.distances import to_uint8
from ibq.models.tokenizer import Tokenizer
from ibq.run_directory import RunDirectory, write_tensors
from ibq.training.logging import take_snapshot
from ibq.training.runtime import LogEvent, Runtime

LIVE = "live.safetensors"
LIVE_EVERY_S = 0.5
NICENESS = 2
"""The interface goes before training."""


def runtime_of(config: TrainConfig, device: str = "auto") -> Runtime:
    """Runtime of the explorer's runs: at least a hundred log steps, and every fifth step of a long run. The cadence
    depends on the config alone, since a restart of dead codes goes by the tokens since the last log step: a run that
    goes on must have the same."""
    return Runtime(device=device, log_every=max(1, min(5, config.steps // 100)))


def train(
    config: TrainConfig, run: RunDirectory, runtime: Runtime, threads: int, tokenizer: RunDirectory | None = None
) -> None:
    """Train a run as `worker.train` does, at the explorer's cadence; once the kernel has ended, the run stops
    resumably, and at once where that takes too long."""
    with suppress(OSError):
        os.setsid()  # a signal to the group of the kernel is not meant for its trainers
    os.nice(NICENESS)
    live = _Live(run, config)
    worker.train(config, run, runtime_of(config, runtime.device), threads, tokenizer, live.see, GRACE_S)


class _Live:
    """Writer of `live.safetensors`, at most one every LIVE_EVERY_S, with the tokens of each code since the one
    before."""

    def __init__(self, run: RunDirectory, config: TrainConfig) -> None:
        self._path, self._config = run.path / LIVE, config
        self._last = float("-inf")
        self._counts_K: torch.Tensor | int = 0

    @cached_property
    def _probe(self) -> ImageSource:
        return load_images(self._config.data, "test")

    def see(self, event: LogEvent) -> None:
        assert event.tokenizer is not None
        assert event.counts_K is not None
        counts_K = self._counts_K = self._counts_K + event.counts_K
        if time.monotonic() - self._last < LIVE_EVERY_S and event.step < event.steps:
            return
        with suppress(NonFiniteInputError):  # the next step says so, and is where the run ends
            write_tensors(self._path, self._tensors(event.tokenizer, counts_K) | {"step": torch.tensor(event.step)})
        self._counts_K = 0
        self._last = time.monotonic()

    def _tensors(self, tokenizer: Tokenizer, counts_K: torch.Tensor) -> dict[str, torch.Tensor]:
        snapshot = take_snapshot(tokenizer, self._probe, counts_K, counts_K.device)
        with measuring(tokenizer):
            x_BCHW = self._probe.batch(torch.arange(min(SHOWN_IMAGES, len(self._probe))), counts_K.device)
            y_BCHW = tokenizer(x_BCHW).images
        return snapshot | {"images_BCHW": to_uint8(x_BCHW), "reconstructions_BCHW": to_uint8(y_BCHW)}
