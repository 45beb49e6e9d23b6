"""Precision of the operators: what autocast and types may change, and errors against float64 on the same inputs."""

from __future__ import annotations

import pytest
import torch
from operators import DEVICE, by, error, inputs, scalar

from ibq.ops import index_backprop
from ibq.ops.precision import full_float32

both_backends = pytest.mark.parametrize("backend", ["dense", "chunked"])


@both_backends
def test_bf16_autocast_changes_nothing(backend: str) -> None:
    z_ND, codebook_KD = inputs(33, 9, 5, torch.float32)

    def run() -> list[torch.Tensor]:
        outputs = by(backend)(z_ND, codebook_KD, 0.01)
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
    loss = scalar(by("chunked")(z_ND, codebook_KD, 0.01), "z_q sample codebook", torch.ones_like(z_ND))
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
    outputs = by(backend)(z_ND, codebook_KD, 0.5)
    scalar(outputs, "z_q sample codebook", torch.ones_like(outputs[0])).backward()
    assert {outputs[0].dtype, outputs[2].dtype, outputs[3].dtype} == {result}
    assert (z_ND.grad.dtype, codebook_KD.grad.dtype) == (features, codebook)
    assert torch.equal(outputs[0], codebook_KD[outputs[1]].to(result))


@both_backends
def test_the_callers_matmul_precision_is_restored_even_after_an_error(backend: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        by(backend)(*inputs(3, 3, 3), 0.1)
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ValueError, match="do not fit"):
            by(backend)(torch.zeros(3, 2), torch.zeros(3, 3), 0.1)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_torchs_newer_switch_for_tf32_is_respected_and_restored() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        by("chunked")(*inputs(3, 3, 3), 0.1)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_convolutions_are_full_float32_where_asked_and_restored_even_after_an_error() -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision = convolutions.fp32_precision = "tf32"
    try:
        with full_float32(torch.device("cpu"), convolutions=True):
            assert (products.fp32_precision, convolutions.fp32_precision) == ("ieee", "ieee")
        assert (products.fp32_precision, convolutions.fp32_precision) == ("tf32", "tf32")
        with full_float32(torch.device("cpu")):
            assert (products.fp32_precision, convolutions.fp32_precision) == ("ieee", "tf32")
        with pytest.raises(ZeroDivisionError), full_float32(torch.device("cpu"), convolutions=True):
            1 / 0  # noqa: B018
        assert (products.fp32_precision, convolutions.fp32_precision) == ("tf32", "tf32")
    finally:
        products.fp32_precision, convolutions.fp32_precision = before


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_type_changes_nothing(backend: str, default: torch.dtype) -> None:
    z_ND, codebook_KD = inputs(20, 9, 5, torch.float32)
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            outputs = by(backend)(z_ND, codebook_KD, 0.1)
            loss = scalar(outputs, "z_q sample codebook", torch.ones_like(z_ND))
            results.append([*outputs, *torch.autograd.grad(loss, (z_ND, codebook_KD))])
        finally:
            torch.set_default_dtype(torch.float32)
    for mine, plain in zip(*results, strict=True):
        assert mine.dtype == plain.dtype
        assert torch.equal(mine, plain)


# --- Errors against float64 on the same (rounded) inputs --------------------------------------------------------------

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def results(
    backend: str, dtype: torch.dtype, matmul_dtype: torch.dtype, tau: float | None, scale: float
) -> dict[str, torch.Tensor]:
    """z_q, indices, entropies and both gradients on inputs that every precision can hold, computed in one of them."""
    generator = torch.Generator().manual_seed(1)
    z_ND, codebook_KD, g_ND = (
        torch.randn(rows, 256, generator=generator).mul_(scale).bfloat16().to(DEVICE, dtype) for rows in (48, 300, 48)
    )
    z_ND.requires_grad_()
    codebook_KD.requires_grad_()
    outputs = by(backend, matmul_dtype)(z_ND, codebook_KD, tau)
    dz_ND, dC_KD = torch.autograd.grad(
        scalar(outputs, "z_q sample codebook" if tau else "z_q", g_ND), (z_ND, codebook_KD)
    )
    named = {"z_q": outputs[0], "indices": outputs[1], "dz": dz_ND, "dC": dC_KD}
    return named | ({"sample": outputs[2], "codebook": outputs[3]} if tau else {})


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("matmul_dtype", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_errors_without_entropy_stay_below_the_stated_bound(
    backend: str, matmul_dtype: torch.dtype, scale: float
) -> None:
    exact = results("dense", torch.float64, torch.float64, None, scale)
    mine = results(backend, torch.float32, matmul_dtype, None, scale)
    assert (mine["indices"] == exact["indices"]).double().mean() > 0.999
    for name in ("z_q", "dz", "dC"):
        assert error(mine[name], exact[name]) < (1e-5 if matmul_dtype == torch.float32 else 1e-2), name


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("matmul_dtype", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_errors_with_entropy_stay_below_twice_those_of_dense(
    backend: str, matmul_dtype: torch.dtype, scale: float
) -> None:
    exact = results("dense", torch.float64, torch.float64, 0.01, scale)
    dense = results("dense", torch.float32, matmul_dtype, 0.01, scale)
    mine = results(backend, torch.float32, matmul_dtype, 0.01, scale)
    assert (mine["indices"] == exact["indices"]).double().mean() > 0.999
    for name in ("z_q", "dz", "dC"):
        assert error(mine[name], exact[name]) <= 2 * error(dense[name], exact[name]), name
    for name in ("sample", "codebook"):  # near 0 and near log N: absolute, in nats
        assert abs(mine[name] - exact[name]) <= 2 * abs(dense[name] - exact[name]) + 1e-6, name


def test_bfloat16_inputs_mean_bfloat16_products() -> None:
    z_ND, codebook_KD = torch.randn(40, 64).bfloat16(), torch.randn(30, 64).bfloat16()
    g_ND = torch.randn(40, 64)

    def gradient(z: torch.Tensor, codebook: torch.Tensor, matmul_dtype: torch.dtype | None) -> torch.Tensor:
        z = z.float().requires_grad_() if matmul_dtype else z.requires_grad_()
        z_q_ND = index_backprop(z, codebook, matmul_dtype=matmul_dtype)[0]
        return torch.autograd.grad(z_q_ND, z, g_ND)[0].to(torch.bfloat16)

    assert torch.equal(gradient(z_ND, codebook_KD, None), gradient(z_ND, codebook_KD.float(), torch.bfloat16))
    assert not torch.equal(gradient(z_ND, codebook_KD, None), gradient(z_ND, codebook_KD.float(), torch.float32))
