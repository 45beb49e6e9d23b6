"""Every config of a run, and its id: frozen, typed, complete.

A run is identified by everything that changes its numbers (its config, the seed inside it, the content hash of its data
and RESULTS_VERSION) and by nothing else: device, paths, workers, log cadence and evaluation live in `Runtime` and never
enter it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from ibq.errors import nearest
from ibq.models.config import LEAST_PATCHES, AdversarialConfig, AutoencoderConfig, TransformerConfig, TransformerDials
from ibq.plugins import plugin_of
from ibq.schema import Frozen, QuantizerConfig, Resize
from ibq.training.config import AdamWConfig, OptimConfig

RESULTS_VERSION = 4
"""Raised whenever a change of the code changes the numbers that a config would give."""
TRANSFORMER_VERSION = 1
"""Raised whenever a change of the code changes the numbers that a transformer's config would give from the same
tokenizer."""

DATA_SETS = {"fashion-mnist": 1, "landscapes": 3, "photos": 3}
"""Channels of each data set; `ibq.data.LOADERS` has the rest, apart from here, since configs do without torch."""


class DataConfig(Frozen):
    """Images and their size; `name` is one of DATA_SETS or "imagefolder:PATH" (`ibq.data.load_images` says how a
    folder is read)."""

    name: str = "fashion-mnist"
    resolution: int = Field(32, strict=True, ge=8, le=4096)
    crop: Literal["center", "random"] = "center"
    """Of training images: the centre square of each, held in memory; or a fresh random square each time, read from the
    folder (docs/method.md section 5)."""
    flip: bool = Field(False, strict=True)
    """Mirror every other training image, drawn at random; needs crop="random" (the released recipe does not flip)."""
    resize: Resize = "antialiased"
    """Of a folder's images; the paper's recipes and the released checkpoints have "released"."""

    @model_validator(mode="after")
    def _random_crops_are_of_folders(self) -> DataConfig:
        if self.resize == "released" and self.kind != "imagefolder":
            raise ValueError(
                f"resize='released' scales images of a folder, and {self.name} comes in one size; leave it out or name "
                f"a folder"
            )
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
        """The name without a folder's path: one of DATA_SETS or "imagefolder"."""
        return self.name.partition(":")[0]

    @property
    def folder(self) -> str:
        """PATH of "imagefolder:PATH", absolute; empty for other data."""
        return self.name.partition(":")[2]

    @property
    def channels(self) -> int:
        return DATA_SETS.get(self.kind, 3)


class LossConfig(Frozen):
    """The terms on the reconstruction; the weights of the quantizer's own terms live in the quantizer's config."""

    pixel: Literal["l1", "l2"] = "l1"
    pixel_weight: float = Field(1.0, gt=0)
    perceptual: Literal["none", "lpips-vgg", "fashion-cnn", "efficientnet-lite0"] = "none"
    """LPIPS on VGG-16 (the paper), or a stand-in that bears its own name: in the features of fashion-cnn, which knows
    Fashion-MNIST, or of efficientnet-lite0, which knows photographs."""
    perceptual_weight: float = Field(1.0, gt=0)
    adversarial: AdversarialConfig = AdversarialConfig()

    @model_validator(mode="after")
    def _no_weight_is_idle(self) -> LossConfig:
        if self.perceptual == "none" and self.perceptual_weight != 1:
            raise ValueError(
                f"perceptual_weight={self.perceptual_weight} has no effect with perceptual='none'; set loss.perceptual"
            )
        return self


def _parse_quantizer(value: Any) -> QuantizerConfig:
    from ibq.quantizers import parse_quantizer_config  # imports torch, which listing recipes does without

    return parse_quantizer_config(value)


class _RunConfig(Frozen):
    """Learning rate, identity and id, which the configs of both stages share."""

    id_prefix: ClassVar[str] = ""
    versions: ClassVar[dict[str, int]] = {}

    def lr_at(self: Any, step: int) -> float:
        """Learning rate of the update that follows `step` finished updates."""
        rate: float = self.optim.rate(step, self.steps)
        return rate

    def identity(self: Any) -> dict[str, Any]:
        """The fields that decide this run's numbers: all, but of a folder of images not the path (its content has a
        hash of its own)."""
        tree: dict[str, Any] = self.to_json_dict()
        tree["data"]["name"] = self.data.kind
        return tree

    def run_id(self: Any, data_hash: str) -> str:
        """Name of this run's directory: method, seed and a hash of all that decides its numbers."""
        identity = {"config": self.identity(), "data": data_hash, "results_version": RESULTS_VERSION} | self.versions
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.id_prefix}{self.quantizer.method}-s{self.seed}-{digest}"


