"""The configuration of one transformer's run: its tokenizer, the transformer, and how that is trained (docs/method.md
section 6)."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ibq.config import RESULTS_VERSION, DataConfig, Frozen, TrainConfig, parse_train_config, set_fields, without_later
from ibq.errors import ConfigError, one_sentence
from ibq.models.transformer.config import TransformerConfig, TransformerDials
from ibq.quantizers.base import QuantizerConfig

TRANSFORMER_VERSION = 1
"""Raised whenever a change of the code changes the numbers that a transformer's config would give from the same
tokenizer."""


class AdamWConfig(Frozen):
    """AdamW, with weight decay on matrices alone. The learning rate rises linearly, rests on a plateau and falls
    linearly; the paper has 1e-4 for every 256 images of a batch, a warm-up over 6 epochs of 300, a plateau of 5%, and
    no averaged weights.
    """

    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the run over which the rate rises")
    plateau: float = Field(0.05, ge=0, lt=1, description="fraction of the run over which it then stays")
    final_factor: float = Field(0.1, ge=0, le=1, description="share of lr that the last step comes down to")
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient; None: as it is")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay per step of averaged weights, which are then the result; None: none"
    )

    @model_validator(mode="after")
    def _ranges(self) -> AdamWConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both lie in [0, 1)")
        if self.warmup + self.plateau > 1:
            raise ValueError(
                f"warmup={self.warmup} and plateau={self.plateau} are fractions of one run; let their sum be at most 1"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of the update that follows `step` finished updates of a run of `steps`."""
        rising = math.ceil(self.warmup * steps - 1e-9)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        rested = rising + math.ceil(self.plateau * steps - 1e-9)
        if step < rested:
            return self.lr
        return self.lr * (1 - (1 - self.final_factor) * (step + 1 - rested) / (steps - rested))


class TransformerTrainConfig(Frozen):
    """Everything that decides what a transformer's training run gives.

    A tokenizer is known by the config that it was trained from; where its weights come from elsewhere,
    `tokenizer_sha256` names them. The grid of tokens and K follow from it. With data.crop="center" every image is
    encoded once; with "random" each step encodes fresh squares.
    """

    tokenizer: TrainConfig
    tokenizer_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """`Tokenizer.digest` of the tokenizer's weights; empty: those that training `tokenizer` gives."""
    data: DataConfig
    transformer: TransformerDials = TransformerDials()
    classes: int = Field(10, strict=True, ge=1, description="labels of the data; 1 where it has none")
    optim: AdamWConfig = AdamWConfig()
    steps: int = Field(1000, strict=True, ge=1)
    batch_size: int = Field(64, strict=True, ge=1, description="images a step, over all processes")
    accumulate: int = Field(
        1, strict=True, ge=1, description="micro-batches that a step's images are cut into, to save memory"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, strict=True, ge=0)

    @model_validator(mode="after")
    def _parts_fit(self) -> TransformerTrainConfig:
        f, channels = self.tokenizer.model.downsampling, self.tokenizer.data.channels
        if self.data.resolution % f:
            raise ValueError(
                f"data.resolution={self.data.resolution} is not divided by the tokenizer's factor {f} into a grid of "
                f"tokens; "
                f"choose a multiple of {f}"
            )
        if self.data.channels != channels:
            raise ValueError(
                f"data.name={self.data.name!r} has {self.data.channels} channels and the tokenizer reads {channels}; "
                "choose data like the tokenizer's"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}; choose a divisor of "
                f"it"
            )
        self.transformer_config  # noqa: B018 (sub-tokens have to fit K)
        return self

    @property
    def quantizer(self) -> QuantizerConfig:
        """The tokenizer's."""
        return self.tokenizer.quantizer

    @property
    def grid(self) -> int:
        """Tokens a side of an image."""
        return self.data.resolution // self.tokenizer.model.downsampling

    @property
    def tokens_per_image(self) -> int:
        return self.grid**2

    @property
    def tokens(self) -> Literal["cached", "fresh"]:
        """Whether images are encoded once, or fresh squares of them at each step."""
        return "cached" if self.data.crop == "center" else "fresh"

    @property
    def transformer_config(self) -> TransformerConfig:
        sizes = {"codebook_size": self.quantizer.codebook_size, "classes": self.classes, "grid": self.grid}
        return TransformerConfig(**self.transformer.model_dump(), **sizes)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished updates."""
        return self.optim.rate(step, self.steps)

    def to_json_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The fields that decide this run's numbers: all, but of a folder of images not the path."""
        tree = self.to_json_dict() | {"tokenizer": self.tokenizer.identity()}
        tree["data"]["name"] = self.data.kind
        return tree

    def run_id(self, data_hash: str) -> str:
        """Name of this run's directory: method, seed and a hash of all that decides its numbers."""
        fields = without_later(self, self.identity())
        versions = {"results_version": RESULTS_VERSION, "generator_version": TRANSFORMER_VERSION}
        identity = {"config": fields, "data": data_hash} | versions
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return f"gen-{self.quantizer.method}-s{self.seed}-{digest}"

    def with_fields(self, **dotted: Any) -> TransformerTrainConfig:
        """A copy with fields set by dotted path (those of the tokenizer begin with `tokenizer.`), validated whole.

        Raises:
            ConfigError: a path names no field (the nearest valid path is given), or the result contradicts itself.
        """
        return parse_transformer_config(set_fields(self.to_json_dict(), dotted))


RunConfig = TrainConfig | TransformerTrainConfig
"""What a run directory may be of."""


def parse_transformer_config(tree: dict[str, Any]) -> TransformerTrainConfig:
    """Validate a nested dict into a TransformerTrainConfig; pydantic's report becomes one sentence (ConfigError)."""
    try:
        return TransformerTrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(one_sentence(error)) from None


def parse_run_config(tree: dict[str, Any]) -> RunConfig:
    """The config of either stage: a transformer's is the one with a transformer."""
    return (
        parse_transformer_config(tree) if isinstance(tree, dict) and "transformer" in tree else parse_train_config(tree)
    )
