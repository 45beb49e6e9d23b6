"""The operators against PAPER section 3, written here with a one-hot matrix and plain autograd."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from ibq.ops import index_backprop, nearest_code
from ibq.ops.chunked import chunked, nearest_by_chunks

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Operator = Callable[[torch.Tensor, torch.Tensor, float | None], Outputs]


def textbook(z_ND: torch.Tensor, codebook_KD: torch.Tensor, tau: float | None) -> Outputs:
    logits_NK = z_ND @ codebook_KD.T
    p_NK = logits_NK.exp() / logits_NK.exp().sum(1, keepdim=True)
    indices_N = p_NK.max(1).indices
    onehot_NK = torch.zeros_like(p_NK).scatter_(1, indices_N[:, None], 1.0)
    z_q_ND = (onehot_NK + p_NK - p_NK.detach()) @ codebook_KD
    if tau is None:
        return z_q_ND, indices_N, None, None
    log_p_NK = logits_NK / tau - (logits_NK / tau).logsumexp(1, keepdim=True)
    mean_K = log_p_NK.exp().mean(0)
    return z_q_ND, indices_N, -(log_p_NK.exp() * log_p_NK).sum(1).mean(), -(mean_K * (mean_K + 1e-5).log()).sum()


def through_door(z_ND: torch.Tensor, codebook_KD: torch.Tensor, tau: float | None, *, backend: str) -> Outputs:
    return index_backprop(z_ND, codebook_KD, entropy_temperature=tau, backend=backend)


def in_rows(z_ND: torch.Tensor, codebook_KD: torch.Tensor, tau: float | None, *, rows: int) -> Outputs:
    return chunked(z_ND, codebook_KD, tau, None, rows=rows)


DENSE = functools.partial(through_door, backend="dense")
CHUNKED = functools.partial(through_door, backend="chunked")
OPERATORS: dict[str, Operator] = {
    "dense": DENSE,
    "chunked": CHUNKED,
    "rows=1": functools.partial(in_rows, rows=1),
    "rows=7": functools.partial(in_rows, rows=7),
    "rows=64": functools.partial(in_rows, rows=64),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
both_backends = pytest.mark.parametrize("backend", ["dense", "chunked"])


def inputs(N: int, K: int, D: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return (scale * torch.randn(N, D, dtype=dtype)).requires_grad_(), (scale * torch.randn(K, D, dtype=dtype)).requires_grad_()


def scalar(outputs: Outputs, parts: str, weight_ND: torch.Tensor) -> torch.Tensor:
    z_q_ND, _, sample_entropy, codebook_entropy = outputs
    loss = torch.zeros((), dtype=z_q_ND.dtype)
    if "z_q" in parts:
        loss = loss + (weight_ND * z_q_ND).sum()
    if "sample" in parts:
        loss = loss + 0.7 * sample_entropy
    if "codebook" in parts:
        loss = loss - 1.3 * codebook_entropy
    return loss


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- Value and gradient ------------------------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 3), (7, 1, 4), (37, 11, 5), (131, 67, 3)], ids=str)
@pytest.mark.parametrize("tau", [0.01, 1.0, None])
def test_values_and_gradients_are_those_of_the_textbook(operator: Operator, sizes: tuple[int, int, int], tau: float | None) -> None:
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


@every_operator
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


@every_operator
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_entropies_have_the_gradient_that_finite_differences_measure(operator: Operator, tau: float) -> None:
    z_ND, codebook_KD = inputs(9, 4, 3, scale=0.5)
    assert torch.autograd.gradcheck(lambda z, codebook: operator(z, codebook, tau)[2:], (z_ND, codebook_KD))


@every_operator
@pytest.mark.parametrize("frozen", ["features", "codebook"])
def test_one_input_may_be_frozen(operator: Operator, frozen: str) -> None:
    z_ND, codebook_KD = inputs(13, 6, 4)
    weight_ND = torch.randn_like(z_ND)
    (z_ND if frozen == "features" else codebook_KD).requires_grad_(False)
    free = codebook_KD if frozen == "features" else z_ND
    parts = "z_q sample codebook"
    (mine,), (theirs,) = (torch.autograd.grad(scalar(op(z_ND, codebook_KD, 0.5), parts, weight_ND), [free]) for op in (operator, textbook))
    close(mine, theirs)


@given(N=st.integers(1, 40), K=st.integers(1, 40), D=st.integers(1, 9), exponent=st.integers(-3, 3), rows=st.integers(1, 50))
def test_value_of_z_q_is_exactly_the_gathered_code(N: int, K: int, D: int, exponent: int, rows: int) -> None:
    z_ND, codebook_KD = inputs(N, K, D, torch.float32, 10.0**exponent)
    for operator in (DENSE, functools.partial(in_rows, rows=rows)):
        z_q_ND, indices_N, _, _ = operator(z_ND, codebook_KD, 0.01)
        assert indices_N.dtype == torch.int64
        assert torch.equal(z_q_ND, codebook_KD[indices_N])


@both_backends
def test_auto_without_temperature_leaves_the_entropies_out(backend: str) -> None:
    z_ND, codebook_KD = inputs(5, 3, 2)
    assert through_door(z_ND, codebook_KD, None, backend=backend)[2:] == (None, None)
    for mine, theirs in zip(through_door(z_ND, codebook_KD, 0.3, backend="auto"), CHUNKED(z_ND, codebook_KD, 0.3), strict=True):
        assert torch.equal(mine, theirs)


def test_double_backward_through_chunks_is_a_clear_error() -> None:
    z_ND, codebook_KD = inputs(5, 3, 2)
    z_q_ND, _, sample_entropy, _ = CHUNKED(z_ND, codebook_KD, 1.0)
    with pytest.raises(RuntimeError, match="index_backprop has no second derivative; call backward without create_graph"):
        torch.autograd.grad(z_q_ND.sum() + sample_entropy, [z_ND], create_graph=True)


# --- Limits ------------------------------------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("K", [1, 2, 1000])
def test_uniform_assignments_have_entropy_log_k_but_for_the_released_eps(operator: Operator, K: int) -> None:
    _, _, sample_entropy, codebook_entropy = operator(torch.zeros(9, 3), torch.randn(K, 3), 0.01)
    assert sample_entropy.item() == pytest.approx(math.log(K), abs=1e-5)
    assert codebook_entropy.item() == pytest.approx(-math.log(1 / K + 1e-5), abs=1e-4)


def test_at_two_to_the_18_codes_the_eps_caps_the_uniform_entropy_as_released() -> None:
    _, _, sample_entropy, codebook_entropy = CHUNKED(torch.zeros(1, 1), torch.randn(2**18, 1), 0.01)
    assert sample_entropy.item() == pytest.approx(12.48, abs=5e-3)
    assert codebook_entropy.item() == pytest.approx(11.19, abs=5e-3)


@every_operator
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
    _, _, sample_entropy, codebook_entropy = CHUNKED(z_ND, codebook_KD, 0.01)
    assert -1e-9 <= sample_entropy.item() <= math.log(K) + 1e-9
    assert -1e-4 <= codebook_entropy.item() <= math.log(min(N, K)) + sample_entropy.item() + 1e-9


@every_operator
def test_large_logits_stay_finite_in_float32(operator: Operator) -> None:
    z_ND, codebook_KD = inputs(20, 9, 4, torch.float32, scale=100.0)
    assert (z_ND @ codebook_KD.T).abs().max() > 1e4
    outputs = operator(z_ND, codebook_KD, 0.01)
    gradients = torch.autograd.grad(scalar(outputs, "z_q sample codebook", torch.ones_like(z_ND)), (z_ND, codebook_KD))
    for tensor in (*outputs, *gradients):
        assert tensor.isfinite().all()


@every_operator
def test_ties_go_to_the_lower_index(operator: Operator) -> None:
    distinct_KD = torch.tensor([[0.0, -1.0], [2.0, 1.0], [1.0, 2.0]])
    z_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).repeat(5, 1)
    expected_N = torch.tensor([1, 2, 0, 1]).repeat(5)
    for codebook_KD in (distinct_KD, distinct_KD.repeat(17, 1)):
        assert torch.equal(operator(z_ND, codebook_KD, 0.01)[1], expected_N)


# --- Nearest code ------------------------------------------------------------------------------------------------------------------------


@given(N=st.integers(1, 50), K=st.integers(1, 50), D=st.integers(1, 9), rows=st.integers(1, 60))
def test_nearest_code_is_the_brute_force_argmin(N: int, K: int, D: int, rows: int) -> None:
    z_ND, codebook_KD = inputs(N, K, D)
    expected_N = torch.cdist(z_ND, codebook_KD, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(nearest_code(z_ND, codebook_KD), expected_N)
    assert torch.equal(nearest_by_chunks(z_ND, codebook_KD, rows=rows), expected_N)


def test_nearest_code_prefers_the_lower_index_and_has_no_gradient() -> None:
    z_ND = torch.tensor([[0.0], [3.0]], requires_grad=True)
    indices_N = nearest_code(z_ND, torch.tensor([[1.0], [-1.0], [5.0], [1.0]]))
    assert indices_N.tolist() == [0, 0]
    assert not indices_N.requires_grad


# --- Precision ---------------------------------------------------------------------------------------------------------------------------


@both_backends
def test_bf16_autocast_changes_nothing(backend: str) -> None:
    z_ND, codebook_KD = inputs(33, 9, 5, torch.float32)

    def run() -> list[torch.Tensor]:
        outputs = through_door(z_ND, codebook_KD, 0.01, backend=backend)
        return [*outputs, scalar(outputs, "z_q sample codebook", torch.ones_like(z_ND))]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert (z_ND @ codebook_KD.T).dtype == torch.bfloat16
        inside = run()
    gradients = (torch.autograd.grad(outputs[-1], (z_ND, codebook_KD)) for outputs in (plain, inside))
    for mine, theirs in zip([*inside[:-1], *next(gradients)], [*plain[:-1], *next(gradients)], strict=True):
        assert mine.dtype in (torch.float32, torch.int64)
        assert torch.equal(mine, theirs)


def test_chunked_backward_inside_autocast_is_float32_too() -> None:
    z_ND, codebook_KD = inputs(33, 9, 5, torch.float32)
    loss = scalar(CHUNKED(z_ND, codebook_KD, 0.01), "z_q sample codebook", torch.ones_like(z_ND))
    expected = torch.autograd.grad(loss, (z_ND, codebook_KD), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, (z_ND, codebook_KD))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


@both_backends
@pytest.mark.parametrize(
    ("features", "codebook", "result"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_mixed_types_are_computed_in_the_wider_of_them(
    backend: str, features: torch.dtype, codebook: torch.dtype, result: torch.dtype
) -> None:
    z_ND, codebook_KD = torch.randn(6, 3).to(features).requires_grad_(), torch.randn(4, 3).to(codebook).requires_grad_()
    outputs = through_door(z_ND, codebook_KD, 0.5, backend=backend)
    scalar(outputs, "z_q sample codebook", torch.ones_like(outputs[0])).backward()
    assert {outputs[0].dtype, outputs[2].dtype, outputs[3].dtype} == {result}
    assert (z_ND.grad.dtype, codebook_KD.grad.dtype) == (features, codebook)
    assert torch.equal(outputs[0], codebook_KD[outputs[1]].to(result))


@both_backends
def test_the_callers_matmul_precision_is_restored_even_after_an_error(backend: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        through_door(*inputs(3, 3, 3), 0.1, backend=backend)
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ValueError, match="do not fit"):
            through_door(torch.zeros(3, 2), torch.zeros(3, 3), 0.1, backend=backend)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# --- Refusals ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [index_backprop, nearest_code])
@pytest.mark.parametrize(
    ("z", "codebook", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(5, 4), r"\(2, 3, 4\) and codebook \(5, 4\)"),
        (torch.zeros(2, 3), torch.zeros(3), r"\(2, 3\) and codebook \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(5, 4), r"\(2, 3\) and codebook \(5, 4\)"),
        (torch.zeros(0, 3), torch.zeros(5, 3), r"\(0, 3\) and codebook \(5, 3\) need at least one row"),
        (torch.zeros(2, 3), torch.zeros(0, 3), r"\(2, 3\) and codebook \(0, 3\) need at least one row"),
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


@pytest.mark.parametrize("tau", [0.0, -0.5, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"entropy_temperature={tau} must be above 0"):
        index_backprop(torch.zeros(2, 3), torch.zeros(5, 3), entropy_temperature=tau)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='fast' is not known; choose 'auto', 'dense' or 'chunked'"):
        index_backprop(torch.zeros(2, 3), torch.zeros(5, 3), backend="fast")


# --- Two processes -----------------------------------------------------------------------------------------------------------------------

SPLITS = {"equal": (6, 6), "unequal": (5, 9)}


def local_loss(outputs: Outputs, weight_ND: torch.Tensor) -> torch.Tensor:
    z_q_ND, _, sample_entropy, codebook_entropy = outputs
    return (weight_ND * z_q_ND).sum(1).mean() + 0.7 * sample_entropy - 1.3 * codebook_entropy


def joined_batch(split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(SPLITS[split]))
    N = sum(SPLITS[split])
    return tuple(torch.randn(rows, 3, dtype=torch.float64, generator=generator) for rows in (N, 7, N))


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for split, sizes in SPLITS.items():
        z_ND, codebook_KD, weight_ND = joined_batch(split)
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        for backend in ("dense", "chunked"):
            z, codebook = z_ND[mine].clone().requires_grad_(), codebook_KD.clone().requires_grad_()
            outputs = index_backprop(z, codebook, entropy_temperature=0.5, backend=backend, group=dist.group.WORLD)
            local_loss(outputs, weight_ND[mine]).backward()
            result = {"z_q": outputs[0], "indices": outputs[1], "sample": outputs[2], "codebook_entropy": outputs[3]}
            result |= {"dz": z.grad, "dC": codebook.grad}
            torch.save({name: tensor.detach() for name, tensor in result.items()}, Path(folder) / f"{split}-{backend}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(one_of_two_processes, args=(str(folder),), nprocs=2)
    return folder


@both_backends
@pytest.mark.parametrize("split", SPLITS)
def test_a_group_of_two_equals_one_process_on_the_joined_batch(two_processes: Path, backend: str, split: str) -> None:
    """Mean loss over ranks, averaged gradients: the sample entropy is a local mean, so its joined form is the mean of both halves."""
    ranks = [torch.load(two_processes / f"{split}-{backend}-{rank}.pt") for rank in (0, 1)]
    z_ND, codebook_KD, weight_ND = joined_batch(split)
    z_ND.requires_grad_()
    codebook_KD.requires_grad_()
    halves = [textbook(z, codebook_KD, 0.5) for z in z_ND.split(SPLITS[split])]
    *_, joined_entropy = textbook(z_ND, codebook_KD, 0.5)
    weights = weight_ND.split(SPLITS[split])
    loss = sum(local_loss((*half[:3], joined_entropy), weight) for half, weight in zip(halves, weights, strict=True)) / 2
    dz_ND, dC_KD = torch.autograd.grad(loss, (z_ND, codebook_KD))

    for rank, half in zip(ranks, halves, strict=True):
        close(rank["z_q"], half[0])
        assert torch.equal(rank["indices"], half[1])
        close(rank["sample"], half[2])
        close(rank["codebook_entropy"], joined_entropy)
        assert abs(rank["codebook_entropy"] - half[3]) > 1e-3, "the group's entropy must not be the local one"
    close(torch.cat([rank["dz"] for rank in ranks]) / 2, dz_ND)
    close(torch.stack([rank["dC"] for rank in ranks]).mean(0), dC_KD)
