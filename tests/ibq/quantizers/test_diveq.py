"""DiVeQ: the gradient of its formula behind the value of the code, points of the curve, and replaced codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantizer_variants import assert_refused
from vector_quantize_pytorch.vector_quantize_pytorch import directional_reparam

from ibq import DiVeQQuantizer, build_quantizer

K, D, GRID = 16, 6, (2, 6, 5, 4)
SPREAD = 1e-9**0.5
"""Standard deviation of a replaced code around the used one."""


def make(**fields: Any) -> DiVeQQuantizer:
    quantizer = build_quantizer(
        {"method": "diveq", "codebook_size": K, "code_dim": D, "codebook_init": "normal"} | fields
    )
    assert isinstance(quantizer, DiVeQQuantizer)
    return quantizer


def tokens(z_BDHW: torch.Tensor) -> torch.Tensor:
    return z_BDHW.movedim(1, -1).flatten(0, -2)


# --- Gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_variance", [0.0, 5e-3])
def test_the_gradient_is_that_of_the_librarys_formula_and_the_value_the_code(noise_variance: float) -> None:
    """Theirs has the noise in its value too."""
    quantizer = make(noise_variance=noise_variance).double()
    z_BDHW, g_BDHW = (torch.randn(GRID, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.manual_seed(3)
    quantized = quantizer(z_BDHW)
    mine = torch.autograd.grad((quantized.z_q * g_BDHW).sum(), [z_BDHW, quantizer.embedding])
    torch.manual_seed(3)
    z_ND, codes_ND = tokens(z_BDHW), quantizer.embedding[quantized.indices.flatten()]
    theirs_ND = directional_reparam(z_ND, codes_ND, noise_variance)
    theirs = torch.autograd.grad((theirs_ND * tokens(g_BDHW)).sum(), [z_BDHW, quantizer.embedding])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert torch.equal(tokens(quantized.z_q), codes_ND)
    assert torch.allclose(theirs_ND, codes_ND) == (noise_variance == 0)


def test_without_noise_z_and_code_share_the_gradient() -> None:
    """Along c - z all of it is the code's, across all of it is z's; together they are the gradient of z_q."""
    quantizer = make(noise_variance=0.0, replace_every=None).double()
    z_BDHW = torch.randn(1, D, 1, 1, dtype=torch.float64, requires_grad=True)
    z_q = quantizer(z_BDHW).z_q
    g_D = torch.randn(D, dtype=torch.float64)
    dz, dC = torch.autograd.grad((z_q.flatten() * g_D).sum(), [z_BDHW, quantizer.embedding])
    e_D = torch.nn.functional.normalize((z_q - z_BDHW).detach().flatten(), dim=0)
    torch.testing.assert_close(dC.sum(0), e_D * (e_D @ g_D))
    torch.testing.assert_close(dz.flatten(), g_D - e_D * (e_D @ g_D))


def test_a_feature_on_its_code_has_a_finite_gradient() -> None:
    for noise_variance in (0.0, 1e-2):
        quantizer = make(noise_variance=noise_variance)
        z_BDHW = quantizer.embedding.detach()[:4].T.reshape(1, D, 2, 2).clone().requires_grad_()
        quantizer(z_BDHW).z_q.sum().backward()
        torch.testing.assert_close(z_BDHW.grad, torch.ones_like(z_BDHW))
        assert not quantizer.embedding.grad.any()


def test_evaluation_draws_nothing() -> None:
    for fields in ({}, {"curve": True, "replace_every": None}):
        quantizer, z_BDHW = make(**fields).eval(), torch.randn(GRID, requires_grad=True)
        before = torch.get_rng_state()
        gradients = [torch.autograd.grad(quantizer(z_BDHW).z_q.square().sum(), z_BDHW)[0] for _ in range(2)]
        assert torch.equal(*gradients)
        assert torch.equal(torch.get_rng_state(), before)


# --- Curve ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_variance", [0.0, 1e-2])
def test_a_point_of_the_curve_is_the_nearest_and_its_gradient_that_of_both_ends(noise_variance: float) -> None:
    quantizer = make(curve=True, replace_every=None, noise_variance=noise_variance).double()
    z_BDHW, g_BDHW = (torch.randn(GRID, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.manual_seed(3)
    quantized = quantizer(z_BDHW)
    mine = torch.autograd.grad((quantized.z_q * g_BDHW).sum(), [z_BDHW, quantizer.embedding])

    torch.manual_seed(3)
    C, z_ND = quantizer.embedding, tokens(z_BDHW)
    noise = [noise_variance**0.5 * torch.randn_like(z_ND) for _ in range(2)] if noise_variance else [0.0, 0.0]
    share_S = torch.rand_like(C[1:, :1])
    points_SD = (1 - share_S) * C[:-1] + share_S * C[1:]
    i_N = torch.cdist(z_ND, points_SD).argmin(1)
    l_N1 = share_S[i_N]
    expected_ND = z_ND
    for weight_N1, c_ND, v in ((1 - l_N1, C[i_N], noise[0]), (l_N1, C[i_N + 1], noise[1])):
        u_ND = v + c_ND - z_ND
        u_ND = (weight_N1 * u_ND / u_ND.norm(dim=1, keepdim=True)).detach()
        expected_ND = expected_ND + (c_ND - z_ND).norm(dim=1, keepdim=True) * u_ND
    theirs = torch.autograd.grad((expected_ND * tokens(g_BDHW)).sum(), [z_BDHW, C])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(tokens(quantized.z_q), points_SD[i_N], rtol=1e-12, atol=1e-13)
    to_ends = [(points_SD[i_N] - C[i_N + end]).norm(dim=1) for end in (0, 1)]
    assert torch.equal(quantized.indices.flatten(), i_N + (to_ends[1] < to_ends[0]))


# --- Replacement ------------------------------------------------------------------------------------------------------


def on_codes(quantizer: DiVeQQuantizer, *codes: int) -> torch.Tensor:
    """Features that are these codes."""
    return quantizer.embedding.detach()[list(codes)].T.reshape(1, D, 1, -1).clone()


def test_codes_that_no_forward_used_are_put_beside_used_ones_every_so_many_steps() -> None:
    quantizer = make(replace_every=3)
    first_KD = quantizer.embedding.detach().clone()
    for used in ((2,), (2, 5), (2,)):
        quantizer(on_codes(quantizer, *used))
        assert torch.equal(quantizer.embedding, first_KD)
    quantizer(on_codes(quantizer, 2))
    used_K = torch.zeros(K, dtype=torch.bool)
    used_K[[2, 5]] = True
    moved_KD = quantizer.embedding.detach()
    assert torch.equal(moved_KD[used_K], first_KD[used_K])
    apart_U = torch.cdist(moved_KD[~used_K].double(), first_KD[used_K].double()).min(1).values
    assert apart_U.min() > 0.3 * SPREAD
    assert apart_U.max() < 3 * SPREAD * D**0.5
    assert len(moved_KD.unique(dim=0)) == K
    assert (quantizer.replacement.used_K.sum(), quantizer.replacement.since) == (1, 3)


def test_used_codes_are_drawn_in_proportion_to_the_forwards_that_used_them() -> None:
    """Not to their tokens: code 1 has most of them, in one forward of four."""
    quantizer = make(codebook_size=4096, replace_every=4)
    first_KD = quantizer.embedding.detach().clone()
    for used in ((0,), (0,), (0, *[1] * 50), (0,), (0,)):
        quantizer(on_codes(quantizer, *used))
    beside = torch.cdist(quantizer.embedding.detach()[2:], first_KD[:2]).argmin(1)
    assert beside.double().mean() == pytest.approx(1 / 5, abs=0.03)


def test_replacement_follows_the_steps_and_begins_with_the_first_forward() -> None:
    """As after late quantization, before which no forward is."""
    quantizer = make(replace_every=3)
    moved_at = []
    for step in (7, 8, 8, 9, 10, 10, 11):
        before_KD = quantizer.embedding.detach().clone()
        quantizer.set_step(step)
        quantizer(on_codes(quantizer, 2))
        if not torch.equal(quantizer.embedding, before_KD):
            moved_at.append(step)
    assert moved_at == [10]
    assert quantizer.replacement.since == 10


def test_evaluation_neither_counts_nor_replaces() -> None:
    quantizer = make(replace_every=1)
    quantizer(torch.randn(GRID))
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(torch.randn(GRID))
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def test_averaged_weights_follow_replaced_codes_at_once() -> None:
    quantizer = make(replace_every=1)
    average = copy.deepcopy(quantizer)
    for codes in ((2,), (2, 3)):
        quantizer(on_codes(quantizer, *codes))
        with torch.no_grad():
            average.embedding.lerp_(quantizer.embedding, 0.01)
        quantizer.sync_average(average)
    replaced_K = (average.embedding == quantizer.embedding).all(1)
    assert replaced_K.tolist() == [True] * K
    with torch.no_grad():
        quantizer.embedding[5] += 1
    quantizer(on_codes(quantizer, 2))
    quantizer.sync_average(average)
    assert not torch.equal(average.embedding[3], average.embedding[2])


@pytest.mark.parametrize("how", ["initialize_from", "cluster", "restart_codes"])
def test_codes_that_were_placed_are_counted_anew(how: str) -> None:
    quantizer = make(replace_every=2)
    for _ in range(2):
        quantizer(on_codes(quantizer, 2))
    place = getattr(quantizer, how)
    dead = [torch.arange(K) < 5] if how == "restart_codes" else []
    place(*dead, torch.randn(4 * K, D), torch.Generator().manual_seed(0))
    placed_KD = quantizer.embedding.detach().clone()
    for _ in range(2):
        quantizer(on_codes(quantizer, 4))
        assert torch.equal(quantizer.embedding, placed_KD)
    quantizer(on_codes(quantizer, 4))
    assert (quantizer.embedding.detach() - placed_KD[4]).norm(dim=1).max() < 1e-3


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"noise_variance": -1e-3}, ("noise_variance", "greater than or equal to 0")),
        ({"replace_every": 0}, ("replace_every", "greater than or equal to 1")),
        ({"curve": True}, ("replace_every=100", "curve=True", "set replace_every=None")),
        ({"curve": True, "replace_every": None, "codebook_size": 1}, ("codebook_size=1", "curve=True", "2 or more")),
        ({"beta": 0.25}, ("beta",)),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "diveq"} | fields, *mentions)
