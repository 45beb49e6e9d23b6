"""Grouped quantizers: each part by its inner method, indices with a digit a part, parts that are dropped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantizer_variants import assert_refused, train_step
from vector_quantize_pytorch import VectorQuantize

from ibq import build_quantizer
from ibq.errors import ConfigError
from ibq.quantizers import GroupedConfig, GroupedQuantizer, VQConfig
from ibq.schema import COUNTABLE_CODES
from ibq.training.interventions import live_fields

N, D = 40, 6
EMA = {"method": "vq", "ema_decay": 0.5, "beta_on": "commitment", "codebook_init": "kmeans"}


def make(inner: dict[str, Any], **fields: Any) -> GroupedQuantizer:
    sizes = {"method": "grouped", "codebook_size": 64, "code_dim": D, "groups": 3}
    quantizer = build_quantizer(sizes | {"inner": inner} | fields)
    assert isinstance(quantizer, GroupedQuantizer)
    return quantizer


def features(rows: int = N) -> torch.Tensor:
    return torch.randn(rows, D, dtype=torch.float64, requires_grad=True)


# --- Parts and indices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [{"method": "vq", "entropy_weight": 0.1}, {"method": "ibq"}, {"method": "simvq"}])
def test_it_is_the_inner_quantizer_on_each_part_in_float64(inner: dict[str, Any]) -> None:
    """z_q side by side, the means of each term, gradients of features and of every part's parameters."""
    quantizer = make(inner).double()
    alone = [build_quantizer(part.config).double() for part in quantizer.parts]
    for mine, theirs in zip(quantizer.parts, alone, strict=True):
        theirs.load_state_dict(mine.state_dict())
    z_ND, g_ND = features(), torch.randn(N, D, dtype=torch.float64)
    z_q_ND, indices_N, losses = quantizer.quantize(z_ND)
    of_parts = [part.quantize(z_ND[:, 2 * p : 2 * p + 2]) for p, part in enumerate(alone)]
    expected_ND = torch.cat([of_part[0] for of_part in of_parts], 1)
    assert torch.equal(z_q_ND, expected_ND)
    assert torch.equal(indices_N, sum(4**p * of_part[1] for p, of_part in enumerate(of_parts)))
    assert losses.keys() == of_parts[0][2].keys()
    means = {name: sum(of_part[2][name] for of_part in of_parts) / 3 for name in losses}
    for name in losses:
        torch.testing.assert_close(losses[name], means[name], rtol=1e-14, atol=0)
    totals = [((z_q * g_ND).sum() + sum(terms.values())) for z_q, terms in ((z_q_ND, losses), (expected_ND, means))]
    learnt = [[p for q in each for p in q.parameters() if p.requires_grad] for each in (quantizer.parts, alone)]
    gradients = [
        torch.autograd.grad(total, [z_ND, *parameters], retain_graph=True)
        for total, parameters in zip(totals, learnt, strict=True)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_vq_in_groups_is_the_formula() -> None:
    """Nearest code of each part by Euclidean distance; commitment and codebook term are means over all channels."""
    quantizer = make({"method": "vq", "codebook_init": "normal"}).double()
    z_ND = features()
    codes_ND, digits = [], []
    for p, part in enumerate(quantizer.parts):
        digits.append(torch.cdist(z_ND[:, 2 * p : 2 * p + 2], part.embedding).argmin(1))
        codes_ND.append(part.embedding[digits[-1]])
    z_q_ND, indices_N, losses = quantizer.quantize(z_ND)
    expected_ND = torch.cat(codes_ND, 1)
    assert torch.equal(z_q_ND, expected_ND)
    assert torch.equal(quantizer.parts_of(indices_N[None])[0], torch.stack(digits))
    for term in losses.values():
        torch.testing.assert_close(term, (z_ND - expected_ND).square().mean(), rtol=1e-13, atol=0)
    assert torch.equal(quantizer.codebook[indices_N], z_q_ND)


def test_it_is_the_librarys_vq_with_a_codebook_for_each_head() -> None:
    mine = make({"method": "vq", "codebook_init": "normal", "beta": 1.0})
    theirs = VectorQuantize(
        D,
        4,
        codebook_dim=2,
        heads=3,
        separate_codebook_per_head=True,
        ema_update=False,
        learnable_codebook=True,
        rotation_trick=False,
    )
    theirs._codebook.embed.data.copy_(torch.stack([part.embedding.detach() for part in mine.parts]))
    z_BND = torch.randn(2, 20, D, requires_grad=True)
    codes_BND, indices_BNP, _ = theirs(z_BND)
    quantized = mine(z_BND)
    assert torch.equal(mine.parts_of(quantized.indices), indices_BNP.movedim(-1, 1))
    torch.testing.assert_close(quantized.z_q, codes_BND, rtol=1e-5, atol=1e-6)
    g_BND = torch.randn_like(z_BND)
    gradients = [torch.autograd.grad(z_q, [z_BND], g_BND)[0] for z_q in (quantized.z_q, codes_BND)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("grid", [(2, 3, 4), (2, 12), (2, 3, 2, 2)])
def test_digits_of_an_index_are_the_indices_of_its_parts_the_first_one_least(grid: tuple[int, ...]) -> None:
    quantizer = make({"method": "vq"})
    indices = torch.randint(64, grid)
    parts = quantizer.parts_of(indices)
    assert parts.dtype == torch.int64
    assert parts.shape == (grid[0], 3, *grid[1:])
    assert torch.equal(parts[:, 0] + 4 * parts[:, 1] + 16 * parts[:, 2], indices)
    with pytest.raises(ValueError, match=r"indices reach from \d+ to 64; they must lie in \[0, 64\)"):
        quantizer.parts_of(indices + 64 - indices.max())


def test_indices_of_implied_codebooks_have_parts_too() -> None:
    fsq = build_quantizer({"method": "fsq", "levels": (4, 3), "codebook_size": 12, "code_dim": 2})
    assert fsq.parts_of(torch.tensor([[7, 11]])).tolist() == [[[3, 3], [1, 2]]]
    bits = build_quantizer({"method": "lfq", "codebook_size": 8, "code_dim": 3}).parts_of(torch.tensor([[6]]))
    assert bits.dtype == torch.int64
    assert bits.tolist() == [[[0], [1], [1]]]


def test_bits_that_the_groups_do_not_divide_are_shared_out() -> None:
    quantizer = make({"method": "ibq"}, codebook_size=2**8)
    assert quantizer.config.part_sizes == (8, 8, 4)
    assert [part.codebook.shape for part in quantizer.parts] == [(8, 2), (8, 2), (4, 2)]
    z_BDHW = torch.randn(2, D, 8, 8)
    quantized = quantizer(z_BDHW)
    assert torch.equal(quantizer.codebook[quantized.indices], quantized.z_q.movedim(1, -1))
    assert build_quantizer(quantizer.config.model_dump(mode="json")).config == quantizer.config
    logits_NK = quantizer.logits(z_BDHW.movedim(1, -1).flatten(0, 2))
    assert torch.equal(logits_NK.argmax(1), quantized.indices.flatten())


def test_more_codes_than_can_be_counted_come_from_their_parts() -> None:
    quantizer = make({"method": "vq", "codebook_init": "normal"}, codebook_size=2**36, code_dim=6)
    quantized = quantizer(torch.randn(2, 6, 4, 4))
    assert quantized.indices.max() > COUNTABLE_CODES
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)
    with pytest.raises(ValueError, match=r"^a codebook of 68,719,476,736 codes is not built whole, 2\^24 are the most"):
        _ = quantizer.codebook


# --- Dropped parts ----------------------------------------------------------------------------------------------------


def test_last_parts_are_dropped_together_by_one_draw_in_training_alone() -> None:
    """As MGVQ's code has it: with one u ~ U(0, 1) of a forward, part i is zero where u < p_i."""
    quantizer = make({"method": "vq", "codebook_init": "normal"}, drop_last=(0.3, 0.6))
    z_ND, seen = features(), []
    for seed in range(60):
        torch.manual_seed(seed)
        z_q_ND = quantizer.quantize(z_ND)[0]
        torch.manual_seed(seed)
        u = torch.rand(())
        kept = [bool((z_q_ND[:, 2 * p : 2 * p + 2] != 0).any()) for p in range(3)]
        assert kept == [True, bool(u >= 0.3), bool(u >= 0.6)]
        seen.append(sum(kept))
    share = torch.bincount(torch.tensor(seen), minlength=4)[1:] / len(seen)
    torch.testing.assert_close(share, torch.tensor([0.3, 0.3, 0.4]), rtol=0, atol=0.2)
    quantizer.eval()
    quantized = quantizer(z_ND.detach()[None].float())
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)


