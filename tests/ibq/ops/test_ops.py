"""The operators against docs/method.md section 3, written with a one-hot matrix and plain autograd, in float64; limits
and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import Operator, by, close, inputs, scalar, sizes_of, textbook

from ibq.errors import NonFiniteInputError
from ibq.ops import chunked, index_backprop, nearest_code

SIZES = {"rows=1": (1, 3), "rows=7": (7, 1), "rows=64": (64, 5)}


@pytest.fixture(params=["dense", "chunked", *SIZES])
def operator(request: pytest.FixtureRequest) -> Iterator[Operator]:
    """dense; chunked as it is; chunked in rows and columns that divide nothing."""
    if request.param in SIZES:
        with sizes_of(*SIZES[request.param]):
            yield by("chunked")
    else:
        yield by(request.param)


both_backends = pytest.mark.parametrize("backend", ["dense", "chunked"])


# --- Value and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 3), (7, 1, 4), (37, 11, 5), (131, 67, 3)], ids=str)
@pytest.mark.parametrize("tau", [0.01, 1.0, None])
def test_values_and_gradients_are_those_of_the_textbook(
    operator: Operator, sizes: tuple[int, int, int], tau: float | None
) -> None:
    z_ND, codebook_KD = inputs(*sizes)
    weight_ND = torch.randn_like(z_ND)
    expected, actual = textbook(z_ND, codebook_KD, tau), operator(z_ND, codebook_KD, tau)
    assert torch.equal(actual[1], expected[1])
    for mine, theirs in zip(actual[::2] + actual[3:], expected[::2] + expected[3:], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            close(mine, theirs)
    for parts in ("z_q", "sample", "codebook", "z_q sample codebook") if tau else ("z_q",):
        gradients = torch.autograd.grad(scalar(actual, parts, weight_ND), (z_ND, codebook_KD), retain_graph=True)
        wanted = torch.autograd.grad(scalar(expected, parts, weight_ND), (z_ND, codebook_KD), retain_graph=True)
        for mine, theirs in zip(gradients, wanted, strict=True):
            close(mine, theirs)


def test_gradient_of_z_q_is_the_closed_form_of_the_paper(operator: Operator) -> None:
    z_ND, codebook_KD = inputs(37, 11, 5)
    g_ND = torch.randn_like(z_ND)
    dz_ND, dC_KD = torch.autograd.grad(operator(z_ND, codebook_KD, None)[0], (z_ND, codebook_KD), g_ND)
    p_NK = (z_ND @ codebook_KD.T).softmax(1)
    onehot_NK = torch.eye(11, dtype=torch.float64)[p_NK.argmax(1)]
    gC_NK = g_ND @ codebook_KD.T
    dlogits_NK = p_NK * (gC_NK - (p_NK * gC_NK).sum(1, keepdim=True))
    close(dz_ND, dlogits_NK @ codebook_KD)
    close(dC_KD, dlogits_NK.T @ z_ND + onehot_NK.T @ g_ND)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_entropies_have_the_gradient_that_finite_differences_measure(operator: Operator, tau: float) -> None:
    z_ND, codebook_KD = inputs(9, 4, 3, scale=0.5)
    assert torch.autograd.gradcheck(lambda z, codebook: operator(z, codebook, tau)[2:], (z_ND, codebook_KD))


@pytest.mark.parametrize("frozen", ["features", "codebook"])
def test_one_input_may_be_frozen(operator: Operator, frozen: str) -> None:
    z_ND, codebook_KD = inputs(13, 6, 4)
    weight_ND = torch.randn_like(z_ND)
    (z_ND if frozen == "features" else codebook_KD).requires_grad_(False)
    free = codebook_KD if frozen == "features" else z_ND
    parts = "z_q sample codebook"
    (mine,), (theirs,) = (
        torch.autograd.grad(scalar(op(z_ND, codebook_KD, 0.5), parts, weight_ND), [free]) for op in (operator, textbook)
    )
    close(mine, theirs)


@both_backends
@pytest.mark.parametrize("matmul_dtype", [None, torch.bfloat16])
@given(
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    D=st.integers(1, 9),
    exponent=st.integers(-3, 3),
    rows=st.integers(1, 50),
)
def test_value_of_z_q_is_exactly_the_gathered_code(
    backend: str, matmul_dtype: torch.dtype | None, N: int, K: int, D: int, exponent: int, rows: int
) -> None:
    z_ND, codebook_KD = inputs(N, K, D, torch.float32, 10.0**exponent)
    with sizes_of(rows, rows):
        z_q_ND, indices_N, _, _ = by(backend, matmul_dtype)(z_ND, codebook_KD, 0.01)
    assert indices_N.dtype == torch.int64
    assert torch.equal(z_q_ND, codebook_KD[indices_N])


@both_backends
def test_auto_without_temperature_leaves_the_entropies_out(backend: str) -> None:
    z_ND, codebook_KD = inputs(5, 3, 2)
    assert by(backend)(z_ND, codebook_KD, None)[2:] == (None, None)
    for mine, theirs in zip(by("auto")(z_ND, codebook_KD, 0.3), by("chunked")(z_ND, codebook_KD, 0.3), strict=True):
        assert torch.equal(mine, theirs)


def test_double_backward_through_chunks_is_a_clear_error() -> None:
    z_ND, codebook_KD = inputs(5, 3, 2)
    z_q_ND, _, sample_entropy, _ = by("chunked")(z_ND, codebook_KD, 1.0)
    (dz_ND,) = torch.autograd.grad(z_q_ND.sum() + sample_entropy, [z_ND], create_graph=True)
    with pytest.raises(
        RuntimeError, match="index_backprop has no second derivative; keep it out of gradient penalties"
    ):
        dz_ND.square().sum().backward()


# --- Limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 1000])
def test_uniform_assignments_have_entropy_log_k_but_for_the_released_eps(operator: Operator, K: int) -> None:
    _, _, sample_entropy, codebook_entropy = operator(torch.zeros(9, 3), torch.randn(K, 3), 0.01)
    assert sample_entropy.item() == pytest.approx(math.log(K), abs=1e-5)
    assert codebook_entropy.item() == pytest.approx(-math.log(1 / K + 1e-5), abs=1e-4)


def test_at_two_to_the_18_codes_the_eps_caps_the_uniform_entropy_as_released() -> None:
    _, _, sample_entropy, codebook_entropy = by("chunked")(torch.zeros(1, 1), torch.randn(2**18, 1), 0.01)
    assert sample_entropy.item() == pytest.approx(12.48, abs=5e-3)
    assert codebook_entropy.item() == pytest.approx(11.19, abs=5e-3)


def test_hard_assignments_have_sample_entropy_0_and_codebook_entropy_between_0_and_log_k(operator: Operator) -> None:
    K = 8
    _, _, spread_sample, spread = operator(torch.eye(K), torch.eye(K), 0.01)
    _, _, single_sample, single = operator(torch.eye(K)[:1].expand(K, K), torch.eye(K), 0.01)
    assert spread_sample.item() == single_sample.item() == pytest.approx(0, abs=1e-6)
    assert spread.item() == pytest.approx(math.log(K), abs=1e-3)
    assert single.item() == pytest.approx(0, abs=1e-4)


@given(N=st.integers(1, 12), K=st.integers(1, 40))
def test_entropies_stay_within_their_bounds(N: int, K: int) -> None:
    z_ND, codebook_KD = inputs(N, K, 16, scale=3.0)
    _, _, sample_entropy, codebook_entropy = by("chunked")(z_ND, codebook_KD, 0.01)
    assert -1e-9 <= sample_entropy.item() <= math.log(K) + 1e-9
    assert -1e-4 <= codebook_entropy.item() <= math.log(min(N, K)) + sample_entropy.item() + 1e-9


def test_large_logits_stay_finite_in_float32(operator: Operator) -> None:
    z_ND, codebook_KD = inputs(20, 9, 4, torch.float32, scale=100.0)
    assert (z_ND @ codebook_KD.T).abs().max() > 1e4
    outputs = operator(z_ND, codebook_KD, 0.01)
    gradients = torch.autograd.grad(scalar(outputs, "z_q sample codebook", torch.ones_like(z_ND)), (z_ND, codebook_KD))
    for tensor in (*outputs, *gradients):
        assert tensor.isfinite().all()


def test_ties_go_to_the_lower_index(operator: Operator) -> None:
    distinct_KD = torch.tensor([[0.0, -1.0], [2.0, 1.0], [1.0, 2.0]])
    z_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).repeat(5, 1)
    expected_N = torch.tensor([1, 2, 0, 1]).repeat(5)
    for codebook_KD in (distinct_KD, distinct_KD.repeat(17, 1)):
        assert torch.equal(operator(z_ND, codebook_KD, 0.01)[1], expected_N)


# --- Nearest code -----------------------------------------------------------------------------------------------------


@given(N=st.integers(1, 50), K=st.integers(1, 50), D=st.integers(1, 9), rows=st.integers(1, 60))
def test_nearest_code_is_the_brute_force_argmin(N: int, K: int, D: int, rows: int) -> None:
    z_ND, codebook_KD = inputs(N, K, D)
    expected_N = (z_ND[:, None] - codebook_KD).square().sum(2).argmin(1)
    assert torch.equal(nearest_code(z_ND, codebook_KD, backend="dense"), expected_N)
    assert torch.equal(nearest_code(z_ND, codebook_KD), expected_N)
    with sizes_of(rows, rows):
        assert torch.equal(nearest_code(z_ND, codebook_KD), expected_N)


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
@pytest.mark.parametrize("unit", [1.0, 0.125])
def test_exact_ties_of_distance_go_to_the_lower_index(backend: str, unit: float) -> None:
    """Integer grids, whose mean code is no grid point: subtracting it as it is would break the ties by rounding."""
    ties = 0
    for K in (3, 7, 11, 19, 30):
        z_ND, codebook_KD = (unit * torch.randint(-4, 5, (rows, 2)).float() for rows in (200, K))
        distance_NK = (z_ND[:, None].double() - codebook_KD.double()).square().sum(2)
        ties += int(((distance_NK == distance_NK.amin(1, keepdim=True)).sum(1) > 1).sum())
        assert torch.equal(nearest_code(z_ND, codebook_KD, backend=backend), distance_NK.argmin(1))
    assert ties > 50


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_views_with_other_strides_are_the_same_numbers(backend: str) -> None:
    z_ND, codebook_KD = torch.randn(17, 40).T, torch.randn(17, 30).T
    copies = z_ND.clone(memory_format=torch.contiguous_format), codebook_KD.clone(memory_format=torch.contiguous_format)
    assert torch.equal(nearest_code(z_ND, codebook_KD, backend=backend), nearest_code(*copies, backend=backend))
    gradients = []
    for pair in ((z_ND, codebook_KD), copies):
        leaves = [tensor.detach().requires_grad_() for tensor in pair]
        outputs = by(backend)(*leaves, 0.1)
        gradients.append(
            [*outputs, *torch.autograd.grad(scalar(outputs, "z_q sample codebook", torch.ones(40, 17)), leaves)]
        )
    for strided, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("K", [1, 1000, 2**14, 2**18, 2**20])
def test_chunks_keep_to_the_memory_budget_and_cover_every_row(K: int) -> None:
    z_ND = torch.empty(5000, 2, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        slices = list(chunked.chunks(z_ND, torch.empty(K, 2, device="meta", dtype=dtype)))
        assert [part.start for part in slices[1:]] == [part.stop for part in slices[:-1]]
        assert (slices[0].start, slices[-1].stop) == (0, 5000)
        assert 2 * 4 * K * max(part.stop - part.start for part in slices) <= max(chunked.MEMORY_BYTES, 8 * K)


def test_nearest_code_prefers_the_lower_index_and_has_no_gradient() -> None:
    z_ND = torch.tensor([[0.0], [3.0]], requires_grad=True)
    indices_N = nearest_code(z_ND, torch.tensor([[1.0], [-1.0], [5.0], [1.0]]))
    assert indices_N.tolist() == [0, 0]
    assert not indices_N.requires_grad


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [index_backprop, nearest_code])
@pytest.mark.parametrize(
    ("z", "codebook", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(5, 4), r"\(2, 3, 4\) and codebook \(5, 4\)"),
        (torch.zeros(2, 3), torch.zeros(3), r"\(2, 3\) and codebook \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(5, 4), r"\(2, 3\) and codebook \(5, 4\)"),
        (torch.zeros(0, 3), torch.zeros(5, 3), r"\(0, 3\) and codebook \(5, 3\) need at least one row"),
        (torch.zeros(2, 3), torch.zeros(0, 3), r"\(2, 3\) and codebook \(0, 3\) need at least one row"),
        (
            torch.zeros(2, 0),
            torch.zeros(5, 0),
            r"\(2, 0\) and codebook \(5, 0\) need at least one row each, of at least one dimension",
        ),
        (torch.zeros(2, 3), torch.zeros(5, 3, device="meta"), "on cpu, the codebook on meta"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 3), "torch.int64, the codebook torch.float32"),
        (torch.zeros(2, 3), torch.zeros(5, 3, dtype=torch.bool), "torch.float32, the codebook torch.bool"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_both_values(
    function: Callable[..., object], z: torch.Tensor, codebook: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(z, codebook)


@pytest.mark.parametrize("tau", [0.0, -0.5, math.nan, 1e-40, math.inf])
def test_a_temperature_out_of_range_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"entropy_temperature={tau} must lie between 1e-30 and 1e30"):
        index_backprop(torch.zeros(2, 3), torch.zeros(5, 3), entropy_temperature=tau)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='fast' is not known; choose 'auto', 'dense', 'chunked' or 'triton'"):
        index_backprop(torch.zeros(2, 3), torch.zeros(5, 3), backend="fast")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["features", "codebook"])
@pytest.mark.parametrize("function", [index_backprop, nearest_code])
@both_backends
def test_values_that_are_not_finite_are_refused_and_counted(
    bad: float, where: str, function: Callable[..., object], backend: str
) -> None:
    z_ND, codebook_KD = torch.randn(4, 3), torch.randn(5, 3)
    tensor = z_ND if where == "features" else codebook_KD
    tensor[1, 2] = tensor[3, 0] = bad
    with pytest.raises(NonFiniteInputError, match=f"2 of {tensor.numel()} values of {where} are NaN or infinite"):
        function(z_ND, codebook_KD, backend=backend)


@pytest.mark.parametrize(
    ("inputs_dtype", "matmul_dtype"), [(torch.float32, torch.float16), (torch.float64, torch.bfloat16)]
)
def test_products_of_a_type_that_does_not_fit_the_inputs_are_refused(
    inputs_dtype: torch.dtype, matmul_dtype: torch.dtype
) -> None:
    with pytest.raises(
        ValueError, match=rf"matmul_dtype={matmul_dtype} does not fit {inputs_dtype}; use None, or torch.bfloat16"
    ):
        index_backprop(torch.zeros(2, 3, dtype=inputs_dtype), torch.zeros(5, 3), matmul_dtype=matmul_dtype)
