"""The paper's tokenizers on ImageNet 256×256: a function each, which returns the complete config of its training.

All take docs/method.md sections 4 and 5: the VQGAN autoencoder with 4 ResBlocks a level, L1, LPIPS and a PatchGAN with
LeCam, batches of 256 for 330 epochs, float16 autocast. What they differ in is said at each.

Means are local, as released (`averages="local"`): the mean assignment of the entropy penalty is over 4 images of one
GPU, and so are the statistics of the discriminator's BatchNorm. The commands here give each of 8 GPUs 32 images a step,
in 8 micro-batches of 4 (`accumulate=8`); on other numbers of GPUs choose `accumulate` so that 256 / GPUs / accumulate
stays 4, e.g. --set accumulate=1 on 64, which also saves the second forward pass that micro-batches need
(`ibq.training.tokenizer`).

What a recipe costs in memory and hours: python -m experiments plan RECIPE.

Logits and entropies are float32 inside autocast, where the released code has float16 (docs/method.md section 4).
Expected numbers are those of docs/method.md section 7, on 50,000 validation images; nothing here has been trained at
this scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.recipes import get_preset, tokenizer
from ibq.config import TrainConfig, imagenet_steps


def _tokenizer(method: str, codebook_size: int, **fields: Any) -> TrainConfig:
    return tokenizer(get_preset("paper"), {"method": method, "codebook_size": codebook_size, **fields})


def imagenet256_ibq_1024() -> TrainConfig:
    """IBQ with 1,024 codes of dimension 256.

    Claim: the smallest codebook of Table 4; from here rFID falls to 1.00 and usage to 84% as K grows to 262,144.
    Cost: 1,651,320 steps of 256 images (330 epochs), 107.0 M parameters.
    Expected: rFID 2.24, LPIPS 0.2580, usage 99%.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_ibq_1024 --data IMAGENET
    """
    return _tokenizer("ibq", 1024)


def imagenet256_ibq_8192() -> TrainConfig:
    """IBQ with 8,192 codes of dimension 256; as released 280 epochs, one drop of the learning rate at 250, bfloat16.

    Claim: the second codebook of Table 4, with a lower rFID than 1,024 codes.
    Cost: 1,401,120 steps of 256 images (280 epochs), 108.9 M parameters.
    Expected: rFID 1.87, LPIPS 0.2437, usage 98%.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_ibq_8192 --data IMAGENET
    """
    return _tokenizer("ibq", 8192).with_fields(
        **{"steps": imagenet_steps(280), "optim.milestones": [250 / 280], "precision": "bf16"}
    )


def imagenet256_ibq_16384() -> TrainConfig:
    """IBQ with 16,384 codes of dimension 256, the paper's default.

    Claim: where VQGAN's codebook of this size collapses, IBQ uses nearly all of it (Tables 1 and 2).
    Cost: 1,651,320 steps of 256 images (330 epochs), 111.0 M parameters.
    Expected: rFID 1.37, LPIPS 0.2235, usage 96%.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_ibq_16384 --data IMAGENET
    """
    return _tokenizer("ibq", 16384)


def imagenet256_ibq_262144() -> TrainConfig:
    """IBQ with 262,144 codes of dimension 256.

    Claim: the codebook scales to 2^18 codes, with the lowest rFID of Table 4.
    Cost: 1,651,320 steps of 256 images (330 epochs), 173.9 M parameters.
    Expected: rFID 1.00, LPIPS 0.2030, usage 84%.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_ibq_262144 --data IMAGENET
    """
    return _tokenizer("ibq", 262144)


def imagenet256_vqgan_16384() -> TrainConfig:
    """VQ with 16,384 codes of dimension 256, the baseline that collapses: taming-transformers' quantizer in the recipe
    of IBQ.

    Euclidean search, straight-through copy, codes from U(-1/K, 1/K), 0.25 on the codebook term, no entropy penalty, no
    double term.

    Claim: with 16,384 codes of dimension 256 plain VQ leaves most of its codebook unused (Tables 1 and 2).
    Cost: 1,651,320 steps of 256 images (330 epochs), 111.0 M parameters.
    Expected: rFID 3.98, usage 5.3% as the paper re-implemented it (with a shallower model); VQGAN itself 4.98, 5.9%.
        LPIPS not reported.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_vqgan_16384 --data IMAGENET
    """
    return _tokenizer("vq", 16384, codebook_init="uniform", beta_on="codebook", beta=0.25, entropy_weight=0.0)


def imagenet256_lfq_16384() -> TrainConfig:
    """LFQ with 16,384 codes: the quantizer of Open-MAGVIT2 in the autoencoder and the recipe of IBQ.

    A code is 14 signs; entropy weight 0.1, commitment 0.25. Not Open-MAGVIT2, whose decoder differs.

    Claim: with as many codes IBQ reconstructs better than LFQ (Table 5).
    Cost: 1,651,320 steps of 256 images (330 epochs), 106.7 M parameters.
    Expected: not reported.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_lfq_16384 --data IMAGENET
    """
    return _tokenizer("lfq", 16384, code_dim=14)


def imagenet256_lfq_262144() -> TrainConfig:
    """LFQ with 262,144 codes: the quantizer of Open-MAGVIT2 in the autoencoder and the recipe of IBQ.

    A code is 18 signs; entropy weight 0.1, commitment 0.25. Not Open-MAGVIT2, whose decoder differs and which trained
    for 270 epochs.

    Claim: with as many codes IBQ reconstructs better than LFQ (Table 1: rFID 1.00 against 1.17).
    Cost: 1,651,320 steps of 256 images (330 epochs), 106.7 M parameters.
    Expected: not reported; Open-MAGVIT2 itself rFID 1.17, usage 100%.
    Command: torchrun --nproc-per-node 8 -m experiments train imagenet256_lfq_262144 --data IMAGENET
    """
    return _tokenizer("lfq", 262144, code_dim=18)


TOKENIZERS: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        imagenet256_ibq_1024,
        imagenet256_ibq_8192,
        imagenet256_ibq_16384,
        imagenet256_ibq_262144,
        imagenet256_vqgan_16384,
        imagenet256_lfq_16384,
        imagenet256_lfq_262144,
    )
}