def test_dropped_parts_have_neither_gradient_nor_loss_and_keep_their_indices() -> None:
    quantizer = make({"method": "ibq", "codebook_init": "normal"}, drop_last=(0.999999, 0.999999)).double()
    z_ND = features()
    z_q_ND, indices_N, losses = quantizer.quantize(z_ND)
    assert torch.equal(indices_N, quantizer.eval().quantize(z_ND)[1])
    (z_q_ND.square().sum() + sum(losses.values())).backward()
    assert (z_ND.grad[:, :2] != 0).any(1).all()
    assert not z_ND.grad[:, 2:].any()
    first, *others = quantizer.parts
    assert first.embedding.grad.any()
    assert not any(part.embedding.grad.any() for part in others)
    for name, term in first.quantize(z_ND[:, :2])[2].items():
        torch.testing.assert_close(losses[name], term / 3, rtol=1e-12, atol=1e-14)


# --- What is set from outside -----------------------------------------------------------------------------------------


def test_groups_of_processes_are_those_of_the_parts_and_a_copy_has_none() -> None:
    quantizer = make({"method": "ibq"})
    for name in ("group", "peers"):
        group = object()
        setattr(quantizer, name, group)
        assert all(getattr(part, name) is group for part in quantizer.parts)
        assert all(getattr(part, name) is None for part in copy.deepcopy(quantizer).parts)


