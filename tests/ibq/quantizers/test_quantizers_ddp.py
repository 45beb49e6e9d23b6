"""Two processes under DistributedDataParallel: what a shared mean assignment changes, and what is not finite on one of
them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from quantizer_variants import make
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ibq import build_quantizer
from ibq.distributed import Processes
from ibq.errors import NonFiniteInputError
from ibq.losses import weighted_sum
from ibq.models.tokenizer import Tokenizer
from ibq.quantizers.contract.processes import BATCH, CHANNELS, Toy, train

REFUSING = [
    *("ibq", "ibq without entropy and double", "vq", "vq linear", "simvq", "diveq detach", "wasserstein"),
    *("vqbridge", "optvq", "nsvq", "grouped vq"),
]


def toy_of(variant: str, rank: int) -> Toy:
    return Toy(make(variant).config, rank)


def train_one_of_two(processes: Processes, folder: Path) -> None:
    half = BATCH // processes.world
    for mean in ("shared", "local"):
        toy = toy_of("ibq", processes.rank)
        toy.quantizer.group = dist.group.WORLD if mean == "shared" else None
        part = slice(half * processes.rank, half * (processes.rank + 1))
        saved = train(toy, DistributedDataParallel(toy), part, processes.rank)
        torch.save(saved, folder / f"{mean}-{processes.rank}.pt")
    torch.save(distances(processes.rank), folder / f"distances-{processes.rank}.pt")
    x_BCHW = torch.randn(BATCH, CHANNELS, 3, 3, dtype=torch.float64)
    refusals = {}
    for variant in REFUSING:
        for what in ("features", "codebook"):
            toy = toy_of(variant, processes.rank)
            toy.quantizer.group = dist.group.WORLD
            if processes.rank == 1:
                broken = toy.encoder.weight if what == "features" else next(toy.quantizer.parameters())
                nn.init.constant_(broken, float("inf"))
            try:
                toy(x_BCHW)
            except NonFiniteInputError as error:
                refusals[variant, what] = str(error)
    bits = build_quantizer({"method": "lfq", "codebook_size": 2**36, "code_dim": 36})
    bits.group = dist.group.WORLD
    assert bits(torch.randn(1, 36, 2, 2)).indices.shape == (1, 2, 2)  # of its 2^36 codes none is built to be looked at
    toy.eval()
    if processes.rank == 0:  # no collective: or this would wait for what the other process does next
        toy(x_BCHW)
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


def test_a_local_mean_assignment_trains_something_else(two_processes: Path) -> None:
    shared, local = (torch.load(two_processes / f"{mean}-0.pt")["quantizer.embedding"] for mean in ("shared", "local"))
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
