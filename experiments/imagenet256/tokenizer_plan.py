"""Cost of a tokenizer's recipe: sizes, schedule, estimated memory, and hours from measured throughput alone."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import vgg16

from experiments.benchmarks import tokenizer_training
from experiments.benchmarks.training_cell import RECIPE_OF
from ibq.config import IMAGENET_IMAGES, RunConfig, TrainConfig
from ibq.errors import ConfigError
from ibq.models.autoencoder import Decoder, Encoder
from ibq.models.discriminator import PatchDiscriminator
from ibq.models.tokenizer import Tokenizer
from ibq.training.optimizer import AUTOCAST

BASIS = (
    "counted, not measured: float32 weights, gradients, both moments of Adam and averaged weights, and the tensors "
    "that the backward pass "
    "of one micro-batch keeps; the allocator's own, workspaces, the quantizer's buffers and, on several GPUs, DDP's "
    "buckets come on top"
)


def plan(config: TrainConfig, gpus: int) -> list[tuple[str, str]]:
    """Summary of a recipe before it trains, as lines of a heading and a text.

    Args:
        config: the recipe.
        gpus: processes, each with a GPU of its own.

    Raises:
        ConfigError: a step's images cannot be cut into equal micro-batches on so many GPUs, or are more than ImageNet
            has.
    """
    images = images_at_a_time(config, gpus)
    memory = memory_gib(config, images)
    total = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
    quantizer, (transformer, discriminator) = config.quantizer, parameters(config)
    counted = f"{transformer:,} of the tokenizer" + (
        f", {discriminator:,} of the discriminator" if discriminator else ""
    )
    epochs = config.steps / (IMAGENET_IMAGES // config.batch_size)
    return [
        ("parameters", counted),
        (
            "tokens",
            f"{config.tokens_per_image} an image, of {quantizer.codebook_size:,} codes of dimension "
            f"{quantizer.code_dim}",
        ),
        (
            "schedule",
            f"{config.steps:,} steps of {config.batch_size} images: {epochs:.1f} epochs of ImageNet's "
            f"{IMAGENET_IMAGES:,}",
        ),
        ("a step", f"{config.accumulate} micro-batches of {images} images on each of {gpus} GPUs, {config.precision}"),
        ("memory", f"about {sum(memory.values()):.1f} GiB a GPU ({total}); {BASIS}"),
        ("hours", hours(config, gpus, tokenizer_training.known_rows())),
    ]


def images_at_a_time(config: RunConfig, gpus: int) -> int:
    """Images of a micro-batch on each of so many GPUs. Raises ConfigError as `plan`."""
    parts = gpus * config.accumulate
    if gpus < 1 or config.batch_size % parts:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be cut into {config.accumulate} micro-batches (accumulate) on each "
            f"of {gpus} GPUs; "
            f"choose GPUs and accumulate whose product divides it"
        )
    if config.batch_size > IMAGENET_IMAGES:
        raise ConfigError(
            f"batch_size={config.batch_size} exceeds the {IMAGENET_IMAGES:,} training images of ImageNet; lower it"
        )
    return config.batch_size // parts


def parameters(config: TrainConfig) -> tuple[int, int]:
    """Of the tokenizer, its codebook included, and of the discriminator (0 without one)."""
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
        discriminator = (
            PatchDiscriminator(config.loss.adversarial, config.data.channels)
            if config.loss.adversarial.weight
            else nn.Module()
        )
    transformer, adversary = (
        sum(parameter.numel() for parameter in network.parameters()) for network in (tokenizer, discriminator)
    )
    return transformer, adversary


def memory_gib(config: TrainConfig, images: int) -> dict[str, float]:
    """Estimated GiB by what needs them, with micro-batches of so many images on one device; `BASIS` says what is
    counted.

    The discriminator's own step keeps what two passes of it need, the transformer's what one needs and the perceptual
    network beside it; the autoencoder's activations are alive in both.
    """
    transformer, discriminator = parameters(config)
    shape = (images, config.data.channels, config.data.resolution, config.data.resolution)
    with FakeTensorMode():  # shapes alone: nothing is computed, no memory is needed
        encoder, decoder = (
            part(config.model, config.data.channels, config.data.resolution) for part in (Encoder, Decoder)
        )
        autoencoder = nn.Sequential(encoder, decoder)
        activations = kept_bytes(autoencoder, config.precision, torch.empty(shape))
        judges = 0
        if config.loss.perceptual == "lpips-vgg":
            network = vgg16().features.requires_grad_(False)
            judges = kept_bytes(network, config.precision, torch.empty(shape, requires_grad=True).expand(-1, 3, -1, -1))
        if discriminator:
            adversary = PatchDiscriminator(config.loss.adversarial, config.data.channels)
            a_pass = kept_bytes(adversary, config.precision, torch.empty(shape, requires_grad=True))
            judges = max(judges + a_pass, 2 * a_pass)
    sizes = {
        "weights, gradients, Adam and averages": 20 * transformer + 16 * discriminator,
        "activations of the autoencoder": activations,
    }
    sizes |= {"activations of perceptual network and discriminator": judges} if judges else {}
    return {name: size / 2**30 for name, size in sizes.items()}


def kept_bytes(network: Callable[..., object], precision: str, *inputs: torch.Tensor) -> int:
    """Bytes of the tensors that a pass keeps for its backward pass in a precision, the network's own weights left
    out."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not (isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)):  # or a view of one
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", AUTOCAST[precision], enabled=precision != "fp32"),
    ):
        network(*inputs)
    return sum(kept.values())