def test_a_step_that_was_named_reaches_the_parts() -> None:
    quantizer = make(EMA | {"codebook_init": "normal"})
    quantizer.set_step(0)
    quantizer(torch.randn(1, D, 2, 2))
    with pytest.raises(ConfigError, match="move codes once a step, and step 0 had its training forward already"):
        quantizer(torch.randn(1, D, 2, 2))
    boosted = make({"method": "lfq", "entropy_boost": 3.0, "entropy_boost_steps": 4})
    boosted.set_step(3)
    assert all(part.schedule.steps == 3 for part in boosted.parts)
    assert not boosted.leaves_to_next_forward


def test_each_part_begins_at_its_own_channels_features() -> None:
    quantizer, features_MD = make(EMA), torch.randn(200, D)
    assert quantizer.awaits_features
    assert quantizer.features_wanted == 16
    with pytest.raises(ValueError, match=r"has seen none yet; call initialize_from with 16 encoder outputs"):
        quantizer(torch.randn(1, D, 2, 2))
    quantizer.initialize_from(features_MD, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for p, part in enumerate(quantizer.parts):
        alone = build_quantizer(part.config)
        alone.initialize_from(features_MD[:, 2 * p : 2 * p + 2], generator)
        assert torch.equal(part.embedding, alone.embedding)
    assert not quantizer.awaits_features
    with pytest.raises(ValueError, match=r"features of shape \(200, 5\) do not fit code_dim=6"):
        quantizer.initialize_from(features_MD[:, :5], generator)


def test_averaged_weights_take_over_what_must_not_be_averaged() -> None:
    quantizer = make(EMA | {"codebook_init": "normal"})
    average = copy.deepcopy(quantizer)
    for seed in (1, 2):
        train_step(quantizer, seed)
    quantizer.sync_average(average)
    for part, of_average in zip(quantizer.parts, average.parts, strict=True):
        assert torch.equal(part.embedding, of_average.embedding)


def test_new_weights_reach_the_parts() -> None:
    quantizer = make({"method": "vq", "entropy_weight": 0.1}, codebook_size=2**8)
    quantizer.reconfigure(quantizer.config.with_fields(**{"inner.entropy_weight": 0.0, "inner.beta": 1.0}))
    assert [(part.config.beta, part.config.codebook_size) for part in quantizer.parts] == [(1, 8), (1, 8), (1, 4)]
    assert (
        quantizer.quantize(features())[2].keys() == quantizer.config.loss_weights.keys() == {"commitment", "codebook"}
    )


def test_weights_of_the_parts_can_change_while_a_run_trains(tiny: Callable[..., Any]) -> None:
    assert {path for path in live_fields(tiny("grouped")) if "inner" in path} == {
        f"quantizer.inner.{name}" for name in ("beta", "beta_on", "entropy_weight", "entropy_temperature")
    }


def test_its_codes_are_not_placed_one_by_one() -> None:
    quantizer = make({"method": "vq"})
    assert not quantizer.config.places_codes
    with pytest.raises(ConfigError, match="method='grouped' has no codes that can be placed one by one"):
        quantizer.restart_codes(torch.ones(64, dtype=torch.bool), torch.randn(9, D), torch.Generator())


# --- Configs ----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_parts_follow_and_are_written_nowhere() -> None:
    config = GroupedConfig(codebook_size=4096, code_dim=12, groups=3, inner=VQConfig(beta=0.5))
    assert (config.inner.codebook_size, config.inner.code_dim, config.inner.beta) == (16, 4, 0.5)
    written = config.model_dump(mode="json")["inner"]
    assert written["method"] == "vq"
    assert not {"codebook_size", "code_dim"} & written.keys()
    assert GroupedConfig.model_validate(config.model_dump()) == config
    larger = config.with_fields(codebook_size=2**15, code_dim=24)
    assert (larger.inner.codebook_size, larger.inner.code_dim, larger.inner.beta) == (32, 8, 0.5)
    given = {"method": "vq", "codebook_size": 16, "code_dim": 4}
    assert GroupedConfig(codebook_size=4096, code_dim=12, groups=3, inner=given).inner.codebook_size == 16


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"codebook_size": 1000}, ("codebook_size=1000", "power groups=2 of a whole number", "set it to 1024")),
        ({"codebook_size": 2}, ("codebook_size=2", "at least 4", "set it to 4")),
        ({"codebook_size": 2**64}, ("codebook_size=18446744073709551616", "2^62", "take fewer")),
        ({"code_dim": 33}, ("code_dim=33", "groups=2", "set it to 34")),
        ({"groups": 1}, ("groups", "greater than or equal to 2")),
        ({"inner": {"method": "vqq"}}, ("inner", "'vqq'", "choose one of")),
        ({"inner": {"method": "vq", "betta": 1}}, ("inner.betta",)),
        ({"inner": {"method": "grouped"}}, ("inner", "set more groups")),
        ({"inner": 3}, ("inner", "must be a dict or a QuantizerConfig, not int")),
        (
            {"inner": {"method": "vq", "codebook_size": 7}},
            ("codebook_size=7", "the 32 that groups=2 make of codebook_size=1024", "leave it out"),
        ),
        ({"inner": {"method": "ibq", "top_m": 33}}, ("top_m=33", "codebook_size=32")),
        ({"codebook_size": 2048, "inner": {"method": "ibq", "top_m": 33}}, ("top_m=33", "codebook_size=32")),
        ({"inner": {"method": "lfq"}}, ("inner", "code_dim=32", "codebook_size=32", "set code_dim=5")),
        ({"drop_last": [0.2, 0.3]}, ("drop_last=(0.2, 0.3)", "groups=2", "give 1")),
        ({"groups": 4, "codebook_size": 256, "drop_last": [0.4, 0.3, 0.5]}, ("ascending probabilities",)),
        ({"drop_last": [1.0]}, ("below 1",)),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "grouped"} | fields, *mentions)


def test_k_may_be_any_number_that_equal_parts_make() -> None:
    for K, groups, sizes in ((62**3, 3, (62,) * 3), (2**62, 2, (2**31,) * 2), (6**7, 7, (6,) * 7)):
        config = GroupedConfig(codebook_size=K, code_dim=6 * 7, groups=groups)
        assert config.part_sizes == sizes
        assert math.prod(sizes) == K
