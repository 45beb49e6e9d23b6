"""Cost of a transformer's recipe: sizes, schedule, memory and compute by rules that are shown, and hours at an assumed
share of a GPU's peak, since no transformer has been measured.

Suffixes: B images of a micro-batch, S positions, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from experiments.imagenet256.tokenizer_plan import images_at_a_time, kept_bytes
from ibq.config import IMAGENET_IMAGES, TransformerTrainConfig
from ibq.losses import LARGEST_LOGITS, cross_entropy
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.models.transformer.blocks import rotation_table
from ibq.models.transformer.subtokens import Prediction
from ibq.training.optimizer import AUTOCAST

CARD, PEAKS, ASSUMED = "H100 SXM", {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}, 0.4
"""FLOP/s that its maker states, dense, in float32 with TF32 and without; and the share of them that hours are given
for."""
BASIS = (
    "counted, not measured: the allocator's own, workspaces and images come on top, and while it encodes what the "
    "tokenizer needs"
)


@dataclass(frozen=True)
class Costs:
    """Parameters, memory and FLOPs of a recipe, counted on shapes alone.

    Args:
        transformer, block, tokenizer: parameters: of the transformer, of one of its blocks, of the tokenizer.
        kept_a_block, kept_after: bytes that a block, and what follows the blocks, keeps of each image for the backward
            pass.
        copies: bytes of the weights in the precision of the products, kept as long.
        flops: of forward and backward pass of an image, a multiply-add counted as two.
        encoding_flops: of the tokenizer's encoder, of an image.
    """

    transformer: int
    block: int
    tokenizer: int
    kept_a_block: int
    kept_after: int
    copies: int
    flops: float
    encoding_flops: int


def plan(config: TransformerTrainConfig, gpus: int) -> list[tuple[str, str]]:
    """Summary of a recipe before it trains, as lines of a heading and a text.

    Args:
        config: the recipe.
        gpus: processes, each with a GPU of its own.

    Raises:
        ConfigError: a step's images cannot be cut into equal micro-batches on so many GPUs, or are more than ImageNet
            has.
    """
    images = images_at_a_time(config, gpus)
    costs = count(config, images)
    tokens, bits = config.tokens_per_image, config.model.subtoken_bits
    predicted = f", predicted in sub-tokens of {' and '.join(map(str, bits))} bits" if bits else ""
    in_all = f"{config.steps * config.batch_size * tokens / 1e9:,.1f} billion in all"
    return [
        (
            "parameters",
            f"{costs.transformer:,} of the transformer; {costs.tokenizer:,} of the tokenizer, which are not trained",
        ),
        ("tokens", f"{tokens} an image, of {config.quantizer.codebook_size:,} codes{predicted}; {in_all}"),
        ("schedule", _schedule(config)),
        ("a step", f"{config.accumulate} micro-batches of {images} images on each of {gpus} GPUs, {config.precision}"),
        ("memory", _memory(config, costs, images, gpus)),
        *(
            (sharding, _total(memory_gib(config, costs, images, gpus, sharding)))
            for sharding in (("ddp", "fsdp") if gpus > 1 else ("ddp",))
        ),
        ("compute", _compute(config, costs)),
        ("hours", hours(config, costs, gpus)),
    ]


# --- Counting ---------------------------------------------------------------------------------------------------------


def count(config: TransformerTrainConfig, images: int) -> Costs:
    """Costs with micro-batches of so many images."""
    side = config.data.resolution
    with torch.device("meta"), torch.no_grad():
        tokenizer = Tokenizer(config.tokenizer)
        with FlopCounterMode(display=False) as encoding:
            tokenizer.features(torch.empty(1, config.data.channels, side, side))
    with FakeTensorMode():  # nothing is computed, no memory is needed; other than meta tensors these know autocast
        transformer = Transformer(config.transformer_config)
        block, rotation_2SP = transformer.blocks[0], rotation_table(config.grid, torch.empty(0))[:, :-1]

        def inputs(B: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x_BSW = torch.empty(B, config.tokens_per_image, config.model.width, requires_grad=True)
            return (
                x_BSW,
                torch.empty(B, config.model.width, requires_grad=True),
                torch.zeros(x_BSW.shape[:2], dtype=torch.int64),
            )

        def through_block(x_BSW: torch.Tensor, condition_BW: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            out_BSW: torch.Tensor = block(x_BSW, condition_BW, rotation_2SP)
            return out_BSW.sum()

        def after_blocks(x_BSW: torch.Tensor, condition_BW: torch.Tensor, tokens_BS: torch.Tensor) -> list[Prediction]:
            return transformer.predictions(transformer.head_nm(x_BSW, condition_BW), tokens_BS)

        def loss(*given: torch.Tensor) -> torch.Tensor:
            return torch.stack([cross_entropy(*prediction) for prediction in after_blocks(*given)]).sum()

        of_block, of_rest = (
            [kept_bytes(part, config.precision, *inputs(B)) for B in (1, 2)] for part in (through_block, after_blocks)
        )
        depth = config.model.depth
        return Costs(
            transformer=_size(transformer),
            block=_size(block),
            tokenizer=_size(tokenizer),
            kept_a_block=of_block[1] - of_block[0],
            kept_after=of_rest[1] - of_rest[0],
            copies=depth * (2 * of_block[0] - of_block[1]) + 2 * of_rest[0] - of_rest[1],
            flops=depth * _flops(config, through_block, inputs(1)) + _flops(config, loss, inputs(images)) / images,
            encoding_flops=encoding.get_total_flops(),
        )


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _flops(config: TransformerTrainConfig, loss: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> int:
    """Of forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", AUTOCAST[config.precision], enabled=config.precision != "fp32"):
            value = loss(*inputs)
        value.backward()
    return counter.get_total_flops()


