"""Two processes under DistributedDataParallel with a shared mean assignment train what one process trains on the joined
batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from quantizer_variants import VARIANTS, every_variant, features_for, make, total_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ibq import build_quantizer
from ibq.distributed import Processes
from ibq.errors import NonFiniteInputError
from ibq.losses import weighted_sum
from ibq.models.tokenizer import Tokenizer
from ibq.quantizers import Quantized

STEPS, BATCH, INPUTS = 3, 4, 5
RANDOM = ("restart", "online", "gumbel", "diveq", "cdf", "dropping")
"""Variants that draw from the features or the noise of one process; one process and two necessarily differ."""
REPEATABLE = [
    variant
    for variant in VARIANTS
    if "without noise" in variant or variant == "diveq detach" or not any(word in variant for word in RANDOM)
]
REFUSING = [
    *("ibq", "ibq without entropy and double", "vq", "vq linear", "simvq", "diveq detach", "wasserstein"),
    *("vqbridge", "optvq", "nsvq", "grouped vq"),
]


class Toy(nn.Module):
    """An encoder, a quantizer and a decoder, in float64."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantizer = make(variant)
        D = self.quantizer.config.code_dim
        self.encoder, self.decoder = nn.Conv2d(INPUTS, D, 1), nn.Conv2d(D, INPUTS, 1)
        self.double()

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        quantized = self.quantizer(self.encoder(x_BCHW))
        return self.decoder(quantized.z_q), quantized


def inputs(step: int) -> torch.Tensor:
    return torch.randn(BATCH, INPUTS, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(toy: Toy, forward: Callable[..., Any], part: slice) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """State and gradients after three steps on part of every batch."""
    optimizer = torch.optim.SGD([parameter for parameter in toy.parameters() if parameter.requires_grad], lr=0.1)
    for step in range(STEPS):
        x_BCHW = inputs(step)[part]
        y_BCHW, quantized = forward(x_BCHW)
        loss = (y_BCHW - x_BCHW).square().mean() + weighted_sum(quantized.losses, toy.quantizer.config.loss_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gradients = [parameter.grad for parameter in toy.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return toy.state_dict(), [gradient for gradient in gradients if gradient is not None]


def train_one_of_two(processes: Processes, folder: Path) -> None:
    half = BATCH // processes.world
    for variant in [*REPEATABLE, "local"]:
        toy = Toy("ibq" if variant == "local" else variant)
        toy.quantizer.group = None if variant == "local" else dist.group.WORLD
        saved = train(toy, DistributedDataParallel(toy), slice(half * processes.rank, half * (processes.rank + 1)))
        torch.save(saved, folder / f"{variant}-{processes.rank}.pt")
    torch.save(distances(processes.rank), folder / f"distances-{processes.rank}.pt")
    refusals = {}
    for variant in REFUSING:
        for what in ("features", "codebook"):
            toy = Toy(variant)
            toy.quantizer.group = dist.group.WORLD
            if processes.rank == 1:
                broken = toy.encoder.weight if what == "features" else next(toy.quantizer.parameters())
                nn.init.constant_(broken, float("inf"))
            try:
                toy(inputs(0))
            except NonFiniteInputError as error:
                refusals[variant, what] = str(error)
    bits = build_quantizer({"method": "lfq", "codebook_size": 2**36, "code_dim": 36})
    bits.group = dist.group.WORLD
    assert bits(torch.randn(1, 36, 2, 2)).indices.shape == (1, 2, 2)  # of its 2^36 codes none is built to be looked at
    toy.eval()
    if processes.rank == 0:  # no collective: or this would wait for what the other process does next
        toy(inputs(0))
    torch.save(refusals, folder / f"refusals-{processes.rank}.pt")


def distances(rank: int) -> dict[str, float]:
    """Wasserstein distances of codes to features, of which this process has two or three images of five."""
    torch.manual_seed(0)
    quantizer, z_BDHW = make("wasserstein"), torch.randn(5, 6, 3, 3) + torch.arange(5).reshape(5, 1, 1, 1)
    own_BDHW = (z_BDHW[:2], z_BDHW[2:])[rank]
    found = {"joined": quantizer(z_BDHW), "own": quantizer(own_BDHW)}
    quantizer.group = dist.group.WORLD
    found |= {"shared": quantizer(own_BDHW), "evaluated": quantizer.eval()(own_BDHW)}
    return {name: quantized.losses["wasserstein"].item() for name, quantized in found.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    run_processes(train_one_of_two, folder, 2)
    return folder


@pytest.mark.parametrize("variant", REPEATABLE)
def test_two_processes_train_what_one_does_on_the_joined_batch(two_processes: Path, variant: str) -> None:
    toy = Toy(variant)
    state, gradients = train(toy, toy, slice(None))
    for rank in range(2):
        rank_state, rank_gradients = torch.load(two_processes / f"{variant}-{rank}.pt")
        torch.testing.assert_close(rank_state, state, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(rank_gradients, gradients, rtol=1e-8, atol=1e-11)


def test_a_local_mean_assignment_trains_something_else(two_processes: Path) -> None:
    shared, local = (
        torch.load(two_processes / f"{variant}-0.pt")[0]["quantizer.embedding"] for variant in ("ibq", "local")
    )
    assert (shared - local).abs().max() > 1e-6


def test_processes_with_unequal_numbers_of_tokens_share_the_moments_of_their_features(two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"distances-{rank}.pt") for rank in range(2))
    assert first["shared"] == second["shared"] == pytest.approx(first["joined"], rel=1e-6)
    for each in (first, second):
        assert each["evaluated"] == each["own"] != pytest.approx(each["joined"], rel=1e-2)


@pytest.mark.parametrize("what", ["features", "codebook"])
@pytest.mark.parametrize("variant", REFUSING)
def test_what_is_not_finite_on_one_process_is_refused_by_both(two_processes: Path, variant: str, what: str) -> None:
    first, second = (torch.load(two_processes / f"refusals-{rank}.pt")[variant, what] for rank in range(2))
    assert first.startswith("another process has values that are NaN or infinite")
    assert f"values of {what} are NaN or infinite" in second


@every_variant
def test_every_parameter_that_trains_has_a_gradient_in_every_step(variant: str) -> None:
    """DistributedDataParallel waits for the gradients of all of them."""
    quantizer = make(variant)
    for _ in range(2):
        quantizer.zero_grad()
        total_loss(quantizer, quantizer(features_for(quantizer))).backward()
        assert [name for name, p in quantizer.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    "method", ["vq", "ibq", "simvq", "gumbel", "diveq", "wasserstein", "vqbridge", "optvq", "nsvq", "grouped"]
)
def test_every_parameter_of_a_tokenizer_has_a_gradient(method: str, tiny: Any) -> None:
    tokenizer = Tokenizer(tiny(method))
    y_BCHW, _, quantized = tokenizer(torch.rand(2, 1, 32, 32))
    (y_BCHW.square().mean() + weighted_sum(quantized.losses, tokenizer.config.quantizer.loss_weights)).backward()
    assert [name for name, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_copy_has_no_group() -> None:
    quantizer = make("ibq")
    quantizer.group = object()  # type: ignore[assignment]  # neither can a real one be copied
    assert copy.deepcopy(quantizer).group is None
    assert quantizer.group is not None
    assert quantizer.training_group is quantizer.group
    assert quantizer.eval().training_group is None
