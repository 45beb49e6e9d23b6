"""NS-VQ: both forms of its codebook term against their formulas in float64, and where its kernel's width goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from largest_tensor import LargestTensor
from quantizer_variants import assert_refused

from ibq import NonStationaryQuantizer, VectorQuantizer, build_quantizer
from ibq.quantizers import nsvq

K, D, GRID = 50, 5, (2, 5, 4, 4)
every_form = pytest.mark.parametrize("spread", ["features", "codes"])


def make(**fields: Any) -> NonStationaryQuantizer:
    fields = {"method": "nsvq", "codebook_size": K, "code_dim": D, "codebook_init": "normal"} | fields
    quantizer = build_quantizer(fields)
    assert isinstance(quantizer, NonStationaryQuantizer)
    return quantizer


def features() -> torch.Tensor:
    return torch.randn(GRID, dtype=torch.float64) + 2


def tokens(z_BDHW: torch.Tensor) -> torch.Tensor:
    return z_BDHW.movedim(1, -1).flatten(0, 2)


def term_and_gradient(quantizer: NonStationaryQuantizer, z_BDHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    term = quantizer(z_BDHW).losses["codebook"]
    return term, torch.autograd.grad(term, [quantizer.embedding])[0]


def small_chunks(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> Iterator[slice]:
    return (slice(start, min(start + 7, len(z_ND))) for start in range(0, len(z_ND), 7))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("width", "strength"), [(1.0, 0.01), (4.0, 0.5), (0.05, 0.01)])
def test_the_released_term_is_its_formula(
    monkeypatch: pytest.MonkeyPatch, chunked: bool, width: float, strength: float
) -> None:
    if chunked:
        monkeypatch.setattr(nsvq, "chunks", small_chunks)
    quantizer, z_BDHW = make(width=width, strength=strength).double(), features()
    square_NK = (tokens(z_BDHW)[:, None] - quantizer.embedding).square().sum(2)
    weight_NK = (strength * K * (-square_NK / width).softmax(1)).clamp(max=1).detach()
    weight_NK.scatter_(1, square_NK.argmin(1, keepdim=True), 1)
    expected = (weight_NK * square_NK / D).sum(1).mean()
    actual, gradient_KD = term_and_gradient(quantizer, z_BDHW)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient_KD, torch.autograd.grad(expected, [quantizer.embedding])[0], rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("width", [0.5, 20.0])
def test_a_step_of_sgd_moves_each_unselected_code_by_the_kernels_sum_over_the_selected(
    monkeypatch: pytest.MonkeyPatch, chunked: bool, width: float
) -> None:
    """dc_j = sum_i k(c_i, c_j) dc_i, where dc_i is the step of plain VQ."""
    if chunked:
        monkeypatch.setattr(nsvq, "chunks", small_chunks)
    quantizer, z_BDHW = make(spread="codes", width=width).double(), features()
    plain = build_quantizer({"method": "vq", "codebook_size": K, "code_dim": D}).double()
    assert isinstance(plain, VectorQuantizer)
    plain.embedding.data.copy_(quantizer.embedding)
    steps = []
    for each in (plain, quantizer):
        optimizer = torch.optim.SGD([each.embedding], lr=0.3)
        each(z_BDHW).losses["codebook"].backward()
        before_KD = each.embedding.detach().clone()
        optimizer.step()
        steps.append(each.embedding.detach() - before_KD)
    dc_KD = steps[0]
    selected_K = dc_KD.any(1)
    assert 3 < selected_K.sum() < K
    kernel_KK = torch.exp(-(before_KD[:, None] - before_KD).square().sum(2) / width)
    for j in range(K):
        expected_D = dc_KD[j] + sum(kernel_KK[i, j] * dc_KD[i] for i in selected_K.nonzero().flatten() if i != j)
        torch.testing.assert_close(steps[1][j], expected_D, rtol=1e-9, atol=1e-12)


@every_form
def test_the_value_and_features_are_those_of_vq_where_the_kernel_is_narrow(spread: str) -> None:
    quantizer, z_BDHW = make(spread=spread, width=1e-8).double(), features().requires_grad_()
    z_q, indices, losses = quantizer(z_BDHW)
    codes_BDHW = quantizer.embedding[indices].movedim(-1, 1)
    expected = (z_BDHW.detach() - codes_BDHW).square().mean()
    torch.testing.assert_close(losses["codebook"], expected)
    gradients = [torch.autograd.grad(term, [quantizer.embedding])[0] for term in (losses["codebook"], expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(losses["commitment"], (z_BDHW - codes_BDHW.detach()).square().mean())
    g_BDHW = torch.randn(GRID, dtype=torch.float64)
    assert torch.equal(torch.autograd.grad(z_q, [z_BDHW], g_BDHW)[0], g_BDHW)


@every_form
def test_in_evaluation_the_term_is_that_of_vq(spread: str) -> None:
    quantizer, z_BDHW = make(spread=spread, width=9.0).double().eval(), features()
    term, gradient_KD = term_and_gradient(quantizer, z_BDHW)
    codes_BDHW = quantizer.indices_to_codes(quantizer(z_BDHW).indices)
    torch.testing.assert_close(term, (z_BDHW - codes_BDHW).square().mean())
    assert not gradient_KD.any(1).all()


def test_the_width_halves_with_the_steps_down_to_a_least_one() -> None:
    quantizer = make(width=3.0, halving_steps=10)
    assert quantizer.width == 3
    for step, expected in ((10, 1.5), (25, 3 * 2**-2.5), (30, 0.375), (1000, 1e-8)):
        quantizer.set_step(step)
        assert quantizer.width.item() == pytest.approx(expected, rel=1e-6)


def test_until_it_is_told_each_training_forward_is_a_step() -> None:
    quantizer, z_BDHW = make(halving_steps=2), torch.randn(GRID)
    for _ in range(4):
        quantizer(z_BDHW)
    assert quantizer.width == 0.25
    quantizer.eval()(z_BDHW)
    assert quantizer.width == 0.25


@every_form
def test_no_matrix_of_tokens_or_codes_by_codes_is_made(monkeypatch: pytest.MonkeyPatch, spread: str) -> None:
    monkeypatch.setattr(nsvq, "chunks", small_chunks)
    z_ND, codebook_KD = torch.randn(300, D), torch.randn(2000, D, requires_grad=True)
    indices_N = torch.arange(300)
    with LargestTensor() as largest:
        if spread == "features":
            term = nsvq.drawn_to_features(z_ND, codebook_KD, indices_N, torch.tensor(1.0), 0.01)
        else:
            term = nsvq.following_codes(z_ND, codebook_KD, indices_N, torch.tensor(1.0))
        term.backward()
    assert largest.numbers == 7 * 2000


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"width": 0.0}, ("width", "greater than 0")),
        ({"halving_steps": 0}, ("halving_steps", "equal to 1")),
        ({"strength": -1.0}, ("strength", "greater than 0")),
        ({"spread": "all"}, ("spread", "'features'", "'codes'")),
    ],
)
def test_what_cannot_be_is_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "nsvq"} | fields, *mentions)
