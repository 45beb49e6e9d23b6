"""Several forwards a step: recomputation, micro-batches, repeated calls; schedules follow the optimizer's steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantizer_variants import features_for, make, total_loss
from torch.utils.checkpoint import checkpoint

from ibq.errors import ConfigError
from ibq.quantizers import Quantizer

SCHEDULED = ["lfq boosted", "gumbel annealed", "nsvq"]
MOVING = ["vq ema", "vq restart", "vq ema restart", "vq online", "diveq", *SCHEDULED]


def loss_of(quantizer: Quantizer) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda z_BDHW: total_loss(quantizer, quantizer(z_BDHW))


def assert_equal_state(mine: Quantizer, theirs: Quantizer) -> None:
    expected = theirs.state_dict()
    assert [name for name, tensor in mine.state_dict().items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("variant", MOVING)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_an_earlier_forward_than_the_last_is_one_sentence(variant: str, reentrant: bool) -> None:
    quantizer = make(variant)
    losses = [checkpoint(loss_of(quantizer), features_for(quantizer), use_reentrant=reentrant) for _ in range(2)]
    with pytest.raises(ConfigError, match=r"recomputes a forward pass of method=.* after another one has changed"):
        torch.stack(losses).sum().backward()


@pytest.mark.parametrize("variant", SCHEDULED)
def test_schedules_that_know_the_step_can_be_recomputed_in_any_order(variant: str) -> None:
    plain = make(variant, **({"noise": False} if "gumbel" in variant else {}))
    recomputed = copy.deepcopy(plain)
    for step in range(4):
        gradients = []
        for quantizer in (plain, recomputed):
            torch.manual_seed(step)
            quantizer.set_step(step)
            both = [features_for(quantizer) for _ in range(2)]
            run: Callable[..., Any] = checkpoint if quantizer is recomputed else lambda function, z, **_: function(z)
            torch.stack([run(loss_of(quantizer), z_BDHW, use_reentrant=False) for z_BDHW in both]).sum().backward()
            gradients.append([z_BDHW.grad for z_BDHW in both])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
        assert_equal_state(recomputed, plain)


@pytest.mark.parametrize("variant", ["vq ema", "vq restart", "vq online"])
def test_a_second_training_forward_within_a_step_that_was_named_is_one_sentence(variant: str) -> None:
    quantizer = make(variant)
    for step in range(2):
        quantizer.set_step(step)
        quantizer(features_for(quantizer))
    before = copy.deepcopy(quantizer)
    with pytest.raises(ConfigError, match="move codes once a step, and step 1 had its training forward already"):
        quantizer(features_for(quantizer))
    assert_equal_state(quantizer, before)
    quantizer.eval()(features_for(quantizer))


@pytest.mark.parametrize("variant", SCHEDULED)
def test_schedules_count_steps_whatever_the_number_of_forwards(variant: str) -> None:
    once, often = make(variant), make(variant)
    for step in range(6):
        for quantizer, micro_batches in ((once, 1), (often, 4)):
            quantizer.set_step(step)
            for _ in range(micro_batches):
                quantizer(features_for(quantizer))
            assert quantizer.schedule.steps == step
        assert once.schedule.now == often.schedule.now


def test_a_copy_of_the_codebook_goes_on_by_itself() -> None:
    """Averaged weights and pickled quantizers have had no forward; what their original saw is not theirs."""
    quantizer = make("vq ema")
    z_BDHW = features_for(quantizer)
    quantizer(z_BDHW)
    twin = copy.deepcopy(quantizer)
    assert twin._last_indices_N is None
    assert torch.equal(twin(z_BDHW).z_q, quantizer(z_BDHW).z_q)


@pytest.mark.filterwarnings("ignore::UserWarning")  # those of torch.compile where it breaks its graph
@pytest.mark.parametrize("variant", ["vq ema", "lfq boosted"])
def test_a_compiled_quantizer_within_a_checkpoint(variant: str) -> None:
    """A graph traced outside a backward pass also has to know that it is in one."""
    plain = make(variant)
    recomputed = copy.deepcopy(plain)
    compiled = torch.compile(recomputed, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        z_BDHW = features_for(plain)
        loss_of(plain)(z_BDHW).backward()
        checkpoint(lambda z: total_loss(recomputed, compiled(z)), z_BDHW, use_reentrant=False).backward()
        assert_equal_state(recomputed, plain)


@pytest.mark.parametrize("variant", ["lfq", "gumbel", "bsq", "fsq"])
def test_methods_without_a_schedule_compile_into_one_graph(variant: str) -> None:
    quantizer = make(variant)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    z_BDHW = features_for(quantizer)
    assert compiled(z_BDHW).z_q.shape == z_BDHW.shape


@pytest.mark.parametrize("variant", ["lfq boosted", "gumbel annealed"])
def test_schedules_that_know_the_step_compile_into_one_graph(variant: str) -> None:
    quantizer = make(variant)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    for step in range(3):
        quantizer.set_step(step)
        torch.manual_seed(step)
        actual = compiled(features_for(quantizer))
        torch.manual_seed(step)
        for name, term in quantizer(features_for(quantizer)).losses.items():
            torch.testing.assert_close(actual.losses[name], term)
