"""Recipes: functions that return a complete config, and the presets that scale them. A preset changes scale, never the
method."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ibq.config import TrainConfig, TransformerTrainConfig, imagenet_steps
from ibq.errors import ConfigError, nearest
from ibq.schema import flatten
from ibq.training.runtime import Runtime


def imagenet_data() -> dict[str, Any]:
    """ImageNet at 256×256 as released: shorter side to 256 by a bilinear kernel without antialiasing, a random crop, no
    flip. It lies in the folder that the
    environment variable IBQ_IMAGENET names, else in `imagenet` in the working directory."""
    return {
        "name": f"imagefolder:{os.environ.get('IBQ_IMAGENET') or 'imagenet'}",
        "resolution": 256,
        "crop": "random",
        "flip": False,
        "resize": "released",
    }


@dataclass(frozen=True)
class Preset:
    """A scale: data, sizes and steps of every arm, what is watched, and what a step cost where it was measured."""

    name: str
    purpose: str
    fields: dict[str, Any]
    """The TrainConfig without its quantizer and its data."""
    codebook_size: int
    code_dim: int
    runtime: Runtime
    projection: Literal["umap", "pca"] = "umap"
    data: Callable[[], dict[str, Any]] = dict
    """Fields of the DataConfig, read when a config is made, since a folder may come from the environment."""
    discriminator: Mapping[str, Any] = field(default_factory=dict)
    """The size of a discriminator, by dotted path, for arms that have one."""
    transformer: Mapping[str, Any] = field(default_factory=dict)
    """The TransformerTrainConfig of arms that have a transformer, without its tokenizer, data and seed."""
    transformer_tokenizer_steps: float = 1.0
    """Steps of the tokenizers of the ablation `generation`, as a multiple of `steps`."""
    seconds_per_step: float | None = 0.2
    """None: no step of this scale has been measured, so that nothing is said of its time."""
    transformer_seconds_per_step: float | None = None
    """Of a transformer: its whole run, encoding and evaluation included, over its steps."""
    measured_on: str = "2 cores of a server CPU, two runs at a time"
    max_seeds: int = 1_000_000
    max_arms: int = 1_000_000
    """Arms of a map of collapse beyond so many are left out at this scale."""
    max_codebook_size: int = 4096
    """Arms with more codes are left out at this scale."""


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            purpose="tests: everything runs, nothing is learnt",
            fields={
                "model": {"base_channels": 4, "channel_multipliers": [1, 1, 2], "norm_groups": 4, "z_channels": 8},
                "steps": 6,
                "batch_size": 8,
            },
            codebook_size=32,
            code_dim=8,
            runtime=Runtime(
                log_every=2,
                snapshots=3,
                checkpoint_every_s=0.5,
                eval_images=16,
                eval_batch_size=16,
                samples=16,
                guidances=(1.0, 2.0),
            ),
            projection="pca",
            discriminator={"loss.adversarial.channels": 8, "loss.adversarial.layers": 2},
            transformer={"model": {"depth": 2}, "steps": 4, "batch_size": 8},
            transformer_tokenizer_steps=3.0,
            seconds_per_step=0.05,
            transformer_seconds_per_step=0.5,
            max_seeds=1,
            max_arms=10,
            max_codebook_size=128,
        ),
        Preset(
            name="quick",
            purpose="the default: the whole story on two CPU cores",
            fields={
                "model": {"base_channels": 8, "channel_multipliers": [1, 2, 4], "norm_groups": 8, "z_channels": 32},
                "steps": 300,
                "batch_size": 32,
            },
            codebook_size=1024,
            code_dim=64,
            runtime=Runtime(),
            discriminator={"loss.adversarial.channels": 16, "loss.adversarial.layers": 2},
            # 700 steps of 32 images see no image of 60,000 twice, so that the paper's dropouts of 0.1 would only cost
            transformer={
                "model": {"depth": 2, "token_dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0},
                "optim": {"lr": 4e-3},
                "steps": 700,
                "batch_size": 32,
            },
            transformer_tokenizer_steps=3.0,
            seconds_per_step=0.2,
            transformer_seconds_per_step=0.27,
        ),
        Preset(
            name="gpu",
            purpose="one GPU: the paper's default codebook (16,384 codes of dimension 256) on Fashion-MNIST",
            fields={
                "model": {
                    "base_channels": 64,
                    "channel_multipliers": [1, 2, 4],
                    "norm_groups": 32,
                    "z_channels": 256,
                    "res_blocks": 2,
                },
                "optim": {"lr": 4e-4, "ema_decay": 0.995},
                "steps": 4000,
                "batch_size": 256,
                "precision": "bf16",
            },
            codebook_size=16384,
            code_dim=256,
            runtime=Runtime(log_every=50, eval_images=10_000, eval_batch_size=500, samples=10_000),
            discriminator={"loss.adversarial.channels": 32, "loss.adversarial.layers": 2},
            transformer={
                "model": {"depth": 12},
                "optim": {"lr": 4e-4},
                "steps": 20_000,
                "batch_size": 512,
                "precision": "bf16",
            },
            seconds_per_step=0.1,
            measured_on="nothing yet: an estimate",
            max_codebook_size=2**18,
        ),
        Preset(
            name="paper",
            purpose="the paper (docs/method.md sections 4 to 6): ImageNet 256×256 from the folder IBQ_IMAGENET, 330 "
            "epochs; "
            "many GPUs",
            fields={
                "model": {
                    "base_channels": 128,
                    "channel_multipliers": [1, 1, 2, 2, 4],
                    "res_blocks": 4,
                    "attention_resolutions": [16],
                    "z_channels": 256,
                    "norm_groups": 32,
                },
                "loss": {"perceptual": "lpips-vgg", "adversarial": {"weight": 0.1}},
                "optim": {
                    "lr": 1e-4,
                    "betas": [0.5, 0.9],
                    "milestones": [250 / 330, 300 / 330],
                    "decay_factor": 0.1,
                    "ema_decay": 0.999,
                },
                "steps": imagenet_steps(330),
                "batch_size": 256,
                "accumulate": 8,
                "averages": "local",
                "precision": "fp16",
            },
            codebook_size=16384,
            code_dim=256,
            data=imagenet_data,
            runtime=Runtime(
                log_every=100,
                checkpoint_every_s=600.0,
                workers=8,
                eval_images=50_000,
                eval_batch_size=32,
                samples=50_000,
            ),
            transformer={
                "model": {"depth": 16},
                "classes": 1000,
                "optim": {"lr": 3e-4},
                "steps": imagenet_steps(300, 768),
                "batch_size": 768,
                "precision": "bf16",
            },
            seconds_per_step=None,
            max_codebook_size=2**18,
        ),
    )
}


PRESETS["night"] = replace(
    PRESETS["quick"],
    name="night",
    purpose="the evidence: quick's scale on two data sets, with two objectives, at 1, 3 and 10 times the steps; a "
    "night on two CPU cores",
)


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ConfigError: no such preset; the nearest is named.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; {nearest(name, PRESETS)}")
    return PRESETS[name]


def tokenizer(preset: Preset, quantizer: dict[str, Any], seed: int = 0) -> TrainConfig:
    """The preset's autoencoder, data and schedule around any quantizer; micro-batches only where it can do with them.

    Args:
        preset: the scale; gives codebook_size and code_dim unless `quantizer` sets them.
        quantizer: fields of a quantizer config, `method` among them.
        seed: of weights and data order.
    """
    sizes = {"codebook_size": preset.codebook_size, "code_dim": preset.code_dim}
    fields = preset.fields | {"data": preset.data(), "quantizer": sizes | quantizer, "seed": seed}
    config = TrainConfig.parse(fields | {"accumulate": 1})
    micro_batches = preset.fields.get("accumulate", 1)
    if (
        micro_batches == 1 or config.quantizer.changes_in_forward
    ):  # what moves or draws in the forward pass takes the batch whole
        return config
    return config.with_fields(accumulate=micro_batches)


def transformer(preset: Preset, of: TrainConfig, changes: Mapping[str, Any], seed: int = 0) -> TransformerTrainConfig:
    """The preset's transformer on the tokens of a tokenizer, trained on the tokenizer's data.

    Args:
        preset: the scale.
        of: the tokenizer's config.
        changes: what is set otherwise, by dotted path.
        seed: of weights, data order and dropout.
    """
    config = TransformerTrainConfig.parse(
        {**preset.transformer, "tokenizer": of.to_json_dict(), "data": of.data.model_dump(), "seed": seed}
    )
    return config.with_fields(**changes) if changes else config


def scaled(config: TrainConfig, factors: Mapping[str, float]) -> TrainConfig:
    """A config with some of its numbers multiplied.

    Where `steps` is multiplied, the window of the averaged weights keeps its share of the run (`with_window`).

    Args:
        config: what to start from.
        factors: by dotted path; a whole number stays one, of at least 1, and other numbers keep six digits.
    """
    numbers = flatten(config.to_json_dict())
    products = {path: numbers[path] * factor for path, factor in factors.items()}
    values = {
        path: max(1, round(x)) if isinstance(numbers[path], int) else float(f"{x:.6g}") for path, x in products.items()
    }
    if values:
        config = config.with_fields(**values)
    return with_window(config, factors["steps"]) if "steps" in factors else config


def with_window(config: TrainConfig, factor: float) -> TrainConfig:
    """A config whose steps have been multiplied, with the window of the averaged weights at its share of the run:
    ema_decay ** (1 / factor), e.g. 0.98 at 300 steps, 0.96 at 150 and 0.998 at 3,000."""
    decay = config.optim.ema_decay ** (1 / factor)
    rounded = float(f"{decay:.6g}")  # to 1 where steps are millions
    return config if factor == 1 else config.with_fields(**{"optim.ema_decay": rounded if rounded < 1 else decay})
