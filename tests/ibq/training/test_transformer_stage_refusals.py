"""A run that cannot go on: what is not finite ends it with a row that says where; what does not fit is refused in one
line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_runs import (  # noqa: F401
    EVERY_STEP,
    N_IMAGES,
    RUNTIME,
    assert_same_transformer,
    few_images,
    few_images_and_states_seen,
    poison_gradient,
    poison_weights,
    state_of_last_run,
    stop_at,
    train,
    transformer_config,
    untrained_tokenizer,
)

import ibq.training.transformer as trainer
from ibq.config import DataConfig, TransformerTrainConfig
from ibq.data import Images
from ibq.data.images import Split
from ibq.errors import ConfigError, NonFiniteError
from ibq.run_directory import RunDirectory
from ibq.training.checkpoint import load_checkpoint
from ibq.training.runtime import Runtime, StopRequested
from ibq.training.transformer import train_transformer
from ibq.training.transformer_state import TransformerState

# --- What is not finite -----------------------------------------------------------------------------------------------


def train_and_poison(
    folder: Path, poison: Callable[[TransformerState], None], after: int, runtime: Runtime = RUNTIME
) -> None:
    config = transformer_config()
    for event in train_transformer(config, untrained_tokenizer(config), folder, runtime):
        if event.step == after:
            poison(state_of_last_run())


@pytest.mark.parametrize(
    ("poison", "after", "reason"),
    [
        (poison_weights, 4, "^step 4: loss term 'cross_entropy' is nan$"),
        (poison_gradient, 4, r"^step 4: the gradient of '[\w.]+' is not finite$"),
        (poison_weights, 8, r"^step 8: 'transformer\.tok_emb\.weight' is not finite after the update$"),
    ],
    ids=["weights", "gradient", "weights after the last step"],
)
def test_a_run_that_does_not_stay_finite_ends_with_a_row_that_says_where(
    tmp_path: Path, poison: Any, after: int, reason: str
) -> None:
    with pytest.raises(NonFiniteError, match=reason) as caught:
        train_and_poison(tmp_path, poison, after)
    run = RunDirectory(tmp_path)
    row = run.read_row()
    assert (row["status"], row["reason"], row["depth"]) == ("nan", str(caught.value), 1)
    assert "cross_entropy" not in row
    assert not run.model.exists()
    assert train(transformer_config(), tmp_path) == [], "nan is a final state"


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match=r"^step 4: 'transformer\.tok_emb\.weight' is not finite after the update$"
    ):
        train_and_poison(tmp_path, poison_weights, 4, EVERY_STEP)
    checkpoint, _ = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint is not None
    assert checkpoint.meta["step"] == 3
    assert all(tensor.isfinite().all() for name, tensor in checkpoint.tensors.items() if not name.startswith("rng"))


@pytest.mark.parametrize("what", ["raised", "returned"])
def test_an_evaluation_that_is_not_finite_is_a_lost_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def evaluate(*_: Any) -> Any:
        if what == "raised":
            raise NonFiniteError("logits of sample 3 are not finite")
        return {"cross_entropy": math.inf}, {}, {"classes_N": torch.zeros(1)}

    monkeypatch.setattr(trainer, "evaluate_transformer", evaluate)
    reason = {"raised": "in the evaluation logits of sample 3", "returned": "evaluation gave cross_entropy that"}[what]
    with pytest.raises(NonFiniteError, match=f"^step 2: {reason} are not finite$"):
        train(transformer_config(steps=2), tmp_path)
    assert RunDirectory(tmp_path).read_row()["status"] == "nan"


# --- Refusals ---------------------------------------------------------------------------------------------------------


def refused(config: TransformerTrainConfig, folder: Path, words: str, tokenizer: Any = None) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=words):
        list(train_transformer(config, tokenizer or untrained_tokenizer(config), folder, RUNTIME))
    assert sorted(folder.rglob("*")) == before, "a refusal leaves nothing"


def test_the_tokenizer_of_another_config_is_refused_by_the_field(tmp_path: Path) -> None:
    other = untrained_tokenizer(transformer_config(**{"tokenizer.quantizer.codebook_size": 64}))
    refused(
        transformer_config(), tmp_path, r"^the tokenizer has quantizer\.codebook_size=64, not 32; pass the one", other
    )


def test_other_weights_than_those_that_the_config_names_are_refused(tmp_path: Path) -> None:
    config = transformer_config()
    digest = untrained_tokenizer(config).digest()
    refused(
        transformer_config(tokenizer_sha256="0" * 64),
        tmp_path,
        rf"^the tokenizer has the digest {digest[:12]}, not tokenizer_sha256=0000",
    )
    named = transformer_config(tokenizer_sha256=digest, steps=1)
    train(named, tmp_path)
    assert "tokenizer_run" not in RunDirectory(tmp_path).read_row(), "weights from elsewhere have no run"


def test_a_run_goes_on_with_its_own_tokenizer_alone(tmp_path: Path) -> None:
    config, whole, tmp_path = transformer_config(), tmp_path / "whole", tmp_path / "run"
    with pytest.raises(StopRequested):
        train(config, tmp_path, should_stop=stop_at(4))
    copy = {path: path.read_bytes() for path in RunDirectory(tmp_path).tokenizer.iterdir()}
    other = trainer.Tokenizer(config.tokenizer)
    first, second = untrained_tokenizer(config).digest()[:12], other.digest()[:12]
    remedy = "pass the one of before, or forget the run and train it again"
    refused(config, tmp_path, f"was trained on tokenizer {first}, not {second}; {remedy}$", other)
    assert {path: path.read_bytes() for path in copy} == copy
    for folder in (tmp_path, whole):
        train(config, folder)
    assert_same_transformer(RunDirectory(tmp_path), RunDirectory(whole))


def test_a_run_goes_on_with_the_labels_of_before_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformer_config()
    with pytest.raises(StopRequested):
        train(config, tmp_path, should_stop=stop_at(2))

    def shifted(data: DataConfig, split: Split) -> Images:
        images = few_images(data, split)
        assert images.labels_N is not None
        return dataclasses.replace(images, labels_N=(images.labels_N + 1) % config.classes)

    monkeypatch.setattr(trainer, "load_images", shifted)
    with pytest.raises(ConfigError, match=r"was trained on (the )?labels \w+, not \w+; "):
        train(config, tmp_path)


def test_a_tokenizer_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    config = transformer_config()
    tokenizer = trainer.Tokenizer(config.tokenizer)
    torch.nn.init.constant_(tokenizer.quant_conv.weight, math.nan)
    with pytest.raises(
        ConfigError,
        match=r"^the tokenizer cannot encode fashion-mnist, as \d+ of \d+ values of .* whose run did not end as nan$",
    ):
        list(train_transformer(config, tokenizer, tmp_path, RUNTIME))


def test_labels_that_do_not_fit_the_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        transformer_config(classes=3),
        tmp_path,
        r"^labels of fashion-mnist train go up to 9 and classes=3; set classes=10 or more$",
    )
    monkeypatch.setattr(
        trainer, "load_images", lambda config, split: dataclasses.replace(few_images(config, split), labels_N=None)
    )
    refused(transformer_config(), tmp_path, r"^fashion-mnist has no labels and classes=10; set classes=1, or")
    train(transformer_config(classes=1, steps=1), tmp_path)


def test_more_images_a_step_than_there_are_are_refused(tmp_path: Path) -> None:
    refused(
        transformer_config(batch_size=41),
        tmp_path,
        f"^batch_size=41 exceeds the {N_IMAGES} training images of fashion-mnist; lower it$",
    )


def test_a_batch_that_is_not_shared_out_evenly_is_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(trainer, "world_size", lambda: 3)
    refused(
        transformer_config(),
        tmp_path,
        "^batch_size=8 cannot be shared out evenly over 3 processes with accumulate=1; choose a mult",
    )


def test_the_directory_of_another_config_is_refused_by_the_field(tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        train(transformer_config(), tmp_path, should_stop=stop_at(2))
    refused(
        transformer_config(**{"model.depth": 2}),
        tmp_path,
        r"holds a run with model\.depth=1, not 2; pass another directory$",
    )


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StopRequested):
        train(transformer_config(), tmp_path, should_stop=stop_at(2))
    monkeypatch.setattr("ibq.training.transformer_state.TRANSFORMER_VERSION", 99)
    refused(
        transformer_config(), tmp_path, r"transformer_version=1, this code has 99; forget the run and train it again$"
    )
