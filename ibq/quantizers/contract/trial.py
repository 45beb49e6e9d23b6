"""What rules are tried on: a quantizer in training, features, and a step of training on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ibq.losses import weighted_sum
from ibq.quantizers.base import CodebookQuantizer, Quantized, Quantizer
from ibq.quantizers.build import build_quantizer
from ibq.schema import QuantizerConfig

GRID = (2, 3, 4)
"""B, H and W of the features: fewer tokens than the codes of a codebook that rules are tried on."""
TOKENS = 24
MOST = 5
"""Names in a sentence."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from a seed; those of whoever calls go on as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make(config: QuantizerConfig) -> Quantizer:
    """A quantizer in training mode, its codebook initialised."""
    quantizer = build_quantizer(config)
    if isinstance(quantizer, CodebookQuantizer) and quantizer.awaits_features:
        features_MD = torch.randn(quantizer.features_wanted, config.code_dim)
        quantizer.initialize_from(features_MD, torch.Generator().manual_seed(1))
    return quantizer


def features_for(quantizer: Quantizer) -> torch.Tensor:
    """Features (2, D, 3, 4) with a gradient."""
    B, H, W = GRID
    return torch.randn(B, quantizer.config.code_dim, H, W, requires_grad=True)


def flat(z_BDHW: torch.Tensor) -> torch.Tensor:
    """Features (N, D)."""
    return z_BDHW.movedim(1, -1).flatten(0, -2)


def total_loss(quantizer: Quantizer, quantized: Quantized) -> torch.Tensor:
    """A loss that reaches all that training would."""
    return (quantized.z_q - 0.5).square().mean() + weighted_sum(quantized.losses, quantizer.config.loss_weights)


def train_step(quantizer: Quantizer, seed: int) -> Quantized:
    """One SGD step on features (and noise) of a seed."""
    torch.manual_seed(seed)
    quantized: Quantized = quantizer(features_for(quantizer))
    quantizer.zero_grad()
    total_loss(quantizer, quantized).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    return quantized


def is_code(quantizer: Quantizer, quantized: Quantized) -> bool:
    """True if z_q is the codes of its indices, bit for bit, or training is between codes."""
    between = quantizer.training and quantizer.trains_between_codes
    return between or torch.equal(quantized.z_q, quantizer.indices_to_codes(quantized.indices))


def state_of(quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """A copy of the state_dict."""
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


# --- In words ---------------------------------------------------------------------------------------------------------


def unequal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names under which two sets of tensors are not equal bit for bit."""
    same = {name for name in actual.keys() & expected.keys() if torch.equal(actual[name], expected[name])}
    return sorted((actual.keys() | expected.keys()) - same)


def parts(quantized: Quantized) -> dict[str, torch.Tensor]:
    """Everything that a forward returns, by names for people."""
    return {"z_q": quantized.z_q, "indices": quantized.indices} | {
        f"loss {name!r}": term for name, term in quantized.losses.items()
    }


def gap(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """How many values differ, and by how much."""
    if actual.shape != expected.shape:
        return f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    differing = actual != expected
    largest = (actual.detach().double() - expected.detach().double()).abs().max()
    return f"{int(differing.sum())} of {actual.numel()} values, by up to {largest:.2g}"


def listed(names: list[str]) -> str:
    """Names, the first of them where there are many."""
    return ", ".join(names if len(names) <= MOST else [*names[: MOST - 1], f"{len(names) - MOST + 1} more"])
