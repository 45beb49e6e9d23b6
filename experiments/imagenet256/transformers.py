"""The paper's transformers on ImageNet 256×256: a function each, which returns the complete config of its training.

All take docs/method.md section 6: batches of 768 images, AdamW at 3e-4 (1e-4 for every 256 images), the gradient
clipped at 1.0, dropouts of 0.1, no averaged weights, tokens of fresh random crops at every step. The rate rises over 2%
of the run, which of 300, 350, 400 and 450 epochs are 6, 7, 8 and 9, as the released code has 6 to 9; it rests for 5%
and falls linearly to 0.1 of itself (B, L) or 0.01 (XL, XXL). Weight decay is 0.05 on all parameters, norms and biases
among them, as the released loop sets it; XXL's rises to 0.08 along a cosine. (--set optim.decayed=matrices: on matrices
alone.) bfloat16 is ours: the released runs are in float16 autocast with a scaled loss, which --set precision=fp16
trains; docs/method.md section 10 has the reason.

A recipe takes the config of any tokenizer; without one it is that of the released transformers. `train` wants the
weights too (--tokenizer), ties the run to them, and trains on any data (--data). On 8 GPUs each has 96 images a step,
in as many micro-batches (`accumulate`) as let them fit 80 GB by the estimate of the plan; of the numbers these change
nothing but rounding and what dropout draws.

What a recipe costs in memory and compute: python -m experiments plan RECIPE.

Expected numbers are those of docs/method.md section 7, of 50,000 samples at the temperature and guidance that are said
with them. The evaluation after training samples at temperature 1; python -m ibq.cli.sample takes both. Nothing here has
been trained at this scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.imagenet256.tokenizers import imagenet256_ibq_16384, imagenet256_lfq_16384, imagenet256_lfq_262144
from experiments.recipes import get_preset, imagenet_data, transformer
from ibq.config import TrainConfig, TransformerTrainConfig, imagenet_steps
from ibq.models.config import SIZES

BATCH = 768


def _transformer(size: str, epochs: int, tokenizer: TrainConfig, **changes: Any) -> TransformerTrainConfig:
    data = {f"data.{name}": value for name, value in imagenet_data().items()}
    sizes = {"model.depth": SIZES[size], "steps": imagenet_steps(epochs, BATCH), "batch_size": BATCH}
    return transformer(get_preset("paper"), tokenizer, data | sizes | changes)


def imagenet256_transformer_b(tokenizer: TrainConfig | None = None) -> TransformerTrainConfig:
    """B: 16 blocks of width 1,024, on the tokens of IBQ with 16,384 codes.

    Claim: on IBQ's tokens the smallest transformer of Table 7 has a lower gFID than Open-MAGVIT2's of the same size
        (2.88 against 3.08).
    Cost: 500,400 steps of 768 images (300 epochs), 343.0 M parameters.
    Expected: gFID 2.88, IS 254.73 at temperature 1.10, guidance 2.25.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_transformer_b --tokenizer TOKENIZER --data
        IMAGENET
    """
    return _transformer("B", 300, tokenizer or imagenet256_ibq_16384())


def imagenet256_transformer_l(tokenizer: TrainConfig | None = None) -> TransformerTrainConfig:
    """L: 20 blocks of width 1,280, on the tokens of IBQ with 16,384 codes.

    Claim: the deeper the transformer the lower the gFID (Table 7); the second of four.
    Cost: 583,800 steps of 768 images (350 epochs), 649.6 M parameters.
    Expected: gFID 2.45, IS 267.48 at temperature 1.00, guidance 2.00.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_transformer_l --tokenizer TOKENIZER --data
        IMAGENET
    """
    return _transformer("L", 350, tokenizer or imagenet256_ibq_16384())


def imagenet256_transformer_xl(tokenizer: TrainConfig | None = None) -> TransformerTrainConfig:
    """XL: 24 blocks of width 1,536, on the tokens of IBQ with 16,384 codes.

    Claim: the deeper the transformer the lower the gFID (Table 7); the third of four.
    Cost: 667,200 steps of 768 images (400 epochs), 1,076.1 M parameters.
    Expected: gFID 2.14, IS 278.99 at temperature 1.15, guidance 2.35.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_transformer_xl --tokenizer TOKENIZER --data
        IMAGENET
    """
    return _transformer(
        "XL", 400, tokenizer or imagenet256_ibq_16384(), **{"optim.final_factor": 0.01, "accumulate": 2}
    )


def imagenet256_transformer_xxl(tokenizer: TrainConfig | None = None) -> TransformerTrainConfig:
    """XXL: 30 blocks of width 1,920, on the tokens of IBQ with 16,384 codes; weight decay from 0.05 to 0.08.

    Claim: the deepest transformer of Table 7 has the lowest gFID and the highest IS of the four.
    Cost: 750,600 steps of 768 images (450 epochs), 2,063.3 M parameters.
    Expected: gFID 2.05, IS 286.73 at temperature 1.20, guidance 2.85.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_transformer_xxl --tokenizer TOKENIZER --data
        IMAGENET
    """
    return _transformer(
        "XXL",
        450,
        tokenizer or imagenet256_ibq_16384(),
        **{"optim.final_factor": 0.01, "optim.final_weight_decay": 0.08, "accumulate": 4},
    )


def imagenet256_transformer_b_lfq_16384(tokenizer: TrainConfig | None = None) -> TransformerTrainConfig:
    """B on the tokens of LFQ with 16,384 codes, a token predicted whole.

    Claim: with as many codes and the same transformer, without factorized tokens, IBQ generates better than LFQ (Table
        5).
    Cost: 500,400 steps of 768 images (300 epochs), 343.0 M parameters.
    Expected: not reported.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_transformer_b_lfq_16384 --tokenizer TOKENIZER
        --data IMAGENET
    """
    return _transformer("B", 300, tokenizer or imagenet256_lfq_16384())


def imagenet256_transformer_b_lfq_262144(tokenizer: TrainConfig | None = None) -> TransformerTrainConfig:
    """B on the tokens of LFQ with 262,144 codes, a token predicted in sub-tokens of 6 and 12 bits, as Open-MAGVIT2 has
    them.

    Not Open-MAGVIT2, whose tokenizer and transformer differ.

    Claim: sub-tokens make a transformer over 2^18 codes nearly as small as one over 16,384 (tokens predicted whole:
        846.3 M parameters).
    Cost: 500,400 steps of 768 images (300 epochs), 358.4 M parameters.
    Expected: not reported; Open-MAGVIT2 itself, with 343 M parameters, gFID 3.08, IS 258.26.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_transformer_b_lfq_262144 --tokenizer TOKENIZER
        --data IMAGENET
    """
    return _transformer("B", 300, tokenizer or imagenet256_lfq_262144(), **{"model.subtoken_bits": [6, 12]})


TRANSFORMERS: dict[str, Callable[..., TransformerTrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        imagenet256_transformer_b,
        imagenet256_transformer_l,
        imagenet256_transformer_xl,
        imagenet256_transformer_xxl,
        imagenet256_transformer_b_lfq_16384,
        imagenet256_transformer_b_lfq_262144,
    )
}
