"""Fixed unit vectors: what the points are, and the quantizer that chooses among them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantizer_variants import assert_refused
from scipy.special import betaincinv

from ibq import build_quantizer
from ibq.quantizers import Quantizer
from ibq.quantizers.sphere import fibonacci_points, golay_words, leech_points, polar_angle, random_points

LEECH = {"points": "leech", "codebook_size": 196_560, "code_dim": 24}


def make(**fields: Any) -> Quantizer:
    return build_quantizer({"method": "spherical", "codebook_size": 64, "code_dim": 6} | fields)


# --- Points -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leech() -> np.ndarray:
    return np.rint(leech_points() * math.sqrt(32)).astype(int)


def test_the_golay_code_has_the_weights_that_it_is_known_for() -> None:
    words = golay_words()
    weights, counts = np.unique(words.sum(1), return_counts=True)
    assert dict(zip(weights.tolist(), counts.tolist(), strict=True)) == {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}
    assert len(np.unique(words, axis=0)) == 4096


def test_the_leech_vectors_are_of_three_shapes_all_of_them_distinct_and_of_one_length(leech: np.ndarray) -> None:
    assert np.abs(leech_points() * math.sqrt(32) - leech).max() < 1e-12
    assert np.array_equal((leech**2).sum(1), np.full(196_560, 32))
    entries = {value: (np.abs(leech) == value).sum(1) for value in range(5)}
    for of_shape, count in (({0: 22, 4: 2}, 1_104), ({0: 16, 2: 8}, 97_152), ({1: 23, 3: 1}, 98_304)):
        assert np.all([entries[value] == number for value, number in of_shape.items()], axis=0).sum() == count
    assert len(np.unique(leech.astype(np.int8).view("V24"))) == 196_560


def test_seen_from_any_leech_vector_the_others_lie_at_the_known_angles(leech: np.ndarray) -> None:
    """Inner products 32, 16, 8, 0 and their negatives, over 32: a spherical 11-design."""
    expected = {-32: 1, -16: 4600, -8: 47_104, 0: 93_150, 8: 47_104, 16: 4600, 32: 1}
    for i in (0, 1_103, 1_104, 70_000, 98_256, 150_000, 196_559):
        products, counts = np.unique(leech @ leech[i], return_counts=True)
        assert dict(zip(products.tolist(), counts.tolist(), strict=True)) == expected


def test_the_fibonacci_lattice_of_three_dimensions_is_the_well_known_one() -> None:
    """Equal steps along the axis, and turns by the golden ratio."""
    points_KD = fibonacci_points(100, 3)
    i_K = np.arange(100)
    np.testing.assert_allclose(points_KD[:, 0], 1 - 2 * (i_K + 0.5) / 100, atol=1e-7)
    turns_K = np.arctan2(points_KD[:, 2], points_KD[:, 1]) / (2 * math.pi)
    np.testing.assert_allclose(np.mod(turns_K - i_K * (math.sqrt(5) - 1) / 2 + 0.5, 1), 0.5, atol=1e-9)
    angles_K = np.unwrap(np.arctan2(*fibonacci_points(10, 2).T[::-1]))
    np.testing.assert_allclose(np.diff(angles_K), 2 * math.pi / 10)


@pytest.mark.parametrize("power", [1, 2, 5, 62, 254])
def test_polar_angles_are_the_quantiles_of_their_density(power: int) -> None:
    """cos^2 of an angle of density sin^power is beta distributed."""
    share_K = np.linspace(0.001, 0.999, 777)
    below_K = np.minimum(share_K, 1 - share_K)
    cosine_K = np.sqrt(1 - betaincinv((power + 1) / 2, 0.5, 2 * below_K)) * np.where(share_K < 0.5, 1, -1)
    np.testing.assert_allclose(np.cos(polar_angle(share_K, power)), cosine_K, atol=2e-6)


@pytest.mark.parametrize("D", [2, 3, 4, 8, 24])
def test_points_of_either_kind_are_centred_unit_vectors_without_a_direction(D: int) -> None:
    K = 2048
    for points_KD in (random_points(K, D, seed=1), fibonacci_points(K, D)):
        np.testing.assert_allclose(np.linalg.norm(points_KD, axis=1), 1, rtol=1e-12)
        assert np.abs(points_KD.mean(0)).max() < 5 / math.sqrt(K * D)
        np.testing.assert_allclose(points_KD.T @ points_KD / K, np.eye(D) / D, atol=8 / math.sqrt(K) / D)
    assert np.array_equal(random_points(5, D, 1), random_points(5, D, 1))
    assert not np.array_equal(random_points(5, D, 1), random_points(5, D, 2))


@pytest.mark.parametrize("D", [3, 4, 6, 8])
def test_a_fibonacci_lattice_is_closer_to_all_directions_than_random_points(D: int) -> None:
    unit_ND = random_points(4000, D, seed=9)
    nearest = [(unit_ND @ points.T).max(1).mean() for points in (random_points(1024, D, 0), fibonacci_points(1024, D))]
    assert nearest[1] > nearest[0]


# --- The quantizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"points": "fibonacci"}, LEECH], ids=["random", "fibonacci", "leech"])
def test_the_code_of_the_largest_cosine_and_the_gradient_of_the_normalised_features(fields: dict[str, Any]) -> None:
    """In float64: argmax of the inner products, and the straight-through copy past z / |z|."""
    quantizer = make(**fields).double()
    z_ND = torch.randn(200, quantizer.config.code_dim, dtype=torch.float64, requires_grad=True)
    z_q_ND, indices_N, losses = quantizer.quantize(z_ND)
    assert losses == {}
    codebook_KD = quantizer.codebook
    assert torch.equal(indices_N, (z_ND @ codebook_KD.T).argmax(1))
    assert torch.equal(z_q_ND, codebook_KD[indices_N])
    torch.testing.assert_close(codebook_KD.norm(dim=1), torch.ones(len(codebook_KD), dtype=torch.float64))
    g_ND = torch.randn_like(z_ND)
    expected = torch.autograd.grad(F.normalize(z_ND), [z_ND], g_ND)[0]
    torch.testing.assert_close(torch.autograd.grad(z_q_ND, [z_ND], g_ND)[0], expected, rtol=1e-12, atol=1e-14)
    assert ((g_ND - expected * z_ND.norm(dim=1, keepdim=True)) * z_ND).sum(1).abs().max() > 0, "not the copy itself"


def test_codes_follow_from_the_config_and_nothing_else_is_kept() -> None:
    quantizer = make(points_seed=3)
    assert quantizer.state_dict() == {}
    assert list(quantizer.parameters()) == []
    assert torch.equal(quantizer.codebook, make(points_seed=3).codebook)
    assert not torch.equal(quantizer.codebook, make(points_seed=4).codebook)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_cast_rounds_codes_that_no_state_dict_brings_back() -> None:
    quantizer = make()
    codes_KD = quantizer.codebook.clone()
    for cast in (quantizer.bfloat16(), copy.deepcopy(quantizer).half().float(), quantizer.double().float()):
        assert torch.equal(cast.codebook, codes_KD)
    assert make().bfloat16()(torch.randn(1, 6, 2, 2)).z_q.dtype == torch.bfloat16


def test_leech_codes_take_19_megabytes_and_no_matrix_of_distances() -> None:
    quantizer = make(**LEECH)
    assert quantizer.codebook.numel() * quantizer.codebook.element_size() == 196_560 * 24 * 4
    quantized = quantizer(torch.randn(2, 24, 4, 4))
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"points": "leech"}, ("codebook_size=1024 and code_dim=64", "set 196560 and 24", "points='fibonacci'")),
        ({"points": "fibonacci", "points_seed": 3}, ("points_seed=3", "points='fibonacci'", "leave it out")),
        ({"code_dim": 1}, ("code_dim", "greater than or equal to 2")),
        ({"points": "spiral"}, ("points", "'leech'")),
    ],
    ids=str,
)
def test_points_that_do_not_exist_are_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "spherical"} | fields, *mentions)
