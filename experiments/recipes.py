"""Recipes: functions that return a complete TrainConfig, and the presets that scale them. A preset changes scale, never the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ibq.config import TrainConfig, flatten, parse_train_config
from ibq.errors import ConfigError, nearest
from ibq.train_tokenizer import Runtime


@dataclass(frozen=True)
class Preset:
    """A scale: data, sizes and steps of every arm, what is watched, and what a step cost where it was measured."""

    name: str
    purpose: str
    fields: dict[str, Any]
    """The TrainConfig without its quantizer."""
    codebook_size: int
    code_dim: int
    runtime: Runtime
    projection: Literal["umap", "pca"] = "umap"
    seconds_per_step: float = 0.2
    measured_on: str = "2 cores of a server CPU, two runs at a time"
    max_seeds: int = 1_000_000
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
            runtime=Runtime(log_every=2, snapshots=3, checkpoint_every_s=0.5, eval_images=16, eval_batch_size=16),
            projection="pca",
            seconds_per_step=0.05,
            max_seeds=1,
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
            seconds_per_step=0.2,
        ),
        Preset(
            name="gpu",
            purpose="one GPU: the paper's default codebook (16,384 codes of dimension 256) on Fashion-MNIST",
            fields={
                "model": {"base_channels": 64, "channel_multipliers": [1, 2, 4], "norm_groups": 32, "z_channels": 256, "res_blocks": 2},
                "optim": {"lr": 4e-4, "ema_decay": 0.995},
                "steps": 4000,
                "batch_size": 256,
                "precision": "bf16",
            },
            codebook_size=16384,
            code_dim=256,
            runtime=Runtime(log_every=50, eval_images=10_000, eval_batch_size=500),
            seconds_per_step=0.1,
            measured_on="nothing yet: an estimate",
            max_codebook_size=2**18,
        ),
    )
}


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ConfigError: no such preset; the nearest is named.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; {nearest(name, PRESETS)}")
    return PRESETS[name]


def tokenizer(preset: Preset, quantizer: dict[str, Any], seed: int = 0) -> TrainConfig:
    """The preset's autoencoder, data and schedule around any quantizer.

    Args:
        preset: the scale; gives codebook_size and code_dim unless `quantizer` sets them.
        quantizer: fields of a quantizer config, `method` among them.
        seed: of weights and data order.
    """
    sizes = {"codebook_size": preset.codebook_size, "code_dim": preset.code_dim}
    return parse_train_config(preset.fields | {"quantizer": sizes | quantizer, "seed": seed})


def scaled(config: TrainConfig, factors: Mapping[str, float]) -> TrainConfig:
    """A config with some of its numbers multiplied.

    Where `steps` is multiplied by a share s, `optim.ema_decay` becomes ema_decay ** (1 / s): the window of the averaged weights keeps its
    share of the run, e.g. 0.98 at 300 steps and 0.96 at 150.

    Args:
        config: what to start from.
        factors: by dotted path; a whole number stays one, of at least 1, and other numbers keep six digits.
    """
    numbers = flatten(config.to_json_dict())
    products = {path: numbers[path] * factor for path, factor in factors.items()}
    if "steps" in factors:
        products["optim.ema_decay"] = numbers["optim.ema_decay"] ** (1 / factors["steps"])
    values = {path: max(1, round(x)) if isinstance(numbers[path], int) else float(f"{x:.6g}") for path, x in products.items()}
    return config.with_fields(**values) if values else config
