"""Wasserstein VQ: the distance of two Gaussians, its gradient where matrices are singular."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from quantizer_variants import assert_refused

from ibq import build_quantizer
from ibq.losses import weighted_sum
from ibq.quantizers.wasserstein import distance_to_features, moments

DOUBLE = torch.float64


def by_scipy(features_ND: torch.Tensor, codes_KD: torch.Tensor) -> float:
    """The formula of the paper, with square roots of matrices."""
    z, c = features_ND.numpy(), codes_KD.detach().numpy()
    half = scipy.linalg.sqrtm(np.cov(z.T)).real
    cross = scipy.linalg.sqrtm(half @ np.cov(c.T) @ half).real
    return float(np.sqrt(((z.mean(0) - c.mean(0)) ** 2).sum() + np.trace(np.cov(z.T) + np.cov(c.T) - 2 * cross)))


def by_singular_values(features_ND: torch.Tensor, codes_KD: torch.Tensor) -> torch.Tensor:
    """tr (S_z^1/2 S_c S_z^1/2)^1/2 as the sum of the singular values of centred features times centred codes, which
    torch can differentiate."""
    z_ND, c_KD = (rows - rows.mean(0) for rows in (features_ND, codes_KD))
    z_ND, c_KD = z_ND / (len(z_ND) - 1) ** 0.5, c_KD / (len(c_KD) - 1) ** 0.5
    apart_D = features_ND.mean(0) - codes_KD.mean(0)
    cross = torch.linalg.svdvals(torch.linalg.qr(z_ND).R @ c_KD.T).sum()
    return (apart_D.square().sum() + z_ND.square().sum() + c_KD.square().sum() - 2 * cross).sqrt()


def clouds(N: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and codes of different means, scales and directions."""
    z_ND = torch.randn(N, D, dtype=DOUBLE) @ torch.randn(D, D, dtype=DOUBLE) + 0.5
    return z_ND, (0.3 * torch.randn(K, D, dtype=DOUBLE)).requires_grad_()


def mine(features_ND: torch.Tensor, codes_KD: torch.Tensor) -> torch.Tensor:
    return distance_to_features(codes_KD, *moments(features_ND))


