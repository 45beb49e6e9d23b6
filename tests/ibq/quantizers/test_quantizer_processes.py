"""Two processes train on different data with averaged gradients: every quantizer must end with equal codebooks and
equal state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from quantizer_variants import VARIANTS, K, every_variant, features_for, make, total_loss

from ibq import build_quantizer
from ibq.quantizers import Quantizer

STEPS, TOKENS = 3, 2 * 3 * 4


def initialise_from_own_features(quantizer: Quantizer, rank: int) -> None:
    own = torch.randn(
        quantizer.features_wanted, quantizer.config.code_dim, generator=torch.Generator().manual_seed(rank)
    )
    quantizer.initialize_from(own, torch.Generator().manual_seed(0))


def train_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for variant, fields in VARIANTS.items():
        torch.manual_seed(0)
        quantizer = build_quantizer({"codebook_size": K, "code_dim": 6} | fields)
        if quantizer.awaits_features:
            initialise_from_own_features(quantizer, rank)
        first = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        torch.manual_seed(10 + rank)
        inputs = []
        for _ in range(STEPS):
            z_BDHW = features_for(quantizer)
            inputs.append(z_BDHW.detach().clone())
            quantizer.zero_grad()
            total_loss(quantizer, quantizer(z_BDHW)).backward()
            with torch.no_grad():
                for parameter in quantizer.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
                        parameter -= 0.5 * parameter.grad / 2
        quantizer(features_for(quantizer))  # applies what the third step left
        saved = {
            "first": first,
            "state": quantizer.state_dict(),
            "codebook": quantizer.codebook.detach(),
            "inputs": inputs,
        }
        torch.save(saved, Path(folder) / f"{variant}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(train_one_of_two, args=(str(folder),), nprocs=2)
    return folder


@every_variant
def test_two_processes_hold_equal_codebooks_after_three_steps_on_different_data(
    two_processes: Path, variant: str
) -> None:
    one, other = (torch.load(two_processes / f"{variant}-{rank}.pt") for rank in (0, 1))
    assert not torch.equal(one["inputs"][0], other["inputs"][0])
    assert torch.equal(one["codebook"], other["codebook"])
    for part in ("first", "state"):
        assert one[part].keys() == other[part].keys()
        assert [name for name, tensor in one[part].items() if not torch.equal(tensor, other[part][name])] == []
    learnt = {"embedding", "projection.weight"} & one["state"].keys()
    assert bool(learnt) == any(not torch.equal(one["first"][name], one["state"][name]) for name in learnt), (
        "training moved nothing"
    )


def test_codes_were_restarted_on_features_of_the_first_process(two_processes: Path) -> None:
    saved = torch.load(two_processes / "vq restart-0.pt")
    state = saved["state"]
    seen_ND = torch.cat(saved["inputs"]).permute(0, 2, 3, 1).reshape(-1, 6)
    distance_K = (state["embedding"][:, None] - seen_ND).norm(dim=2).min(1).values
    assert (distance_K < 1e-6).sum() >= TOKENS / 2


@pytest.mark.parametrize("variant", ["vq ema", "vq ema cosine"])
def test_moving_averages_of_two_processes_are_those_of_one_on_the_joined_batch(
    two_processes: Path, variant: str
) -> None:
    ranks = [torch.load(two_processes / f"{variant}-{rank}.pt") for rank in (0, 1)]
    quantizer = make(variant)
    quantizer.load_state_dict(ranks[0]["first"])
    for step in range(STEPS):
        quantizer(torch.cat([saved["inputs"][step] for saved in ranks]))
    quantizer(torch.randn(1, 6, 2, 2))
    torch.testing.assert_close(quantizer.codebook, ranks[0]["codebook"], rtol=1e-5, atol=1e-6)