def hours(config: TrainConfig, gpus: int, rows: pd.DataFrame) -> str:
    """Hours on so many GPUs by the measured throughput that fits, or in words that there is none and how to measure.

    Args:
        rows: of the benchmark `tokenizer-training`; those count that trained this method, K and network size on a GPU
            at this resolution in this step: as many images a GPU, in as many micro-batches. The same precision is
            preferred; of another one it is said.
    """
    quantizer, images = config.quantizer, config.batch_size // gpus
    facts = {
        "status": "ok",
        "operator": "ours",
        "device": "cuda",
        "method": quantizer.method,
        "K": quantizer.codebook_size,
    }
    facts |= {
        "resolution": config.data.resolution,
        "parameters": parameters(config)[0],
        "batch": images,
        "accumulate": config.accumulate,
    }
    fitting = rows.reindex(columns=rows.columns.union([*facts]))  # a file may be older than a column
    for name, value in facts.items():
        fitting = fitting[fitting[name] == value]
    if fitting.empty:
        of = (
            f"--method {quantizer.method} --codes {quantizer.codebook_size} --batch {images} --accumulate "
            f"{config.accumulate}"
        )
        dtype = next(name for name, precision in tokenizer_training.PRECISIONS.items() if precision == config.precision)
        measured = quantizer.method in RECIPE_OF
        how = (
            f" (python -m experiments bench tokenizer-training {of} --dtype {dtype} on a GPU measures the recipe's)"
            if measured
            else ""
        )
        return f"not known: no GPU has been measured with this method, K and step{how}"
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    fitting = fitting[fitting["machine"] == here] if here in set(fitting["machine"]) else fitting
    same = fitting[fitting["precision"] == config.precision]
    fitting = fitting if same.empty else same
    best = fitting.loc[fitting["images_per_second"].idxmax()]
    seconds = config.steps * config.batch_size / best["images_per_second"] / gpus
    mode = f"{best['precision']}{f', where the recipe has {config.precision}' if same.empty else ''}, "
    mode += (
        f"{'compiled' if best['compiled'] else 'not compiled'}, {config.accumulate} micro-batches of "
        f"{images // config.accumulate}"
    )
    scaling = "" if gpus == 1 else f" on {gpus}, assuming linear scaling from"
    return (
        f"{seconds / 3600:,.0f}{scaling or ' on'} one {best['machine']}, measured at "
        f"{best['images_per_second']:.1f} images/s ({mode})"
    )
