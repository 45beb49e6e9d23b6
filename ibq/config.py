"""The configuration of one training run: frozen, typed, complete.

A run is identified by everything that changes its numbers (this config, the seed inside it, the content hash of its data and
RESULTS_VERSION) and by nothing else: device, paths, workers, log cadence and evaluation live in `Runtime` and never enter it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from ibq.errors import ConfigError, nearest, one_sentence
from ibq.quantizers.base import QuantizerConfig, parse_quantizer_config

RESULTS_VERSION = 3
"""Raised whenever a change of the code changes the numbers that a config would give."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


DATA_SETS = ("fashion-mnist", "photos")


class DataConfig(_Frozen):
    """Which images, at which size; `name` is one of DATA_SETS or "imagefolder:PATH" (`ibq.data.load_images` says how a folder is read)."""

    name: str = "fashion-mnist"
    resolution: int = Field(32, strict=True, ge=8, le=4096)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        kind, _, folder = name.partition(":")
        if kind == "imagefolder":
            if not folder.strip() or "\0" in folder:
                raise ValueError("a folder of images is written 'imagefolder:PATH', with the path of a folder")
            return f"imagefolder:{Path(folder).expanduser().absolute()}"  # trainers may run in another working directory
        if name not in DATA_SETS:
            raise ValueError(f"no data set has this name; {nearest(kind, (*DATA_SETS, 'imagefolder'))} (a folder is 'imagefolder:PATH')")
        return name

    @property
    def kind(self) -> str:
        """The name without a folder's path: "fashion-mnist", "photos" or "imagefolder"."""
        return self.name.partition(":")[0]

    @property
    def folder(self) -> str:
        """PATH of "imagefolder:PATH", absolute; empty for other data."""
        return self.name.partition(":")[2]

    @property
    def channels(self) -> int:
        return 1 if self.kind == "fashion-mnist" else 3


class AutoencoderConfig(_Frozen):
    """Size of the VQGAN encoder and decoder (PAPER section 5 has the paper's: 128, (1, 1, 2, 2, 4), 4 ResBlocks, z 256).

    The down-sampling factor is 2 ** (len(channel_multipliers) - 1).
    """

    base_channels: int = Field(16, strict=True, ge=1)
    channel_multipliers: tuple[int, ...] = Field((1, 2, 2), min_length=1)
    res_blocks: int = Field(1, strict=True, ge=1, description="ResBlocks a level in the encoder; the decoder has one more")
    attention_resolutions: tuple[int, ...] = ()
    z_channels: int = Field(32, strict=True, ge=1)
    norm_groups: int = Field(16, strict=True, ge=1)

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.channel_multipliers) - 1))

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> AutoencoderConfig:
        for multiplier in self.channel_multipliers:
            width = multiplier * self.base_channels
            if width < 1 or width % self.norm_groups:
                raise ValueError(
                    f"norm_groups={self.norm_groups} does not divide a level of {width} channels; choose norm_groups among the divisors of "
                    f"base_channels={self.base_channels}"
                )
        return self


class LossConfig(_Frozen):
    """The reconstruction term; the weights of the quantizer's own terms live in the quantizer's config."""

    pixel: Literal["l1", "l2"] = "l1"
    pixel_weight: float = Field(1.0, gt=0)


class OptimConfig(_Frozen):
    """Adam with a multi-step schedule; `milestones` are fractions of the run (the paper: epochs 250 and 300 of 330, each times 0.1)."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.5, 0.9)
    milestones: tuple[float, ...] = (250 / 330, 300 / 330)
    decay_factor: float = Field(0.1, gt=0, le=1)
    ema_decay: float = Field(0.98, ge=0, lt=1, description="decay per step of the averaged weights that are evaluated")

    @model_validator(mode="after")
    def _ranges(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both lie in [0, 1)")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m <= 1 for m in self.milestones):
            raise ValueError(f"milestones={self.milestones} must be ascending fractions of the run in (0, 1]")
        return self


class TrainConfig(_Frozen):
    """Everything that decides what a tokenizer's training run gives."""

    data: DataConfig = DataConfig()
    model: AutoencoderConfig = AutoencoderConfig()
    quantizer: Annotated[SerializeAsAny[QuantizerConfig], BeforeValidator(parse_quantizer_config)]
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = Field(300, strict=True, ge=1)
    batch_size: int = Field(32, strict=True, ge=1, description="images a step, over all processes")
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, strict=True, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainConfig:
        f = self.model.downsampling
        if self.data.resolution % f:
            raise ValueError(
                f"resolution={self.data.resolution} is not a multiple of the down-sampling factor {f}; choose a multiple of {f} "
                "or fewer levels in channel_multipliers"
            )
        levels = [self.data.resolution >> i for i in range(len(self.model.channel_multipliers))]
        if not set(self.model.attention_resolutions) <= set(levels):
            raise ValueError(f"attention_resolutions={self.model.attention_resolutions} must be among the levels' resolutions {levels}")
        return self

    @property
    def tokens_per_image(self) -> int:
        return (self.data.resolution // self.model.downsampling) ** 2

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished updates."""
        passed = sum(step >= math.ceil(fraction * self.steps - 1e-9) for fraction in self.optim.milestones)
        return self.optim.lr * self.optim.decay_factor**passed

    def to_json_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The fields that decide this run's numbers: all, but of a folder of images not the path (its content has a hash of its own)."""
        tree = self.to_json_dict()
        tree["data"]["name"] = self.data.kind
        return tree

    def run_id(self, data_hash: str) -> str:
        """Name of this run's directory: method, seed and a hash of all that decides its numbers."""
        identity = {"config": self.identity(), "data": data_hash, "results_version": RESULTS_VERSION}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.quantizer.method}-s{self.seed}-{digest}"

    def with_fields(self, **dotted: Any) -> TrainConfig:
        """A copy with fields set by dotted path, validated whole.

        Args:
            dotted: values by path, e.g. ``**{"quantizer.codebook_size": 4096, "steps": 100}``.

        Raises:
            ConfigError: a path names no field (the nearest valid path is given), or the result contradicts itself.
        """
        return parse_train_config(set_fields(self.to_json_dict(), dotted))


def set_fields(tree: dict[str, Any], dotted: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with existing leaves replaced by dotted path; a path that is not there is a ConfigError."""
    tree = json.loads(json.dumps(tree))
    for path, value in dotted.items():
        *parents, leaf = path.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
            raise ConfigError(f"there is no field {path!r}; {nearest(path, flatten(tree))}")
        node[leaf] = value
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to a flat one with dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def parse_train_config(tree: dict[str, Any]) -> TrainConfig:
    """Validate a nested dict into a TrainConfig; pydantic's report becomes one sentence (ConfigError)."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(one_sentence(error)) from None
