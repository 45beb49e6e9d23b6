"""Cost of a recipe: sizes against networks counted by hand, memory by rules, hours from rows alone and in words
without them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from torch import nn
from typer.testing import CliRunner

from experiments.benchmarks import tokenizer_training, training_cell
from experiments.cli import app
from experiments.imagenet256 import tokenizer_plan
from experiments.imagenet256.tokenizers import TOKENIZERS
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.models.discriminator import PatchDiscriminator

SMALL = {
    "data.resolution": 32,
    "model.base_channels": 8,
    "model.channel_multipliers": [1, 2],
    "model.norm_groups": 8,
    "model.res_blocks": 1,
    "model.z_channels": 8,
    "loss.perceptual": "none",
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 2,
    "quantizer.codebook_size": 64,
    "quantizer.code_dim": 8,
    "precision": "fp32",
}


@pytest.fixture
def small() -> TrainConfig:
    return TOKENIZERS["imagenet256_ibq_16384"]().with_fields(**SMALL)


def measured(config: TrainConfig, **changes: object) -> pd.DataFrame:
    row = {
        "status": "ok",
        "operator": "ours",
        "device": "cuda",
        "method": "ibq",
        "K": 64,
        "resolution": 32,
        "machine": "A card",
    }
    row |= {
        "parameters": tokenizer_plan.parameters(config)[0],
        "images_per_second": 200.0,
        "precision": "fp32",
        "compiled": True,
    }
    row |= {"batch": 32, "accumulate": 8}
    return pd.DataFrame([row | changes])


def test_activations_grow_with_the_images_and_weights_do_not(small: TrainConfig) -> None:
    one, four = (tokenizer_plan.memory_gib(small, images) for images in (1, 4))
    weights, autoencoder, judges = one
    assert one[weights] == four[weights]
    transformer, discriminator = tokenizer_plan.parameters(small)
    assert one[weights] * 2**30 == 20 * transformer + 16 * discriminator
    for name in (autoencoder, judges):
        assert four[name] == pytest.approx(4 * one[name], rel=0.1)


def test_half_precision_keeps_about_half() -> None:
    name, recipe = "activations of the autoencoder", TOKENIZERS["imagenet256_ibq_16384"]()
    full, half = (
        tokenizer_plan.memory_gib(recipe.with_fields(precision=precision), 1)[name] for precision in ("fp32", "fp16")
    )
    assert 0.45 < half / full < 0.6


def test_what_a_layer_keeps_is_what_autograd_keeps(small: TrainConfig) -> None:
    """A convolution keeps its input, a ReLU its output."""
    from torch._subclasses.fake_tensor import FakeTensorMode, torch

    with FakeTensorMode():
        network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
        kept = tokenizer_plan.kept_bytes(network, small.precision, torch.empty(2, 3, 8, 8))
    assert kept == 4 * 2 * 8 * 8 * (3 + 5)


def test_parameters_of_the_discriminator_are_counted_too() -> None:
    config = TOKENIZERS["imagenet256_ibq_16384"]()
    by_hand = sum(p.numel() for p in PatchDiscriminator(config.loss.adversarial, 3).parameters())
    assert tokenizer_plan.parameters(config)[1] == by_hand
    assert tokenizer_plan.parameters(config.with_fields(**{"loss.adversarial.weight": 0}))[1] == 0


def test_hours_follow_from_rows_of_the_same_step_and_several_gpus_are_an_assumption(small: TrainConfig) -> None:
    hours = small.steps * 256 / 200 / 3600
    mode = "measured at 200.0 images/s (fp32, compiled, 8 micro-batches of 4)"
    assert (
        tokenizer_plan.hours(small, 8, measured(small))
        == f"{hours / 8:,.0f} on 8, assuming linear scaling from one A card, {mode}"
    )
    alone = tokenizer_plan.hours(small.with_fields(accumulate=64), 1, measured(small, batch=256, accumulate=64))
    assert alone == f"{hours:,.0f} on one A card, measured at 200.0 images/s (fp32, compiled, 64 micro-batches of 4)"


def test_the_precision_of_the_recipe_is_preferred_and_another_one_is_said(small: TrainConfig) -> None:
    other = measured(small, precision="bf16", images_per_second=400.0)
    assert "400.0 images/s (bf16, where the recipe has fp32, compiled" in tokenizer_plan.hours(small, 8, other)
    assert "200.0 images/s (fp32, compiled" in tokenizer_plan.hours(small, 8, pd.concat([other, measured(small)]))


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"K": 128},
        {"operator": "matrix"},
        {"status": "does not fit"},
        {"parameters": 7},
        {"resolution": 64},
        {"method": "vq"},
        {"accumulate": 1},
        {"batch": 256},
    ],
)
def test_rows_of_something_else_do_not_count(small: TrainConfig, change: dict[str, object]) -> None:
    said = tokenizer_plan.hours(small, 8, measured(small, **change))
    assert said.startswith("not known: no GPU has been measured with this method, K and step")
    assert "bench tokenizer-training --method ibq --codes 64 --batch 32 --accumulate 8 --dtype float32" in said
    assert not any(word in said for word in ("about", "estimate"))


@pytest.mark.parametrize("recipe", TOKENIZERS)
def test_without_a_measurement_it_says_how_to_make_the_one_that_counts(recipe: str) -> None:
    """The command is one that the benchmark takes, and trains the network and the step of the recipe."""
    config = TOKENIZERS[recipe]()
    said = tokenizer_plan.hours(config, 8, pd.DataFrame())
    options = dict(re.findall(r"--(\w+) (\w+)", said))
    cell = {"method": options["method"], "K": int(options["codes"]), "small": False}
    cell |= {name: int(options[name]) for name in ("batch", "accumulate")}
    cell |= {"precision": tokenizer_training.PRECISIONS[options["dtype"]]}
    measured_one = training_cell.config_of(cell, Path("images"))
    assert (measured_one.model, measured_one.quantizer, measured_one.loss) == (
        config.model,
        config.quantizer,
        config.loss,
    )
    assert (measured_one.batch_size, measured_one.accumulate, measured_one.precision) == (32, 8, config.precision)


def test_rows_older_than_a_column_do_not_count(small: TrainConfig) -> None:
    assert tokenizer_plan.hours(small, 8, measured(small).drop(columns="accumulate")).startswith("not known")


def test_a_step_that_cannot_be_cut_is_refused(small: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=256 cannot be cut into 8 micro-batches .* on each of 7 GPUs"):
        tokenizer_plan.plan(small, 7)
    with pytest.raises(
        ConfigError, match=r"batch_size=2000000 exceeds the 1,281,167 training images of ImageNet; lower it"
    ):
        tokenizer_plan.plan(small.with_fields(batch_size=2_000_000), 8)


def test_the_command_prints_heading_sizes_and_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_training, "known_rows", pd.DataFrame)
    result = CliRunner().invoke(app, ["plan", "imagenet256_ibq_262144", "--gpus", "64", "--set", "accumulate=1"])
    assert result.exit_code == 0, result.output
    assert "Expected: rFID 1.00, LPIPS 0.2030, usage 84%." in result.output
    assert "parameters: 173,896,579 of the tokenizer" in result.output
    assert "1 micro-batches of 4 images on each of 64 GPUs, fp16" in result.output
    assert "hours:      not known" in result.output
    assert "hours: python" not in result.output
    assert "changed: accumulate=1; the heading is that of the recipe unchanged" in result.output


def test_nothing_is_printed_before_all_of_it_is_known() -> None:
    result = CliRunner().invoke(
        app, ["plan", "imagenet256_ibq_1024", "imagenet256_lfq_16384", "--set", "quantizer.double=true"]
    )
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan imagenet256_ibq_1024 vq_vs_ibq", "'vq_vs_ibq' is no recipe"),
        ("plan imagenet256_ibq_102", "'imagenet256_ibq_102' does not exist; did you mean 'imagenet256_ibq_1024'?"),
        ("plan imagenet256_ibq_1024 --preset quick", "the plan of a recipe has no --preset; it has --set and --gpus"),
        (
            "plan imagenet256_ibq_1024 --seeds 2 --slots 2",
            "the plan of a recipe has no --seeds; it has --set and --gpus",
        ),
        (
            "plan imagenet256_ibq_1024 --grid optim.lr=1,2",
            "the plan of a recipe has no --grid; it has --set and --gpus",
        ),
        (
            "plan imagenet256_ibq_1024 --base vq_vs_ibq/vq_fair",
            "the plan of a recipe has no --base; it has --set and --gpus",
        ),
        ("plan vq_vs_ibq --gpus 8", "the plan of an ablation has no --gpus; it has --preset,"),
        ("run imagenet256_ibq_1024", "'imagenet256_ibq_1024' is a recipe, not an ablation; use train: "),
        ("plan imagenet256_ibq_1024 --set optim.rl=1", "did you mean 'optim.lr'?"),
        (
            "train imagenet256_ibq_102",
            "recipe 'imagenet256_ibq_102' does not exist; did you mean 'imagenet256_ibq_1024'?",
        ),
        ("train imagenet256_ibq_1024 --data /no/such/folder", "there is no folder /no/such/folder; name the folder"),
        (
            "train imagenet256_ibq_1024 --data x --set data.name=photos",
            "--data x and --set data.name=photos name two data sets",
        ),
        ("bench overfit --codes 8", "benchmark overfit has no --codes; it has --small"),
        ("bench overfitt", "did you mean 'overfit'?"),
        ("bench tokenizer-training --device cpu", "takes minutes on device='cpu'; measure on CUDA, or try --small"),
        ("bench tokenizer-training --device cpu --small --batch 0", "a size of 0 cannot be measured"),
        ("bench tokenizer-training --device cpu --small --accumulate 0", "a size of 0 cannot be measured"),
        (
            "bench tokenizer-training --device cpu --small --batch 6",
            "batch=6 cannot be cut into accumulate=8 micro-batches",
        ),
        ("bench tokenizer-training --device cpu --small --method fsq", "method='fsq' is not measured; "),
        ("bench tokenizer-training --device cpu --small --dtype int8", "dtype='int8' is not known"),
    ],
)
def test_wrong_commands_are_one_sentence(command: str, words: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert words in line
