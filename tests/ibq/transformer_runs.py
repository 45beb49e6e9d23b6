"""Short runs of transformers on a tokenizer that knows nothing, and what two of them must share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TIMED, assert_same_tensors, images_once, untimed

import ibq.training.transformer as trainer
from ibq.config import DataConfig, TrainConfig, TransformerTrainConfig
from ibq.data import Images, fashion_mnist
from ibq.data.images import Split
from ibq.models.tokenizer import Tokenizer
from ibq.run_directory import RunDirectory
from ibq.training.runtime import LogEvent, Runtime
from ibq.training.sharding import local
from ibq.training.transformer import train_transformer
from ibq.training.transformer_state import TransformerState

RUNTIME = Runtime(device="cpu", log_every=2, eval_images=10, eval_batch_size=4, samples=4, guidances=(1.0, 2.0))
EVERY_STEP = dataclasses.replace(RUNTIME, log_every=1, checkpoint_every_s=0)
AUTOENCODER = {
    "base_channels": 4,
    "channel_multipliers": (1, 1, 2, 2),
    "res_blocks": 1,
    "z_channels": 8,
    "norm_groups": 4,
}
DROPOUTS = ("token_dropout", "attention_dropout", "ffn_dropout", "class_dropout")
WITHOUT_DROPOUT = {f"model.{name}": 0.0 for name in DROPOUTS}
N_IMAGES = 40
COST = TIMED | {"tokens_per_s", "encode_seconds", "sample_images_per_s"}


def transformer_config(**dotted: Any) -> TransformerTrainConfig:
    """The smallest with every part: a grid of 4 x 4 tokens of 32 codes, one block; changed by dotted path."""
    tokenizer = {"model": AUTOENCODER, "quantizer": {"method": "ibq", "codebook_size": 32, "code_dim": 4}}
    tree = {"tokenizer": tokenizer, "data": {}, "model": {"depth": 1}, "steps": 8, "batch_size": 8}
    return TransformerTrainConfig.parse(tree).with_fields(**{"optim.lr": 1e-3} | dotted)


@functools.cache
def untrained_tokenizer(config: TransformerTrainConfig) -> Tokenizer:
    torch.manual_seed(7)
    return Tokenizer(TrainConfig.parse(config.tokenizer.to_json_dict())).eval()


def few_images(config: DataConfig, split: Split, count: int = N_IMAGES) -> Images:
    images = images_once(config, split)
    assert images.labels_N is not None
    return Images("fashion-mnist", split, images.images_NCHW[:count], images.labels_N[:count])


def watch_images(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Few of them, and their tokens in a cache of the tests' own."""
    files, _ = fashion_mnist.FILES.find()  # before the cache, where fetched images may lie, is another
    patch.setenv("IBQ_DATA", str(next(iter(files.values())).parent))
    patch.setenv("IBQ_CACHE", str(cache))
    patch.setattr(trainer, "load_images", few_images)


class Seen(TransformerState):
    """The state that the trainer has made, for tests to look into; see `watch_state`."""

    last: TransformerState | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Seen.last = self


def watch_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Seen, "last", None)
    patch.setattr(trainer, "TransformerState", Seen)


@pytest.fixture(autouse=True, scope="module")
def few_images_and_states_seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Import it into a module of tests that train transformers."""
    with pytest.MonkeyPatch.context() as patch:
        watch_images(patch, tmp_path_factory.mktemp("cache"))
        watch_state(patch)
        yield


def train(
    config: TransformerTrainConfig,
    folder: Path,
    runtime: Runtime = RUNTIME,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[LogEvent]:
    return list(train_transformer(config, untrained_tokenizer(config), folder, runtime, should_stop))


def state_of_last_run() -> TransformerState:
    assert Seen.last is not None
    return Seen.last


def stop_at(step: int) -> Callable[[], bool]:
    """Asks to stop before the step that follows so many, however often it was asked before; for one run, whose state is
    watched."""
    before = Seen.last
    return lambda: Seen.last is not None and Seen.last is not before and Seen.last.step == step


def poison_weights(state: TransformerState) -> None:
    """Of this process."""
    local(next(state.transformer.parameters())).data[:] = math.nan


def poison_gradient(state: TransformerState) -> None:
    """Not the loss, but what goes back from the head."""

    def poison(module: Any, arguments: Any, out: torch.Tensor) -> None:
        out.register_hook(lambda gradient: gradient * math.nan)

    state.transformer.head_nm.register_forward_hook(poison)


def without_cost(run: RunDirectory) -> dict[str, Any]:
    return {name: value for name, value in run.read_row().items() if name not in COST}


def assert_same_transformer(actual: RunDirectory, expected: RunDirectory) -> None:
    """All that two runs of one config must share: weights, history, samples and row, bit for bit but for the clock."""
    lines = [
        [{k: v for k, v in line.items() if k not in COST} for line in untimed(run.read_history())]
        for run in (actual, expected)
    ]
    assert lines[0] == lines[1]
    assert_same_tensors(load_file(actual.model), load_file(expected.model))
    assert_same_tensors(load_file(actual.generated), load_file(expected.generated))
    assert without_cost(actual) == without_cost(expected)