def memory_gib(config: TransformerTrainConfig, costs: Costs, images: int, gpus: int, sharding: str) -> dict[str, float]:
    """Estimated GiB of a GPU by what needs them, with micro-batches of so many images; the plan's line on memory has
    the rules."""
    state, depth = (20 if config.optim.ema_decay else 16) * costs.transformer, config.model.depth
    sizes = {"state": state + (4 * costs.transformer if gpus > 1 else 0)}
    if sharding == "fsdp":
        outside = costs.transformer - depth * costs.block
        sizes = {"state": state // gpus, "gathered": 8 * (outside + 2 * costs.block)}
    logits = min(LARGEST_LOGITS, images * config.tokens_per_image * max(config.transformer_config.symbols))
    sizes |= {"activations": images * (depth * costs.kept_a_block + costs.kept_after)}
    sizes |= {"copies": costs.copies} if config.precision != "fp32" else {}
    sizes |= {"logits": 8 * logits, "tokenizer": 4 * costs.tokenizer}
    return {name: size / 2**30 for name, size in sizes.items()}


def _total(sizes: dict[str, float]) -> str:
    return (
        f"about {sum(sizes.values()):.1f} GiB a GPU ({', '.join(f'{name} {gib:.2f}' for name, gib in sizes.items())})"
    )


# --- In words ---------------------------------------------------------------------------------------------------------


def _schedule(config: TransformerTrainConfig) -> str:
    optim, steps = config.optim, config.steps
    epochs = steps / (IMAGENET_IMAGES // config.batch_size)
    rising, resting = round(optim.warmup * steps), round(optim.plateau * steps)
    rate = (
        f"rises to {optim.lr:g} over {rising:,} steps, rests for {resting:,} and falls to "
        f"{optim.lr * optim.final_factor:g}"
    )
    return (
        f"{steps:,} steps of {config.batch_size} images: {epochs:.1f} epochs of ImageNet's {IMAGENET_IMAGES:,}; "
        f"the "
        f"rate {rate}"
    )


def _memory(config: TransformerTrainConfig, costs: Costs, images: int, gpus: int) -> str:
    """The rules."""
    held, average = (20, ", average") if config.optim.ema_decay else (16, "")
    copies = f"copies: the weights in {config.precision}; " if config.precision != "fp32" else ""
    several = (
        "; ddp 4 more, to send gradients, fsdp a share, and two blocks and what is outside blocks gathered"
        if gpus > 1
        else ""
    )
    a_block, after = (
        f"{costs.kept_a_block / config.tokens_per_image / 1024:.1f} KiB",
        f"{costs.kept_after / 2**20:.1f} MiB",
    )
    positions = f"{config.tokens_per_image} positions × {config.model.depth} blocks × {a_block}"
    return (
        f"state: {held} bytes a parameter (float32 weight, gradient, both moments of AdamW{average}){several}; "
        f"activations: {images} images × ({positions} + {after}); {copies}"
        f"logits: 8 bytes each, at most {LARGEST_LOGITS:,}; {BASIS}"
    )


def _compute(config: TransformerTrainConfig, costs: Costs) -> str:
    seen = config.steps * config.batch_size
    once = config.tokens == "cached"
    encoded = IMAGENET_IMAGES if once else seen
    when = "once for each, in float32" if once else "at every step anew, in TF32"
    return (
        f"{costs.flops / 1e9:,.1f} GFLOP an image, forward and backward (a multiply-add is two), "
        f"{seen * costs.flops:.2e} FLOP in all; "
        f"encoding {costs.encoding_flops / 1e9:,.1f} GFLOP an image, {when}, "
        f"{encoded * costs.encoding_flops:.2e} FLOP in all"
    )


def hours(config: TransformerTrainConfig, costs: Costs, gpus: int) -> str:
    """Hours on so many GPUs if the assumed share of the stated peak were reached; that this is no measurement comes
    first."""
    seen = config.steps * config.batch_size
    encoded, precision = (IMAGENET_IMAGES, "fp32") if config.tokens == "cached" else (seen, "tf32")
    training = seen * costs.flops / (ASSUMED * PEAKS[config.precision] * gpus) / 3600
    encoding = encoded * costs.encoding_flops / (ASSUMED * PEAKS[precision] * gpus) / 3600
    stated = (
        f"{PEAKS['bf16'] / 1e12:.0f} TFLOP/s in bfloat16 or float16, {PEAKS['tf32'] / 1e12:.0f} in TF32, "
        f"{PEAKS['fp32'] / 1e12:.0f} in float32"
    )
    return (
        f"not known: nothing is measured; at {ASSUMED:.0%} of what the maker of an {CARD} states ({stated}) it would "
        f"be "
        f"{training + encoding:,.0f} on {gpus}: {training:,.0f} for the transformer and {encoding:,.0f} for encoding"
    )
