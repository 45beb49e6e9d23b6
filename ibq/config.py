"""The configuration of one training run: frozen, typed, complete.

A run is identified by everything that changes its numbers (this config, the seed inside it, the content hash of its
data and RESULTS_VERSION) and by nothing else: device, paths, workers, log cadence and evaluation live in `Runtime` and
never enter it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from ibq.errors import ConfigError, nearest, one_sentence
from ibq.quantizers.base import QuantizerConfig, parse_quantizer_config

RESULTS_VERSION = 3
"""Raised whenever a change of the code changes the numbers that a config would give."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _later(default: Any, **constraints: Any) -> Any:
    """A field that came when runs existed already. Its default is what was done before, and stays out of a run's id:
    what is finished under that id is still the run that the config describes."""
    return Field(default, json_schema_extra={"later": True}, **constraints)


DATA_SETS = ("fashion-mnist", "photos")


class DataConfig(Frozen):
    """Which images, at which size; `name` is one of DATA_SETS or "imagefolder:PATH" (`ibq.data.load_images` says how a
    folder is read)."""

    name: str = "fashion-mnist"
    resolution: int = Field(32, strict=True, ge=8, le=4096)
    crop: Literal["center", "random"] = _later("center")
    """Of training images: the centre square of each, held in memory; or a fresh random square each time, read from the
    folder (docs/method.md section 5)."""
    flip: bool = _later(False, strict=True)
    """Mirror every other training image, drawn at random; needs crop="random" (the released recipe does not flip)."""

    @model_validator(mode="after")
    def _random_crops_are_of_folders(self) -> DataConfig:
        if self.crop == "random" and self.kind != "imagefolder":
            raise ValueError(
                f"crop='random' reads images of a folder, and {self.name} comes in one size; set crop='center' or a "
                f"folder"
            )
        if self.flip and self.crop != "random":
            raise ValueError(
                f"flip=True goes with crop='random', and crop is {self.crop!r}; set flip=False or crop='random'"
            )
        return self

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        kind, _, folder = name.partition(":")
        if kind == "imagefolder":
            if not folder.strip() or "\0" in folder:
                raise ValueError("a folder of images is written 'imagefolder:PATH', with the path of a folder")
            return (
                f"imagefolder:{Path(folder).expanduser().absolute()}"  # trainers may run in another working directory
            )
        if name not in DATA_SETS:
            raise ValueError(
                f"no data set has this name; {nearest(kind, (*DATA_SETS, 'imagefolder'))} (a folder is "
                f"'imagefolder:PATH')"
            )
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


class AutoencoderConfig(Frozen):
    """Size of the VQGAN encoder and decoder (docs/method.md section 5 has the paper's: 128, (1, 1, 2, 2, 4), 4
    ResBlocks, z 256).

    The down-sampling factor is 2 ** (len(channel_multipliers) - 1).
    """

    base_channels: int = Field(16, strict=True, ge=1)
    channel_multipliers: tuple[int, ...] = Field((1, 2, 2), min_length=1)
    res_blocks: int = Field(
        1, strict=True, ge=1, description="ResBlocks a level in the encoder; the decoder has one more"
    )
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
                    f"norm_groups={self.norm_groups} does not divide a level of {width} channels; choose norm_groups "
                    f"among the divisors of "
                    f"base_channels={self.base_channels}"
                )
        return self


DISCRIMINATOR_GROUPS = 8
LEAST_PATCHES = 3
"""Pixels a side that a discriminator's strided layers must leave, since the two layers after them take one each."""


