"""Remedies for the collapse of VQ: moving averages, restarts, online clustering, k-means, rotation, linear codes,
unit length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantizer_variants import assert_refused

from ibq import VectorQuantizer, VQConfig, build_quantizer
from ibq.quantizers.base import rotation
from ibq.quantizers.updates import kmeans

K, D = 16, 4
EMA = {"ema_decay": 0.9, "beta_on": "commitment"}


def make(**fields: Any) -> VectorQuantizer:
    quantizer = build_quantizer({"method": "vq", "codebook_size": K, "code_dim": D, "codebook_init": "normal"} | fields)
    assert isinstance(quantizer, VectorQuantizer)
    return quantizer


def grid(z_ND: torch.Tensor) -> torch.Tensor:
    """Features (N, D) as a map (1, D, 1, N)."""
    return z_ND.T[None, :, None]


def at_codes(quantizer: VectorQuantizer, chosen: list[int]) -> torch.Tensor:
    """Features that lie on some codes."""
    return grid(quantizer.codebook.detach()[chosen])


def distance_to_nearest(codes_KD: torch.Tensor, features_MD: torch.Tensor) -> torch.Tensor:
    return (codes_KD[:, None] - features_MD).norm(dim=2).min(1).values


# --- Moving averages --------------------------------------------------------------------------------------------------


def test_codes_move_by_the_formula_and_only_at_the_next_training_forward() -> None:
    quantizer = make(**EMA)
    start_KD, z_ND = quantizer.codebook.clone(), torch.randn(50, D)
    indices = quantizer(grid(z_ND)).indices.flatten()
    assert torch.equal(quantizer.codebook, start_KD)
    quantizer.eval()(grid(z_ND))
    assert torch.equal(quantizer.codebook, start_KD), "evaluation moved the codes"
    quantizer.train()(grid(torch.randn(3, D)))
    onehot_KN = F.one_hot(indices, K).float().T
    counts_K = 0.9 + 0.1 * onehot_KN.sum(1)
    smoothed_K = (counts_K + 1e-5) / (counts_K.sum() + K * 1e-5) * counts_K.sum()
    torch.testing.assert_close(quantizer.codebook, (0.9 * start_KD + 0.1 * onehot_KN @ z_ND) / smoothed_K[:, None])


def test_moving_averages_start_from_the_initialised_codes() -> None:
    quantizer, features_MD = make(**EMA, codebook_init="features"), torch.randn(3 * K, D)
    quantizer.initialize_from(features_MD, torch.Generator().manual_seed(0))
    start_KD = quantizer.codebook.clone()
    for _ in range(2):
        quantizer(at_codes(quantizer, list(range(K))))  # features on the codes keep them where they are
    torch.testing.assert_close(quantizer.codebook, start_KD, rtol=1e-4, atol=1e-5)


def test_moving_averages_have_no_gradient_and_no_codebook_term() -> None:
    quantizer = make(**EMA, beta=0.25)
    assert [parameter.requires_grad for parameter in quantizer.parameters()] == [False]
    assert quantizer.config.loss_weights == {"commitment": 0.25}


# --- Restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [{}, EMA], ids=["gradient", "moving average"])
def test_codes_without_tokens_restart_on_distinct_features_and_the_others_stay(ema: dict[str, Any]) -> None:
    quantizer = make(**ema, restart="dead", usage_decay=0.5, restart_threshold=0.3)
    start_KD = quantizer.codebook.detach().clone()
    z_BDHW = at_codes(quantizer, [0, 1, 2, 3] * 10)
    z_BDHW = z_BDHW + 1e-3 * torch.randn_like(z_BDHW)
    for _ in range(2):  # usage 1, 0.5, 0.25: dead after the second
        quantized = quantizer(z_BDHW)
        torch.testing.assert_close(quantizer.codebook.detach()[4:], start_KD[4:], rtol=1e-4, atol=1e-5)
        assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)
    quantizer(z_BDHW)
    codebook_KD, features_ND = quantizer.codebook.detach(), z_BDHW[0, :, 0].T
    torch.testing.assert_close(codebook_KD[:4], start_KD[:4], rtol=1e-2, atol=1e-2)
    assert (distance_to_nearest(codebook_KD[4:], features_ND) == 0).all()
    assert len({tuple(code) for code in codebook_KD.tolist()}) == K
    assert (quantizer.restart.usage_K[4:] >= 0.5).all(), (
        "a restarted code has its usage back and is not restarted at once"
    )


def test_more_dead_codes_than_features_wait_for_the_next_batch() -> None:
    quantizer = make(restart="dead", usage_decay=0.1, restart_threshold=0.5)
    z_BDHW = at_codes(quantizer, [0, 1])
    quantizer(z_BDHW)
    assert quantizer.restart.weight_K.sum() == 2
    quantizer(z_BDHW)
    assert (distance_to_nearest(quantizer.codebook.detach(), z_BDHW[0, :, 0].T) == 0).sum() == 4


def test_a_restarted_moving_average_begins_anew() -> None:
    quantizer = make(**EMA, restart="dead", usage_decay=0.1, restart_threshold=0.5)
    z_BDHW = at_codes(quantizer, [0] * 40)
    quantizer(z_BDHW)
    tokens_K = torch.bincount(quantizer(z_BDHW).indices.flatten(), minlength=K)
    torch.testing.assert_close(
        quantizer.moving_average.counts_K[1:], (0.9 + 0.1 * tokens_K)[1:]
    )  # from one feature each


def test_online_clustering_is_the_papers_formula() -> None:
    """One feature only, so that every anchor is known; usage after one forward is (1 - decay) times the share over
    1/K."""
    quantizer = make(restart="online", usage_decay=0.9)
    start_KD, feature_D = quantizer.codebook.detach().clone(), torch.randn(D)
    chosen = quantizer(grid(feature_D.expand(3, D))).indices.unique().item()
    quantizer(grid(feature_D.expand(3, D)))
    usage_K = torch.zeros(K)
    usage_K[chosen] = 0.1
    alpha_K = torch.exp(-usage_K * K * 10 / (1 - 0.9) - 1e-3)
    assert alpha_K[chosen] < 1e-6 < 0.99 < alpha_K.max()
    expected_KD = (1 - alpha_K)[:, None] * start_KD + alpha_K[:, None] * feature_D
    torch.testing.assert_close(quantizer.codebook.detach(), expected_KD)


def test_the_anchor_of_a_code_is_most_likely_a_near_feature() -> None:
    quantizer = make(restart="online")
    far_ND, near_ND = 30 + torch.randn(K, D), quantizer.codebook.detach() + 0.1 * torch.randn(K, D)
    quantizer(grid(torch.cat([far_ND, near_ND])))
    assert (distance_to_nearest(quantizer.restart.anchors_KD, near_ND) == 0).all()


def test_restarts_keep_a_codebook_alive_that_dies_without() -> None:
    """Features far from most codes: a few codes win all of them, unless the others are sent there."""
    torch.manual_seed(3)
    z_BDHW = grid(5 + torch.randn(200, D))
    used = {}
    for restart in ("none", "dead", "online"):
        torch.manual_seed(0)
        quantizer = make(restart=restart, usage_decay=0.5, restart_threshold=0.3)
        for _ in range(8):
            indices = quantizer(z_BDHW).indices
        used[restart] = len(indices.unique())
    assert used["none"] <= 4
    assert used["dead"] > 10
    assert used["online"] > 10


@pytest.mark.parametrize("restart", ["dead", "online"])
def test_the_average_of_a_code_moves_to_it_by_the_weight_that_moved_the_code(restart: str) -> None:
    quantizer, average = (make(restart=restart, usage_decay=0.5, restart_threshold=0.6) for _ in range(2))
    quantizer(at_codes(quantizer, [0, 1, 2]))
    weight_K, start_KD = quantizer.restart.weight_K.clone(), average.embedding.detach().clone()
    quantizer(torch.randn(1, D, 2, 2))
    quantizer.sync_average(average)
    assert 0 < weight_K.sum() < K
    expected_KD = start_KD + weight_K[:, None] * (quantizer.embedding.detach() - start_KD)
    torch.testing.assert_close(average.embedding.detach(), expected_KD)
    assert torch.equal(average.embedding[weight_K == 1], quantizer.embedding[weight_K == 1])


# --- k-means ----------------------------------------------------------------------------------------------------------


def blobs(centers: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    centers_KD = 10 * torch.randn(centers, D)
    return centers_KD, (centers_KD[:, None] + 0.1 * torch.randn(centers, each, D)).flatten(0, 1)


def test_kmeans_finds_well_separated_clusters() -> None:
    centers_KD, features_MD = blobs(3, 200)
    found_KD = kmeans(features_MD, 3, torch.Generator().manual_seed(2), iterations=20)
    assert distance_to_nearest(centers_KD, found_KD).max() < 0.1


def test_kmeans_is_closer_to_features_than_a_draw_of_them_and_repeatable() -> None:
    features_MD = torch.randn(400, D)
    drawn_KD = features_MD[torch.randperm(400, generator=torch.Generator().manual_seed(0))[:K]]
    first, again = (kmeans(features_MD, K, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert (
        distance_to_nearest(features_MD, first).square().mean()
        < 0.75 * distance_to_nearest(features_MD, drawn_KD).square().mean()
    )


def test_empty_clusters_move_to_features_that_are_far_from_their_center() -> None:
    """Equal features first: of the equal centers that they give all but one are empty, until they find the other
    features."""
    features_MD = torch.cat([torch.zeros(50, D), torch.eye(D)])
    centers_KD = kmeans(features_MD, D + 1, torch.Generator().manual_seed(0))
    assert distance_to_nearest(features_MD, centers_KD).max() < 1e-6


def test_kmeans_initialisation_of_a_cosine_codebook_is_on_the_sphere() -> None:
    quantizer = make(codebook_init="kmeans", distance="cosine")
    assert quantizer.features_wanted == 4 * K
    with pytest.raises(ValueError, match="method='vq' begins at features and has seen none yet"):
        quantizer(torch.randn(1, D, 2, 2))
    features_MD = torch.rand(4 * K, 1) * torch.randn(4 * K, D)
    quantizer.initialize_from(features_MD, torch.Generator().manual_seed(0))
    error = 1 - (F.normalize(features_MD, dim=1) @ quantizer.codebook.T).max(1).values.mean()
    assert error < 0.15
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(K))


# --- Rotation, linear codes, unit length ------------------------------------------------------------------------------


def test_the_rotation_trick_turns_the_gradient_as_it_turns_z() -> None:
    z_ND = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    q_ND, g_ND = torch.randn(20, D, dtype=torch.float64), torch.randn(20, D, dtype=torch.float64)
    z_q_ND = rotation(z_ND, q_ND)
    assert torch.equal(z_q_ND, q_ND)
    (dz_ND,) = torch.autograd.grad(z_q_ND, [z_ND], g_ND)
    for z, q, g, dz in zip(z_ND.detach(), q_ND, g_ND, dz_ND, strict=True):
        one, other = z / z.norm(), q / q.norm()
        half = (one + other) / (one + other).norm()
        R = torch.eye(D, dtype=torch.float64) - 2 * torch.outer(half, half) + 2 * torch.outer(other, one)
        torch.testing.assert_close(R @ R.T, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-10)
        torch.testing.assert_close(R @ one, other, rtol=0, atol=1e-10)
        torch.testing.assert_close(dz, q.norm() / z.norm() * R.T @ g, rtol=1e-10, atol=1e-10)
        angles = [torch.dot(g, q) / (g.norm() * q.norm()), torch.dot(dz, z) / (dz.norm() * z.norm())]
        torch.testing.assert_close(*angles, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("z", [[0.0, 0.0], [-1.0, -2.0]], ids=["zero", "opposite"])
def test_the_rotation_trick_is_finite_where_no_rotation_is_defined(z: list[float]) -> None:
    z_ND, q_ND = torch.tensor([z], requires_grad=True), torch.tensor([[1.0, 2.0]])
    z_q_ND = rotation(z_ND, q_ND)
    assert torch.equal(z_q_ND, q_ND)
    assert torch.autograd.grad(z_q_ND.sum(), [z_ND])[0].isfinite().all()


def test_linear_codes_begin_as_the_embedding_and_all_move_with_the_selected_ones() -> None:
    quantizer = make(reparametrization="linear")
    start_KD = quantizer.codebook.detach().clone()
    assert torch.equal(start_KD, quantizer.embedding)
    quantized = quantizer(torch.randn(1, D, 1, 3))
    quantized.losses["codebook"].backward()
    with torch.no_grad():
        quantizer.projection.weight -= 0.1 * quantizer.projection.weight.grad
    assert len(quantized.indices.unique()) < K
    assert ((quantizer.codebook - start_KD).norm(dim=1) > 0).all()


def test_cosine_distance_ignores_lengths_of_features_and_codes() -> None:
    quantizer, z_BDHW = make(distance="cosine"), torch.randn(2, D, 5, 5)
    before = quantizer(z_BDHW)
    with torch.no_grad():
        quantizer.embedding *= 3 * torch.rand(K, 1) + 0.1
    after = quantizer(z_BDHW * (torch.rand(2, 1, 5, 5) + 0.1))
    assert torch.equal(before.indices, after.indices)
    torch.testing.assert_close(before.z_q, after.z_q)
    similarity_BKHW = torch.einsum("bdhw,kd->bkhw", z_BDHW, quantizer.codebook.detach())
    assert torch.equal(before.indices, similarity_BKHW.argmax(1))
    torch.testing.assert_close(before.losses["commitment"], (F.normalize(z_BDHW, dim=1) - before.z_q).square().mean())


# --- What does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"ema_decay": 0.9}, ("ema_decay=0.9", "beta_on='codebook'", "set beta_on='commitment'")),
        ({**EMA, "beta_on": "both"}, ("ema_decay=0.9", "beta_on='both'", "set beta_on='commitment'")),
        ({**EMA, "reparametrization": "linear"}, ("ema_decay=0.9", "reparametrization='linear'", "set ema_decay=None")),
        ({**EMA, "restart": "online"}, ("ema_decay=0.9", "restart='online'", "restart='dead'")),
        (
            {"restart": "dead", "reparametrization": "linear"},
            ("restart='dead'", "reparametrization='linear'", "set restart='none'"),
        ),
        ({"restart": "online", "reparametrization": "linear"}, ("restart='online'", "'linear'")),
        ({"ema_decay": 1.0}, ("ema_decay", "less than 1")),
        ({"distance": "manhattan"}, ("distance", "'manhattan'", "cosine")),
        ({"restart_threshold": math.nan}, ("restart_threshold",)),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "vq", "codebook_size": K} | fields, *mentions)


def test_what_goes_together_may_be_combined() -> None:
    VQConfig(**EMA, restart="dead", distance="cosine", gradient="rotation", codebook_init="kmeans", entropy_weight=0.1)
    VQConfig(
        reparametrization="linear", distance="cosine", gradient="rotation", codebook_init="kmeans", entropy_weight=0.1
    )
    VQConfig(restart="online", distance="cosine", gradient="rotation", codebook_init="features")
