"""Two processes with averaged gradients hold equal codebooks and equal state, whatever each of them sees and draws, and
train what one process trains on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from quantizer_variants import VARIANTS, every_variant, features_for, make, total_loss

from ibq.distributed import Processes
from ibq.quantizers.contract.processes import two_processes as tried_in_two_processes
from ibq.quantizers.contract.state import is_random
from ibq.quantizers.contract.trial import seeded

STEPS, TOKENS = 3, 2 * 3 * 4
DRAWING = ("restart", "online", "gumbel", "diveq")
"""Parts of the names of variants that draw from features or noise, so that one process and two differ."""
REPEATABLE = ("gumbel without noise", "diveq detach")


@pytest.fixture(scope="module")
def two_processes() -> dict[str, list[str]]:
    """What breaks in two processes, by variant."""
    configs = [make(variant).config for variant in VARIANTS]
    return dict(zip(VARIANTS, tried_in_two_processes(configs), strict=True))


@every_variant
def test_two_processes_hold_the_same_and_train_what_one_does(two_processes: dict[str, list[str]], variant: str) -> None:
    assert two_processes[variant] == []


@every_variant
def test_only_what_draws_is_not_compared_with_one_process(variant: str) -> None:
    with seeded(0):
        draws = is_random(make(variant).config)
    assert draws == (variant not in REPEATABLE and any(word in variant for word in DRAWING))


def restart_on_one_of_two(processes: Processes, folder: Path) -> None:
    torch.manual_seed(0)
    quantizer = make("vq restart")
    torch.manual_seed(10 + processes.rank)
    inputs = []
    for _ in range(STEPS):
        z_BDHW = features_for(quantizer)
        inputs.append(z_BDHW.detach().clone())
        quantizer.zero_grad()
        total_loss(quantizer, quantizer(z_BDHW)).backward()
        dist.all_reduce(quantizer.embedding.grad)
        with torch.no_grad():
            quantizer.embedding -= 0.5 * quantizer.embedding.grad / 2
    quantizer(features_for(quantizer))  # applies what the third step left
    torch.save({"embedding": quantizer.embedding.detach(), "inputs": inputs}, folder / f"{processes.rank}.pt")


@pytest.mark.processes
def test_codes_are_restarted_on_features_of_the_first_process(tmp_path: Path) -> None:
    run_processes(restart_on_one_of_two, tmp_path, 2)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    near = []
    for of in saved:
        seen_ND = torch.cat(of["inputs"]).permute(0, 2, 3, 1).reshape(-1, 6)
        near.append(int(((saved[0]["embedding"][:, None] - seen_ND).norm(dim=2).min(1).values < 1e-6).sum()))
    assert near[0] >= TOKENS / 2
    assert near[1] == 0
