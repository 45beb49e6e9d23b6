"""Runs of the explorer for tests, which real trainers train in real processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from experiments.explorer.run import ExplorerRun
from experiments.recipes import get_preset, tokenizer
from ibq.config import TrainConfig

LONG = 100_000
"""Steps that no test waits for."""
PATIENCE_S = 240.0


def config_of(steps: int, method: str = "ibq", **dotted: Any) -> TrainConfig:
    return tokenizer(get_preset("smoke"), {"method": method}).with_fields(steps=steps, **dotted)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def training(run: ExplorerRun, step: int = 1) -> ExplorerRun:
    """The run once it has come so far."""
    run.train()
    until(lambda: run.step >= step and run.state == "training", f"step {step}")
    return run


def trainer_of(run: ExplorerRun) -> int:
    return int([attempt for attempt in run.directory.read_attempts() if attempt["event"] == "started"][-1]["pid"])
