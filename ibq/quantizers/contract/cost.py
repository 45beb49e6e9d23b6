"""Time and memory of a training step, beside those of another method."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from ibq.quantizers.base import Quantizer
from ibq.quantizers.contract.trial import make, seeded, total_loss
from ibq.schema import QuantizerConfig

TOKENS, REPEATS = 1024, 7


class Cost(NamedTuple):
    """Of a forward and backward pass of TOKENS tokens on the CPU: the median seconds, and the most bytes that it holds
    at once."""

    seconds: float
    peak_bytes: int


def costs(*configs: QuantizerConfig) -> list[Cost]:
    """Cost of each, timed in turn, so that what else the machine does slows all alike."""
    with seeded(0):
        quantizers = [make(config) for config in configs]
        peaks = [_peak_bytes(quantizer) for quantizer in quantizers]
        rounds = [[_step(quantizer) for quantizer in quantizers] for _ in range(REPEATS)]
    return [
        Cost(statistics.median(seconds), peak) for seconds, peak in zip(zip(*rounds, strict=True), peaks, strict=True)
    ]


def _step(quantizer: Quantizer) -> float:
    """Seconds of one."""
    side = int(TOKENS**0.5)
    z_BDHW = torch.randn(1, quantizer.config.code_dim, side, side, requires_grad=True)
    quantizer.zero_grad()
    started = time.perf_counter()
    total_loss(quantizer, quantizer(z_BDHW)).backward()
    return time.perf_counter() - started


def _peak_bytes(quantizer: Quantizer) -> int:
    _step(quantizer)
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        _step(quantizer)
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing goes to this process's stderr, where the profiler's C++ code talks of itself."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
