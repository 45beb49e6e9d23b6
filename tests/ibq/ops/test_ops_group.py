"""Two processes that share the mean assignment equal one process on the joined batch."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from operators import DEVICE, Outputs, textbook

from ibq.errors import NonFiniteInputError
from ibq.ops import index_backprop

SPLITS = {"equal": (6, 6), "unequal": (5, 9)}


def local_loss(outputs: Outputs, weight_ND: torch.Tensor) -> torch.Tensor:
    z_q_ND, _, sample_entropy, codebook_entropy = outputs
    return (weight_ND * z_q_ND).sum(1).mean() + 0.7 * sample_entropy - 1.3 * codebook_entropy


def joined_batch(split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(SPLITS[split]))
    N = sum(SPLITS[split])
    return tuple(torch.randn(rows, 3, dtype=torch.float64, generator=generator) for rows in (N, 7, N))


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for split, sizes in SPLITS.items():
        z_ND, codebook_KD, weight_ND = joined_batch(split)
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        for backend in ("dense", "chunked", "triton"):
            where = {"device": DEVICE, "dtype": torch.float32} if backend == "triton" else {"dtype": torch.float64}
            z, codebook = (tensor.to(copy=True, **where).requires_grad_() for tensor in (z_ND[mine], codebook_KD))
            outputs = index_backprop(z, codebook, entropy_temperature=0.5, backend=backend, group=dist.group.WORLD)
            local_loss(outputs, weight_ND[mine].to(z)).backward()
            result = {"z_q": outputs[0], "indices": outputs[1], "sample": outputs[2], "codebook_entropy": outputs[3]}
            result |= {"dz": z.grad, "dC": codebook.grad}
            torch.save(
                {name: tensor.detach().cpu() for name, tensor in result.items()},
                Path(folder) / f"{split}-{backend}-{rank}.pt",
            )
    z_ND, codebook_KD, _ = joined_batch("equal")
    z_ND[0, 0] = float("nan") if rank == 1 else 0.0
    try:
        index_backprop(z_ND, codebook_KD, group=dist.group.WORLD)
    except NonFiniteInputError as error:
        (Path(folder) / f"refused-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(one_of_two_processes, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_group_of_two_equals_one_process_on_the_joined_batch(two_processes: Path, backend: str, split: str) -> None:
    """Mean loss over ranks, averaged gradients: the sample entropy is a local mean, so its joined form is the mean of
    both halves."""
    ranks = [torch.load(two_processes / f"{split}-{backend}-{rank}.pt") for rank in (0, 1)]
    z_ND, codebook_KD, weight_ND = joined_batch(split)
    z_ND.requires_grad_()
    codebook_KD.requires_grad_()
    halves = [textbook(z, codebook_KD, 0.5) for z in z_ND.split(SPLITS[split])]
    *_, joined_entropy = textbook(z_ND, codebook_KD, 0.5)
    weights = weight_ND.split(SPLITS[split])
    loss = (
        sum(local_loss((*half[:3], joined_entropy), weight) for half, weight in zip(halves, weights, strict=True)) / 2
    )
    dz_ND, dC_KD = torch.autograd.grad(loss, (z_ND, codebook_KD))

    tolerance = 1e-5 if backend == "triton" else 1e-10
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False)
    for rank, half in zip(ranks, halves, strict=True):
        close(rank["z_q"], half[0])
        assert torch.equal(rank["indices"], half[1])
        close(rank["sample"], half[2])
        close(rank["codebook_entropy"], joined_entropy)
        assert abs(rank["codebook_entropy"] - half[3]) > 1e-3, "the group's entropy must not be the local one"
    close(torch.cat([rank["dz"] for rank in ranks]) / 2, dz_ND)
    close(torch.stack([rank["dC"] for rank in ranks]).mean(0), dC_KD)


def test_what_one_process_refuses_all_refuse_so_that_none_waits(two_processes: Path) -> None:
    assert (two_processes / "refused-1").read_text().startswith("1 of 36 values of features are NaN or infinite")
    assert (two_processes / "refused-0").read_text().startswith("another process has values that are NaN or infinite")
