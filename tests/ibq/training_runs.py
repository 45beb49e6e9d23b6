"""Short training runs and what two of them must share."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ibq.training.tokenizer as trainer
from ibq.config import DataConfig
from ibq.data import Images, load_images
from ibq.run_directory import RunDirectory
from ibq.training.runtime import Runtime
from ibq.training.tokenizer_state import TrainingState

RUNTIME = Runtime(device="cpu", log_every=2, snapshots=3, eval_images=8)
GAN = {
    "loss.adversarial.weight": 0.1,
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 2,
    "loss.adversarial.norm": "group",
    "loss.perceptual": "fashion-cnn",
    "model.norm_groups": 2,
}
SMALL = 1e-4
"""A learning rate at which what Adam makes of rounding stays small."""
WITHOUT_EFFECT = "attn_1.k.bias"
"""Adds one number to all logits of a query: its gradient is rounding, which Adam makes steps of. (With one channel a
group, so are the biases before a norm; hence two.)"""
TIMED = {"train_seconds", "peak_memory_gib", "seconds", "images_per_s", "data_wait_pct"}


@functools.cache
def images_once(config: DataConfig, split: str) -> Images:
    return load_images(config, split)


@pytest.fixture(autouse=True, scope="module")
def read_the_images_once() -> Iterator[None]:
    """Import it into a module of tests that train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "load_images", images_once)
        yield


def stop_after(steps: int) -> Callable[[], bool]:
    asked = itertools.count()
    return lambda: next(asked) == steps


def weights_of(*networks: torch.nn.Module) -> torch.Tensor:
    named = [item for network in networks for item in network.named_parameters()]
    return torch.cat([parameter.detach().flatten() for name, parameter in named if WITHOUT_EFFECT not in name])


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


def assert_same_run(actual: RunDirectory, expected: RunDirectory) -> None:
    """All that two runs of one config must share: weights, history, snapshots, evaluation and row, bit for bit but for
    the clock."""
    assert untimed(actual.read_history()) == untimed(expected.read_history())
    assert_same_tensors(load_file(actual.model), load_file(expected.model))
    assert_same_tensors(load_file(actual.evaluation), load_file(expected.evaluation))
    assert actual.snapshot_steps() == expected.snapshot_steps()
    for step in expected.snapshot_steps():
        assert_same_tensors(actual.read_snapshot(step), expected.read_snapshot(step))
    rows = [{name: value for name, value in run.read_row().items() if name not in TIMED} for run in (actual, expected)]
    assert rows[0] == rows[1]


# --- What is not finite -----------------------------------------------------------------------------------------------


def poison_codebook(state: TrainingState) -> None:
    state.tokenizer.quantize.get_parameter("embedding").data[3] = math.nan


def poison_discriminator(state: TrainingState) -> None:
    next(state.trained["discriminator"].network.parameters()).data[0] = math.nan


def poison_images(state: TrainingState) -> None:
    """Not the state, but the pictures of the next step: the encoder's first layer is handed them."""

    def first_layer(module: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        arguments[0][0, 0, 0] = math.nan
        return arguments

    state.tokenizer.encoder.conv_in.register_forward_pre_hook(first_layer)


def poison_decoder(state: TrainingState) -> None:
    next(state.tokenizer.decoder.parameters()).data[0] = math.inf