class AdversarialConfig(Frozen):
    """The PatchGAN discriminator and its part in the loss (docs/method.md section 4); weight 0: there is none.

    The discriminator takes the generator's learning rate, schedule, betas and clipping.
    """

    weight: float = Field(0.0, ge=0, description="of the generator's term; the paper: 0.1")
    adaptive: bool = Field(False, strict=True)
    """VQGAN's weight: `weight` times |gradient of pixel and perceptual terms| / |gradient of the adversarial term| at
    the decoder's last layer, instead of `weight` alone."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    start: float = Field(
        0.0, ge=0, lt=1, description="fraction of the run after which discriminator and generator's term begin"
    )
    lecam_weight: float = Field(0.05, ge=0)
    lecam_decay: float = Field(
        0.999, ge=0, lt=1, description="of the averages of the logits that LeCam compares with, a step"
    )
    channels: int = Field(64, strict=True, ge=1, description="of the first layer; doubled a layer up to eightfold")
    layers: int = Field(3, strict=True, ge=1, le=6, description="of stride 2")
    norm: Literal["batch", "group", "none"] = "batch"

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> AdversarialConfig:
        changed = [
            name for name, field in AdversarialConfig.model_fields.items() if getattr(self, name) != field.default
        ]
        if changed and not self.weight:
            value = getattr(self, changed[0])
            raise ValueError(
                f"{changed[0]}={value!r} has no effect with weight=0.0; set loss.adversarial.weight, e.g. to 0.1, or "
                f"leave it out"
            )
        if self.norm == "group" and (2 * self.channels) % DISCRIMINATOR_GROUPS:
            raise ValueError(
                f"norm='group' has {DISCRIMINATOR_GROUPS} groups, which do not divide {2 * self.channels} channels; "
                f"choose channels={self.channels} as a multiple of {DISCRIMINATOR_GROUPS // 2}"
            )
        return self


class LossConfig(Frozen):
    """The terms on the reconstruction; the weights of the quantizer's own terms live in the quantizer's config."""

    pixel: Literal["l1", "l2"] = "l1"
    pixel_weight: float = Field(1.0, gt=0)
    perceptual: Literal["none", "lpips-vgg", "fashion-cnn"] = _later("none")
    """LPIPS on VGG-16 (the paper), or a stand-in in the features of fashion-cnn, which knows Fashion-MNIST and bears
    its own name."""
    perceptual_weight: float = _later(1.0, gt=0)
    adversarial: AdversarialConfig = _later(AdversarialConfig())

    @model_validator(mode="after")
    def _no_weight_is_idle(self) -> LossConfig:
        if self.perceptual == "none" and self.perceptual_weight != 1:
            raise ValueError(
                f"perceptual_weight={self.perceptual_weight} has no effect with perceptual='none'; set loss.perceptual"
            )
        return self


class OptimConfig(Frozen):
    """Adam, and how the learning rate goes: from 0 up over `warmup`, then in steps ("multi-step") or along half a
    cosine ("cosine").

    `milestones` are fractions of the run (the paper: epochs 250 and 300 of 330, each times 0.1).
    """

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.5, 0.9)
    schedule: Literal["multi-step", "cosine"] = _later("multi-step")
    milestones: tuple[float, ...] = (250 / 330, 300 / 330)
    decay_factor: float = Field(0.1, gt=0, le=1)
    final_factor: float = _later(0.0, ge=0, le=1, description="share of lr that a cosine ends at")
    warmup: float = _later(0.0, ge=0, lt=1, description="fraction of the run over which the rate rises linearly")
    clip_norm: float | None = _later(None, gt=0, description="largest norm of the gradient; None: as it is")
    ema_decay: float = Field(0.98, ge=0, lt=1, description="decay per step of the averaged weights that are evaluated")

    @model_validator(mode="after")
    def _ranges(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both lie in [0, 1)")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m <= 1 for m in self.milestones):
            raise ValueError(f"milestones={self.milestones} must be ascending fractions of the run in (0, 1]")
        if self.final_factor and self.schedule != "cosine":
            raise ValueError(
                f"final_factor={self.final_factor} is where a cosine ends; set schedule='cosine' or leave it out"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of the update that follows `step` finished updates of a run of `steps`."""
        rising = math.ceil(self.warmup * steps - 1e-9)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        if self.schedule == "cosine":
            progress = (step - rising) / max(1, steps - rising)
            return self.lr * (self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * progress)) / 2)
        passed = sum(step >= math.ceil(fraction * steps - 1e-9) for fraction in self.milestones)
        return self.lr * self.decay_factor**passed