class TrainConfig(_RunConfig):
    """Everything that decides what a tokenizer's training run gives."""

    data: DataConfig = DataConfig()
    model: AutoencoderConfig = AutoencoderConfig()
    quantizer: Annotated[SerializeAsAny[QuantizerConfig], BeforeValidator(_parse_quantizer)]
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = Field(300, strict=True, ge=1)
    quantize_from: float = Field(0.0, ge=0, lt=1, description="late quantization: share of the run without a quantizer")
    """Until then the decoder gets the features themselves, and the quantizer has neither tokens nor losses. Codes that
    are learnt then begin as the k-means of features (arXiv 2605.06870, 2603.17052)."""
    batch_size: int = Field(32, strict=True, ge=1, description="images a step, over all processes")
    accumulate: int = Field(1, strict=True, ge=1)
    """Micro-batches that a step's images are cut into, one after the other, to save memory. Means over tokens or images
    are then of a micro-batch: the codebook's entropy cannot exceed the logarithm of its tokens, and adaptive weight and
    batch norm see it alone. With a discriminator a micro-batch goes through the tokenizer twice, the first time in
    evaluation mode: quantizers that change or draw in their forward pass are therefore refused."""
    averages: Literal["global", "local"] = "global"
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
                f"loss.perceptual='fashion-cnn' knows Fashion-MNIST, not {self.data.kind}; use "
                f"'efficientnet-lite0', 'lpips-vgg' or 'none'"
            )
        if self.loss.perceptual in ("lpips-vgg", "efficientnet-lite0") and self.data.resolution < 32:
            raise ValueError(
                f"loss.perceptual={self.loss.perceptual!r} reads 32 pixels a side or more, not "
                f"resolution={self.data.resolution}"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """As of every run, and the hash of the plugin's source where the quantizer is a plugin's."""
        plugin = plugin_of(self.quantizer.method)
        return super().identity() | ({"plugin_sha256": plugin.sha256} if plugin else {})

    @property
    def tokens_per_image(self) -> int:
        return (self.data.resolution // self.model.downsampling) ** 2

    @property
    def quantize_start(self) -> int:
        """Finished updates after which the quantizer begins."""
        return min(round(self.quantize_from * self.steps), self.steps - 1)

    @property
    def adversarial_start(self) -> int:
        """Finished updates after which the discriminator begins, where there is one."""
        return min(round(self.loss.adversarial.start * self.steps), self.steps - 1)


class TransformerTrainConfig(_RunConfig):
    """Everything that decides what a transformer's training run gives.

    A tokenizer is known by the config that it was trained from; where its weights come from elsewhere,
    `tokenizer_sha256` names them. The grid of tokens and K follow from it. With data.crop="center" every image is
    encoded once; with "random" each step encodes fresh squares.
    """

    id_prefix: ClassVar[str] = "transformer-"
    versions: ClassVar[dict[str, int]] = {"transformer_version": TRANSFORMER_VERSION}

    tokenizer: TrainConfig
    tokenizer_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """`Tokenizer.digest` of the tokenizer's weights; empty: those that training `tokenizer` gives."""
    data: DataConfig
    model: TransformerDials = TransformerDials()
    classes: int = Field(10, strict=True, ge=1, description="labels of the data; 1 where it has none")
    optim: AdamWConfig = AdamWConfig()
    steps: int = Field(1000, strict=True, ge=1)
    batch_size: int = Field(64, strict=True, ge=1, description="images a step, over all processes")
    accumulate: int = Field(
        1, strict=True, ge=1, description="micro-batches that a step's images are cut into, to save memory"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
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
        """ "cached" if images are encoded once, "fresh" if squares of them are at each step."""
        return "cached" if self.data.crop == "center" else "fresh"

    @property
    def transformer_config(self) -> TransformerConfig:
        sizes = {"codebook_size": self.quantizer.codebook_size, "classes": self.classes, "grid": self.grid}
        return TransformerConfig(**self.model.model_dump(), **sizes)

    def identity(self) -> dict[str, Any]:
        """As of a tokenizer's config, and its tokenizer's too."""
        return super().identity() | {"tokenizer": self.tokenizer.identity()}


RunConfig = TrainConfig | TransformerTrainConfig
"""The config of a run directory, of either stage."""


def parse_run_config(tree: Any) -> RunConfig:
    """The config of either stage: a transformer's is the one with a tokenizer (ConfigError, one sentence)."""
    stage = TransformerTrainConfig if isinstance(tree, dict) and "tokenizer" in tree else TrainConfig
    return stage.parse(tree)


IMAGENET_IMAGES = 1_281_167
"""Training images of ILSVRC 2012, the unit of the paper's schedules."""


def imagenet_steps(epochs: int, batch_size: int = 256) -> int:
    """Training steps of so many passes over ImageNet; the last images of a pass, too few for a batch, are left out of
    it."""
    return epochs * (IMAGENET_IMAGES // batch_size)