@pytest.mark.parametrize(("N", "K", "D"), [(200, 64, 6), (5000, 300, 16), (50, 20, 1)])
def test_distance_and_gradient_are_those_of_the_formula(N: int, K: int, D: int) -> None:
    z_ND, codes_KD = clouds(N, K, D)
    distance, expected = mine(z_ND, codes_KD), by_singular_values(z_ND, codes_KD)
    torch.testing.assert_close(distance, expected, rtol=1e-12, atol=0)
    if D > 1:
        assert distance.item() == pytest.approx(by_scipy(z_ND, codes_KD), rel=1e-12)
    gradients = [torch.autograd.grad(each, codes_KD)[0] for each in (distance, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)
    assert (gradients[0].abs().sum(1) > 0).all()


def test_equal_spectra_have_the_gradient_that_differentiated_eigenvectors_have_not() -> None:
    """Both covariances are multiples of the identity: a backward pass through eigh divides by gaps of zero."""
    D = 4
    codes_KD = torch.cat([torch.eye(D), -torch.eye(D)]).double().requires_grad_()
    distance = mine(2 * codes_KD.detach(), codes_KD)
    assert distance.item() == pytest.approx((2 * D / 7) ** 0.5)
    (gradient_KD,) = torch.autograd.grad(distance, codes_KD)
    torch.testing.assert_close(gradient_KD, -codes_KD.detach() / 7 / distance.detach())

    covariance_DD = torch.eye(D, dtype=DOUBLE) * 8 / 7
    eigenvalues_D = torch.linalg.eigh(covariance_DD @ torch.cov(codes_KD.T))
    (naive_KD,) = torch.autograd.grad(eigenvalues_D.eigenvectors.square()[0, 0], codes_KD)
    assert not naive_KD.isfinite().all()


SINGULAR = {
    "fewer codes than dimensions": (200, 3, 6),
    "fewer features than dimensions": (4, 64, 6),
    "fewer of both": (4, 3, 6),
}


@pytest.mark.parametrize(("N", "K", "D"), SINGULAR.values(), ids=SINGULAR)
def test_singular_covariances_have_a_gradient_that_descends(N: int, K: int, D: int) -> None:
    """No derivative for the covariance, but a right one for the codes: of all directions in which they can move."""
    z_ND, codes_KD = clouds(N, K, D)
    distance = mine(z_ND, codes_KD)
    assert distance.item() == pytest.approx(by_singular_values(z_ND, codes_KD).item(), rel=1e-7)
    (gradient_KD,) = torch.autograd.grad(distance, codes_KD)
    assert gradient_KD.isfinite().all()
    step = 1e-3 * distance.detach() / gradient_KD.norm()
    moved = mine(z_ND, codes_KD.detach() - step * gradient_KD)
    assert (distance - moved).item() == pytest.approx(step.item() * gradient_KD.square().sum().item(), rel=0.1)


def flat(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    z_ND, codes_KD = clouds(N, K, 5)
    return z_ND * torch.tensor([1, 1, 0, 0, 0]), codes_KD.detach() * torch.tensor([0, 1, 1, 0, 0])


DEGENERATE = {
    "one feature": (torch.randn(1, 5), torch.randn(8, 5)),
    "one code": (torch.randn(50, 5), torch.randn(1, 5)),
    "one of both": (torch.randn(1, 5), torch.randn(1, 5)),
    "equal features": (torch.full((50, 5), 0.3), torch.randn(8, 5)),
    "equal codes": (torch.randn(50, 5), torch.full((8, 5), 0.3)),
    "all equal": (torch.full((50, 5), 0.3), torch.full((8, 5), 0.3)),
    "zeros": (torch.zeros(50, 5), torch.zeros(8, 5)),
    "channels of zero variance": flat(50, 8),
    "far from the origin": (torch.randn(50, 5) + 1e6, torch.randn(8, 5) - 1e6),
    "as short as codes begin": (torch.randn(50, 5), torch.randn(8, 5) * 1e-20),
    "as long as float32 goes": (torch.randn(50, 5) * 1e30, torch.randn(8, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("features_ND", "codes_KD"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_clouds_have_finite_and_bounded_gradients(
    features_ND: torch.Tensor, codes_KD: torch.Tensor, dtype: torch.dtype
) -> None:
    """A code that moves by a step moves the distance by no more than the step over the root of K - 1."""
    codes_KD = codes_KD.to(dtype).requires_grad_()
    distance = mine(features_ND.to(dtype), codes_KD)
    assert distance.dtype == dtype
    assert distance.isfinite()
    (gradient_KD,) = torch.autograd.grad(distance, codes_KD)
    assert gradient_KD.isfinite().all()
    assert gradient_KD.norm() <= 1.01 / max(len(codes_KD) - 1, 1) ** 0.5


def test_codes_that_equal_the_features_stay() -> None:
    """The distance is rounding, and has no gradient to speak of."""
    z_ND = torch.randn(64, 6, dtype=DOUBLE)
    codes_KD = z_ND.clone().requires_grad_()
    distance = mine(z_ND, codes_KD)
    assert distance < 1e-6
    (gradient_KD,) = torch.autograd.grad(distance, codes_KD)
    assert gradient_KD.norm() < 1e-6


def test_float32_is_as_near_as_float32_can_be() -> None:
    """The matrices are float64 whatever the codes are; what is left is that features and codes were rounded."""
    z_ND, codes_KD = clouds(2000, 64, 16)
    z_ND, codes_KD = z_ND.float() + 100, codes_KD.detach().float() + 100
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf_KD = codes_KD.to(dtype).requires_grad_()
        distance = mine(z_ND.to(dtype), leaf_KD)
        found.append((distance.detach(), *torch.autograd.grad(distance, leaf_KD)))
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=1e-9)


def test_descending_the_distance_alone_makes_the_codes_gaussian_that_of_the_features() -> None:
    z_ND, codes_KD = clouds(2000, 128, 4)
    adam = torch.optim.Adam([codes_KD], lr=0.05)
    first = mine(z_ND, codes_KD).item()
    for step in range(300):
        adam.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        adam.zero_grad()
        mine(z_ND, codes_KD).backward()
        adam.step()
    assert mine(z_ND, codes_KD).item() < 0.01 * first
    torch.testing.assert_close(codes_KD.mean(0), z_ND.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.cov(codes_KD.T), torch.cov(z_ND.T), rtol=0.05, atol=0.05)


# --- The quantizer ----------------------------------------------------------------------------------------------------


def make(**fields: Any) -> Any:
    return build_quantizer(
        {"method": "wasserstein", "codebook_size": 32, "code_dim": 6, "codebook_init": "normal"} | fields
    )


def test_but_for_its_term_it_is_vq() -> None:
    quantizer = make(beta=0.3, wasserstein_weight=0.7)
    plain = build_quantizer({"method": "vq", "codebook_size": 32, "code_dim": 6, "beta": 0.3, "beta_on": "commitment"})
    with torch.no_grad():
        plain.embedding.copy_(quantizer.embedding)
    z_BDHW = torch.randn(2, 6, 3, 4)
    mine, theirs = quantizer(z_BDHW), plain(z_BDHW)
    assert torch.equal(mine.z_q, theirs.z_q)
    assert torch.equal(mine.indices, theirs.indices)
    distance = distance_to_features(quantizer.embedding, *moments(z_BDHW.movedim(1, -1).flatten(0, -2)))
    expected = weighted_sum(theirs.losses, plain.config.loss_weights) + 0.7 * distance
    torch.testing.assert_close(weighted_sum(mine.losses, quantizer.config.loss_weights), expected)


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"beta": -1}, ("beta", "greater than or equal to 0")),
        ({"wasserstein_weight": 0}, ("wasserstein_weight", "greater than 0")),
        ({"entropy_weight": 0.05}, ("entropy_weight",)),
    ],
    ids=str,
)
def test_fields_out_of_range_are_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "wasserstein"} | fields, *mentions)
