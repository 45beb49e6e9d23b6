"""Effective dimension against numpy on known spectra, what must not change it, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibq.metrics.dimension import DIMENSIONS, Moments, dimension_metrics, effective_dimension, used_codes

CPU = torch.device("cpu")


def dimension_of(points_ND: torch.Tensor, weights_N: torch.Tensor | None = None) -> tuple[float, int] | None:
    moments = Moments(points_ND.shape[1], CPU)
    moments.update(points_ND, weights_N)
    return effective_dimension(moments)


def cloud(spectrum: list[float], n: int = 300, seed: int = 0) -> torch.Tensor:
    """Points (N, D) whose covariance has exactly these eigenvalues, in no particular directions, away from the
    origin."""
    generator = torch.Generator().manual_seed(seed)
    D = len(spectrum)
    centered_ND = torch.randn(n, D, dtype=torch.float64, generator=generator)
    axes_ND, _ = torch.linalg.qr(centered_ND - centered_ND.mean(0))  # orthonormal, and still of mean 0
    rotation_DD, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator))
    return math.sqrt(n) * axes_ND * torch.tensor(spectrum, dtype=torch.float64).sqrt() @ rotation_DD + 3


def by_numpy(points_ND: torch.Tensor, weights_N: torch.Tensor | None = None) -> tuple[float, int]:
    """As the paper has it, from numpy's own covariance and its singular values."""
    weights = None if weights_N is None else weights_N.numpy()
    covariance = np.cov(points_ND.double().numpy().T, bias=True, aweights=weights)
    shares = np.linalg.svd(np.atleast_2d(covariance), compute_uv=False)
    shares /= shares.sum()
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return math.exp(entropy), next(d for d in range(1, len(shares) + 1) if shares[:d].sum() >= 0.99 - 1e-9)


# --- Known spectra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spectrum", "participation", "d_99"),
    [
        ([1.0] * 8, 8, 8),
        ([7.0] * 3 + [0.0] * 61, 3, 3),
        ([1.0] * 100, 100, 99),  # the last one of a hundred is the 1% that may be missing
        ([0.98, 0.01, 0.01], math.exp(-(0.98 * math.log(0.98) + 0.02 * math.log(0.01))), 2),
        ([0.5, 0.25, 0.125, 0.125], 2**1.75, 4),
        ([1.0], 1, 1),
        ([1.0, 1e-30], 1, 1),
    ],
)
def test_known_spectra(spectrum: list[float], participation: float, d_99: int) -> None:
    found = dimension_of(cloud(spectrum))
    assert found is not None
    assert found[0] == pytest.approx(participation, rel=1e-9)
    assert found[1] == d_99


@pytest.mark.parametrize(("n", "D"), [(500, 6), (40, 64), (2, 9), (3000, 32)])
def test_equals_numpy_with_weights_and_without(n: int, D: int) -> None:
    generator = torch.Generator().manual_seed(n)
    points_ND = torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator).cumsum(1) + 5
    weights_N = torch.randint(1, 50, (n,), generator=generator)
    for weights in (None, weights_N):
        found, expected = dimension_of(points_ND, weights), by_numpy(points_ND, weights)
        assert found is not None
        assert found[0] == pytest.approx(expected[0], rel=1e-9)
        assert found[1] == expected[1]
        assert found[1] <= min(n - 1, D)


# --- What must not matter ---------------------------------------------------------------------------------------------


