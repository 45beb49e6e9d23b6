"""Training batches: the order of the images, the shares of several processes, images in memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibq.data import Images
from ibq.data.loader import TrainingBatches, batch_indices
from ibq.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(
        "photos",
        "train",
        torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
    )


# --- The order of the images ------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 5),
    batch_size=st.integers(1, 9),
    batches=st.integers(1, 6),
    rest=st.integers(0, 8),
)
def test_an_epoch_shows_each_image_at_most_once_and_all_where_the_batches_fit(
    seed: int, epoch: int, batch_size: int, batches: int, rest: int
) -> None:
    n_images = batch_size * batches + min(rest, batch_size - 1)
    steps = range(epoch * batches, (epoch + 1) * batches)
    shown = [batch_indices(seed, step, n_images, batch_size).tolist() for step in steps]
    assert all(len(batch) == batch_size for batch in shown)
    flat = sorted(itertools.chain(*shown))
    assert len(set(flat)) == batch_size * batches
    assert set(flat) <= set(range(n_images))


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = {tuple(batch_indices(seed, step, 50, 50).tolist()) for seed in range(4) for step in range(4)}
    assert len(orders) == 16


# --- Images in memory -------------------------------------------------------------------------------------------------


def test_images_in_memory_come_as_they_are_from_any_step_on(tiny: Any, images: Images) -> None:
    config = tiny(**{"data.name": "photos", "batch_size": 6, "seed": 3})
    before = torch.get_rng_state()
    for first_step in (0, 7, 1000):
        with TrainingBatches(images, config, CPU, first_step=first_step) as batches:
            for step in range(first_step, first_step + 10):
                x_BCHW = batches.next()
                assert torch.equal(x_BCHW, images.batch(batch_indices(3, step, 50, 6), "cpu"))
                assert x_BCHW.dtype == torch.float32
                assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
            assert 0 < batches.waited_s < 60
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_shares_of_all_processes_are_the_batch_and_so_in_each_micro_batch(
    world: int, accumulate: int, tiny: Any, images: Images
) -> None:
    config = tiny(**{"data.name": "photos", "batch_size": 8, "accumulate": accumulate})
    ranks = [TrainingBatches(images, config, CPU, first_step=2, rank=rank, world=world) for rank in range(world)]
    for step in range(2, 9):
        shares = [rank.next() for rank in ranks]
        assert {len(share) for share in shares} == {8 // world}
        micro_batches = zip(*(share.chunk(accumulate) for share in shares), strict=True)
        together = torch.cat([part for parts in micro_batches for part in parts])
        assert torch.equal(together, images.batch(batch_indices(0, step, 50, 8), "cpu"))


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny: Any, images: Images) -> None:
    config = tiny(**{"data.name": "photos", "batch_size": 12, "accumulate": 2})
    with pytest.raises(
        ConfigError, match=r"^batch_size=12 cannot be .* over 4 processes with accumulate=2; choose a multiple of 8$"
    ):
        TrainingBatches(images, config, CPU, first_step=0, rank=1, world=4)
