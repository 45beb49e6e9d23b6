"""The process that trains one run of the explorer: `train_tokenizer`, which it lets pause, stop and be changed between
two steps.

What there is to see lies in the run's directory, so that a viewer needs no pipe: history.jsonl, attempts.jsonl,
interventions.jsonl, row.json, and `live.safetensors`, which is replaced while the run goes on: what `take_snapshot`
gives, `step`, and images_BCHW and reconstructions_BCHW (uint8) of the first test images.

Suffixes: B images, C channels, H W pixels, K codes.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from functools import cached_property
from multiprocessing.connection import Connection

import torch
from filelock import FileLock, Timeout

from experiments.runner import worker
from ibq.config import TrainConfig
from ibq.data import ImageSource, load_images
from ibq.errors import NonFiniteInputError
from ibq.evaluation.tokenizer import SHOWN_IMAGES, measuring
from ibq.metrics.distances import to_uint8
from ibq.models.tokenizer import Tokenizer
from ibq.run_directory import RunDirectory, write_tensors
from ibq.training.interventions import Intervention
from ibq.training.logging import take_snapshot
from ibq.training.runtime import LogEvent, Runtime

LIVE = "live.safetensors"
LIVE_EVERY_S = 0.5
GRACE_S = 8.0
"""How long a trainer has to write a checkpoint once the process that it belongs to is gone."""


def runtime_of(config: TrainConfig, device: str = "auto") -> Runtime:
    """How the explorer watches a run: at least a hundred points, and every fifth step of a long one. The cadence
    depends on the config alone, since a restart of dead codes goes by the tokens since the last log step: a run that
    goes on must have the same."""
    return Runtime(device=device, log_every=max(1, min(5, config.steps // 100)))


def train(config: TrainConfig, folder: str, runtime: Runtime, threads: int, commands: Connection) -> None:
    """Train a run to its row or until it is stopped; record the attempt and how it ended in attempts.jsonl, and exit.

    Args:
        config: what to train.
        folder: the run's directory.
        runtime: device and cadences.
        threads: of torch on the CPU.
        commands: brings "pause", "resume", "stop" and Interventions; its end means that nobody is left to watch, and so
            stops the run as well, at once where that takes too long. Takes "training" and "paused" as they come true.
    """
    torch.set_num_threads(threads)
    run, asked = RunDirectory(folder), Commands(commands)
    live = _Live(run, config)

    def seen(event: LogEvent) -> None:
        live.see(event)
        asked.say("training")

    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with FileLock(run.lock, timeout=2):
            code = 0
            if not run.finished:
                code = worker.attempt(run, config, runtime, asked.should_stop, seen, intervene=asked.intervene).code
    except Timeout:
        raise SystemExit(worker.BUSY) from None
    except OSError as error:  # even the attempt could not be noted
        raise SystemExit(worker.DISK_FULL if worker.is_disk_full(error) else 1) from None
    raise SystemExit(code)


class Commands:
    """Requests to a run from outside, read by a thread of its own and obeyed between two steps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._paused = self._stop = False
        self._interventions: list[Intervention] = []
        self._said = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                self._obey("stop")
                time.sleep(GRACE_S)
                os._exit(1)
            self._obey(command)

    def _obey(self, command: str | Intervention) -> None:
        with self._changed:
            if isinstance(command, Intervention):
                self._interventions.append(command)
            elif command == "stop":
                self._stop = True
            else:
                self._paused = command == "pause"
            self._changed.notify()

    def should_stop(self) -> bool:
        """Whether to stop; returns only once the run is not paused."""
        with self._changed:
            if self._paused and not self._stop:
                self.say("paused")
                self._changed.wait_for(lambda: self._stop or not self._paused)
                self.say("training")
            return (
                self._stop and not self._interventions
            )  # what was asked for before the stop is done, and recorded, first

    def intervene(self, step: int) -> list[Intervention]:
        """Interventions before the next step."""
        with self._changed:
            interventions, self._interventions = self._interventions, []
        return interventions

    def say(self, state: str) -> None:
        """Tell a state, once."""
        if state != self._said:
            self._said = state
            with suppress(OSError):  # nobody is left to hear it
                self._connection.send(state)


class _Live:
    """Keeps `live.safetensors` up to date, at most one every LIVE_EVERY_S, with the tokens of each code since the one
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