@given(
    spectrum=st.lists(st.floats(1e-4, 1), min_size=2, max_size=12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-20, 1e-3, 7.0, 1e20]),
    shift=st.floats(-100, 100),
)
def test_rotation_translation_and_scale_do_not_matter(
    spectrum: list[float], seed: int, scale: float, shift: float
) -> None:
    points_ND = cloud(spectrum, n=40)
    rotation_DD, _ = torch.linalg.qr(
        torch.randn(len(spectrum), len(spectrum), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    found, moved = dimension_of(points_ND), dimension_of(scale * (points_ND @ rotation_DD + shift))
    assert found is not None
    assert moved is not None
    assert moved[0] == pytest.approx(found[0], rel=1e-9)
    assert moved[1] == found[1]
    assert 1 <= found[0] <= len(spectrum) * (1 + 1e-12)
    assert found[1] >= 1


def test_weights_are_repeated_rows_and_batches_are_one_cloud() -> None:
    generator = torch.Generator().manual_seed(1)
    points_ND = torch.randn(60, 7, generator=generator) * torch.arange(1, 8)
    weights_N = torch.randint(0, 5, (60,), generator=generator)
    repeated, weighted = points_ND.repeat_interleave(weights_N, dim=0), Moments(7, CPU)
    for part in (slice(0, 1), slice(1, 1), slice(1, 40), slice(40, 60)):
        weighted.update(points_ND[part], weights_N[part])
    whole = Moments(7, CPU)
    whole.update(repeated)
    torch.testing.assert_close(weighted.mean_D, repeated.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weighted.scatter_DD, whole.scatter_DD, rtol=1e-11, atol=1e-11)
    assert weighted.weight == whole.weight == len(repeated)
    assert effective_dimension(weighted) == pytest.approx(effective_dimension(whole), rel=1e-11)
    assert effective_dimension(weighted) != pytest.approx(dimension_of(points_ND), rel=1e-3)


def test_more_points_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points_ND, weights_N = cloud([3.0, 2.0, 1.0]), torch.arange(300)
    whole = dimension_of(points_ND, weights_N)
    monkeypatch.setattr("ibq.metrics.dimension.AT_ONCE", 7)
    assert dimension_of(points_ND, weights_N) == pytest.approx(whole, rel=1e-12)


# --- Limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e30])
def test_points_that_are_all_the_same_have_no_dimension(value: float) -> None:
    for n in (1, 2, 50):
        assert dimension_of(torch.full((n, 5), value)) == (0, 0)
    assert dimension_of(torch.randn(4, 5), torch.tensor([0, 3, 0, 0])) == (0, 0)
    nearly = value + torch.tensor([0.0, 2**-24, -(2**-24)])[:, None] * abs(value)
    assert dimension_of(nearly.expand(3, 5)) == (0, 0)  # as float32 rounds


def test_no_points_and_points_that_are_not_finite_have_none() -> None:
    assert dimension_of(torch.empty(0, 5)) is None
    assert dimension_of(torch.randn(4, 5), torch.zeros(4)) is None
    for value in (math.nan, math.inf, -math.inf):
        points_ND = torch.randn(9, 5)
        points_ND[3, 2] = value
        assert dimension_of(points_ND) is None
    assert dimension_of(1e200 * torch.randn(9, 5, dtype=torch.float64)) is None  # its square overflows


# --- Of features, codes and codes in use ------------------------------------------------------------------------------


def test_the_six_numbers_are_of_features_all_codes_and_codes_in_use() -> None:
    features_ND, codebook_KD = cloud([4.0, 2.0, 1.0, 1.0]), cloud([1.0, 1.0, 1.0, 1.0], n=40, seed=2)
    counts_K = torch.zeros(40, dtype=torch.int64)
    counts_K[[3, 7, 21]] = torch.tensor([5, 1, 30])  # three points lie in a plane
    features = Moments(4, CPU)
    features.update(features_ND)
    found = dimension_metrics(features, codebook_KD, counts_K)
    assert tuple(found) == DIMENSIONS
    assert found["dimension_features"] == pytest.approx(2**1.75)
    assert found["dimension_codes"] == pytest.approx(4)
    assert found["dimension99_codes"] == 4
    assert (found["dimension_used"], found["dimension99_used"]) == pytest.approx(
        by_numpy(codebook_KD[[3, 7, 21]], torch.tensor([5, 1, 30]))
    )
    assert found["dimension_used"] < 2


def test_what_is_not_there_is_absent() -> None:
    features = Moments(4, CPU)
    features.update(cloud([4.0, 2.0, 1.0, 1.0]))
    of_features = {"dimension_features", "dimension99_features"}
    assert dimension_metrics(features, None, torch.zeros(0, dtype=torch.int64)).keys() == of_features
    codebook_KD, nothing = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    assert dimension_metrics(features, codebook_KD, nothing).keys() == of_features | {
        "dimension_codes",
        "dimension99_codes",
    }
    broken_KD = codebook_KD.clone()
    broken_KD[2] = math.nan
    counts_K = torch.tensor([1, 1, 0, 0, 1, 0])
    of_used = {"dimension_used", "dimension99_used"}
    assert dimension_metrics(features, broken_KD, counts_K).keys() == of_features | of_used  # code 2 is not in use


def test_of_more_codes_than_are_looked_at_the_same_are_drawn_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook_KD, counts_K = torch.randn(900, 5, generator=generator), torch.arange(900) % 2
    features = Moments(5, CPU)
    features.update(codebook_KD)
    drawn, again, whole = (dimension_metrics(features, codebook_KD, counts_K, most) for most in (200, 200, None))
    assert drawn == again
    for name in ("dimension_codes", "dimension_used"):
        assert drawn[name] == pytest.approx(whole[name], rel=0.02)
        assert drawn[name] != whole[name]
    assert used_codes(codebook_KD, counts_K, 200).weight == 200