class TrainConfig(Frozen):
    """Everything that decides what a tokenizer's training run gives."""

    data: DataConfig = DataConfig()
    model: AutoencoderConfig = AutoencoderConfig()
    quantizer: Annotated[SerializeAsAny[QuantizerConfig], BeforeValidator(parse_quantizer_config)]
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = Field(300, strict=True, ge=1)
    batch_size: int = Field(32, strict=True, ge=1, description="images a step, over all processes")
    accumulate: int = _later(1, strict=True, ge=1)
    """Micro-batches that a step's images are cut into, one after the other, to save memory. Means over tokens or images
    are then of a micro-batch: the codebook's entropy cannot exceed the logarithm of its tokens, and adaptive weight and
    batch norm see it alone. With a discriminator a micro-batch goes through the tokenizer twice, the first time in
    evaluation mode: quantizers that change or draw in their forward pass are therefore refused."""
    averages: Literal["global", "local"] = _later("global")
    """With several processes: the mean assignment of the entropy penalty and LeCam's averages are of all of them, or
    each process has its own (as released; the result then depends on their number)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(0, strict=True, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainConfig:
        f = self.model.downsampling
        if self.data.resolution % f:
            raise ValueError(
                f"resolution={self.data.resolution} is not a multiple of the down-sampling factor {f}; choose a "
                f"multiple of {f} "
                "or fewer levels in channel_multipliers"
            )
        levels = [self.data.resolution >> i for i in range(len(self.model.channel_multipliers))]
        if not set(self.model.attention_resolutions) <= set(levels):
            raise ValueError(
                f"attention_resolutions={self.model.attention_resolutions} must be among the levels' resolutions "
                f"{levels}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}; choose a divisor of "
                f"it"
            )
        if self.accumulate > 1 and self.quantizer.changes_in_forward:
            raise ValueError(
                f"accumulate={self.accumulate} would move what method={self.quantizer.method!r} changes or draws in "
                f"its forward pass "
                f"{self.accumulate} times a step; set accumulate=1, or take moving averages, restarts and noise away"
            )
        layers = self.loss.adversarial.layers
        if self.loss.adversarial.weight and self.data.resolution >> layers < LEAST_PATCHES:
            raise ValueError(
                f"loss.adversarial.layers={layers} halve resolution={self.data.resolution} to "
                f"{self.data.resolution >> layers}, and "
                f"{LEAST_PATCHES} pixels are the least; choose fewer layers"
            )
        if self.loss.perceptual == "fashion-cnn" and self.data.kind != "fashion-mnist":
            raise ValueError(
                f"loss.perceptual='fashion-cnn' knows Fashion-MNIST, not {self.data.kind}; use 'lpips-vgg' or 'none'"
            )
        if self.loss.perceptual == "lpips-vgg" and self.data.resolution < 32:
            raise ValueError(
                f"loss.perceptual='lpips-vgg' reads 32 pixels a side or more, not resolution={self.data.resolution}"
            )
        return self

    @property
    def tokens_per_image(self) -> int:
        return (self.data.resolution // self.model.downsampling) ** 2

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished updates."""
        return self.optim.rate(step, self.steps)

    @property
    def adversarial_start(self) -> int:
        """Finished updates after which the discriminator begins, where there is one."""
        return min(round(self.loss.adversarial.start * self.steps), self.steps - 1)

    def to_json_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The fields that decide this run's numbers: all, but of a folder of images not the path (its content has a
        hash of its own)."""
        tree = self.to_json_dict()
        tree["data"]["name"] = self.data.kind
        return tree

    def run_id(self, data_hash: str) -> str:
        """Name of this run's directory: method, seed and a hash of all that decides its numbers."""
        fields = without_later(self, self.identity())
        identity = {"config": fields, "data": data_hash, "results_version": RESULTS_VERSION}
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


def without_later(model: BaseModel, tree: dict[str, Any]) -> dict[str, Any]:
    """A model's dump without the later fields that are at their default."""
    kept = {}
    for name, info in type(model).model_fields.items():
        value, extra = getattr(model, name), info.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("later") and value == info.default):
            kept[name] = without_later(value, tree[name]) if isinstance(value, BaseModel) else tree[name]
    return kept


def set_fields(tree: dict[str, Any], dotted: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with existing leaves replaced by dotted path; a path that is not there is a
    ConfigError."""
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
