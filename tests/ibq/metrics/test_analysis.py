"""Gradient reach and quantization error against their definitions and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibq.metrics.codebook import QuantizationError, code_gap, gradient_reach, logit_statistics


@pytest.mark.parametrize("K", [1, 7, 1000])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
def test_equal_norms_reach_all_codes(K: int, scale: float) -> None:
    directions_KD = torch.nn.functional.normalize(torch.randn(K, 5, dtype=torch.float64), dim=1)
    reach = gradient_reach(scale * directions_KD)
    assert reach["reach_effective"] == pytest.approx(K)
    assert reach["reach_above_eps"] == 1


def test_a_single_code_and_none() -> None:
    gradient_KD = torch.zeros(10, 4)
    assert gradient_reach(gradient_KD) == {"reach_effective": 0, "reach_above_eps": 0}
    gradient_KD[3] = 2.0
    assert gradient_reach(gradient_KD) == pytest.approx({"reach_effective": 1, "reach_above_eps": 0.1})


def test_reach_counts_codes_not_non_zeros() -> None:
    gradient_KD = torch.full((100, 4), 1e-12)
    gradient_KD[:2] = 1.0
    reach = gradient_reach(gradient_KD)
    assert reach["reach_effective"] == pytest.approx(2, abs=1e-6)
    assert reach["reach_above_eps"] == 0.02


def test_adams_eps_is_compared_with_the_root_mean_square_of_a_code() -> None:
    gradient_KD = torch.stack([torch.full((16,), 0.9e-8), torch.full((16,), 1.1e-8)])
    assert gradient_reach(gradient_KD)["reach_above_eps"] == 0.5


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(lambda norms: sum(norms) > 1e-3))
def test_reach_is_the_exponential_of_the_entropy_of_the_norms(norms: list[float]) -> None:
    shares = [norm / sum(norms) for norm in norms]
    expected = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
    gradient_KD = torch.tensor(norms, dtype=torch.float64)[:, None] * torch.tensor([[0.6, -0.8]], dtype=torch.float64)
    actual = gradient_reach(gradient_KD)["reach_effective"]
    assert actual == pytest.approx(expected)
    assert actual <= len(norms) * (1 + 1e-9)


def features() -> tuple[torch.Tensor, torch.Tensor]:
    z_BDHW = 3 + torch.randn(7, 4, 3, 5) * torch.tensor([1.0, 2.0, 0.1, 5.0]).view(1, 4, 1, 1)
    return z_BDHW, z_BDHW + 0.3 * torch.randn_like(z_BDHW)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_streamed_quantization_error_equals_the_direct_one(batch_size: int) -> None:
    z_BDHW, z_q_BDHW = features()
    error = QuantizationError()
    for z, z_q in zip(z_BDHW.split(batch_size), z_q_BDHW.split(batch_size), strict=True):
        error.update(z, z_q)
    squared = (z_BDHW - z_q_BDHW).double().square().sum(1).mean()
    variance = z_BDHW.double().var(dim=(0, 2, 3), correction=0).sum()
    assert error.compute() == pytest.approx(float(squared / variance), rel=1e-9)


def test_error_of_the_mean_is_1_and_of_a_copy_0() -> None:
    z_BDHW, _ = features()
    mean, copy = QuantizationError(), QuantizationError()
    mean.update(z_BDHW, z_BDHW.double().mean((0, 2, 3), keepdim=True).expand(z_BDHW.shape))
    copy.update(z_BDHW, z_BDHW)
    assert mean.compute() == pytest.approx(1)
    assert copy.compute() == 0


def test_logit_statistics_at_their_limits() -> None:
    indifferent = {"logit_spread": 0, "max_probability": 1 / 50, "assignment_entropy": math.log(50)}
    assert logit_statistics(torch.full((3, 50), 7.0)) == pytest.approx(indifferent)
    decided_NK = 1000 * torch.eye(4)
    decided = {"logit_spread": 1000 * math.sqrt(3) / 4, "max_probability": 1, "assignment_entropy": 0}
    assert logit_statistics(decided_NK) == pytest.approx(decided)


def test_the_gap_equals_the_frechet_distance_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(500, 6, generator=generator) * torch.arange(1, 7) + 0.3
    codes_KD = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    used_K = torch.arange(40) < 4  # fewer than D: their covariance is singular
    gaps = code_gap(features_ND, codes_KD, used_K)
    parts = {"gap": codes_KD, "gap_used": codes_KD[used_K], "gap_dead": codes_KD[~used_K], "gap_angular": codes_KD}
    assert gaps.keys() == parts.keys()
    for name, part_KD in parts.items():
        one, other = features_ND.double().numpy(), part_KD.double().numpy()
        if name == "gap_angular":
            one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other))
        S1, S2 = np.cov(one.T, bias=True), np.cov(other.T, bias=True)
        root = scipy.linalg.sqrtm(S1 @ S2 + 1e-15 * np.eye(6)).real
        expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(S1 + S2 - 2 * root)
        assert gaps[name] == pytest.approx(expected / np.trace(S1), rel=1e-5)


def test_the_gap_at_its_limits() -> None:
    features_ND = torch.randn(300, 5) + 2
    everything = torch.ones(300, dtype=torch.bool)
    nothing = {"gap": 0, "gap_used": 0, "gap_angular": 0}
    assert code_gap(features_ND, features_ND, everything) == pytest.approx(nothing, abs=1e-9)
    longer = code_gap(features_ND, 10 * features_ND, everything)
    assert longer["gap_angular"] == pytest.approx(0, abs=1e-9)  # lengths do not count
    assert longer["gap"] > 10
    at_the_mean = features_ND.double().mean(0, keepdim=True)
    gaps = code_gap(features_ND, at_the_mean, torch.tensor([False]))
    assert {name: gaps[name] for name in ("gap", "gap_dead")} == pytest.approx({"gap": 1, "gap_dead": 1})
    assert code_gap(10 * features_ND, 10 * features_ND.flip(0) + 1, everything)["gap"] == pytest.approx(
        code_gap(features_ND, features_ND + 0.1, everything)["gap"]
    )  # no unit


def test_a_gap_that_would_not_be_a_number_is_absent() -> None:
    features_ND, codes_KD, used_K = torch.randn(50, 3), torch.randn(8, 3), torch.arange(8) < 3
    assert code_gap(torch.full((50, 3), 0.1), codes_KD, used_K) == {}  # no variance
    assert code_gap(1e-170 * features_ND.double(), codes_KD, used_K) == {}  # hardly any
    for value in (math.nan, math.inf):
        broken_ND, broken_KD = features_ND.clone(), codes_KD.clone()
        broken_ND[7, 1] = broken_KD[5, 2] = value
        assert code_gap(broken_ND, codes_KD, used_K) == code_gap(features_ND, broken_KD, used_K) == {}
    assert code_gap(features_ND, codes_KD, None).keys() == {"gap", "gap_angular"}
