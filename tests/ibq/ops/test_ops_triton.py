"""The Triton kernels against the textbook in float64, on a GPU where there is one, else in the interpreter; and when
they are chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from operators import DEVICE, by, error, scalar, textbook

from ibq.ops import arguments, index_backprop, nearest_code, triton

SMALL = {"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture(params=["one tile", "many tiles", "many panels"])
def tiling(request: pytest.FixtureRequest) -> Iterator[None]:
    """The blocks as they are, which are larger than the sizes here; small ones, so that loops are split; and panels of
    one block each."""
    if request.param == "one tile":
        yield
        return
    panel = 0 if request.param == "many panels" else triton.PANEL_BYTES
    with mock.patch.multiple(triton, _BLOCKS=dict.fromkeys(triton._BLOCKS, SMALL), PANEL_BYTES=panel, _PROGRAMS=7):
        yield


def inputs(N: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, codes and a gradient of z_q, representable in bfloat16."""
    return tuple(torch.randn(rows, D).mul_(0.5).bfloat16().to(DEVICE, torch.float32) for rows in (N, K, N))


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 50, 17), (33, 1, 3), (33, 35, 20), (17, 49, 33)], ids=str)
@pytest.mark.parametrize("tau", [0.05, None])
def test_values_and_gradients_are_those_of_the_textbook(sizes: tuple[int, int, int], tau: float | None) -> None:
    z_ND, codebook_KD, g_ND = inputs(*sizes)
    exact = [tensor.double().requires_grad_() for tensor in (z_ND, codebook_KD)]
    mine = [tensor.clone().requires_grad_() for tensor in (z_ND, codebook_KD)]
    expected, actual = textbook(*exact, tau), by("triton")(*mine, tau)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0], codebook_KD[actual[1]])
    if tau is not None:
        for entropy, exact_entropy in zip(actual[2:], expected[2:], strict=True):
            assert abs(entropy.item() - exact_entropy.item()) < 3e-6
    for parts in ("z_q", "sample", "codebook", "z_q sample codebook") if tau else ("z_q",):
        gradients = torch.autograd.grad(scalar(actual, parts, g_ND), mine, retain_graph=True)
        wanted = torch.autograd.grad(scalar(expected, parts, g_ND.double()), exact, retain_graph=True)
        for gradient, correct in zip(gradients, wanted, strict=True):
            assert (gradient.double() - correct).norm() <= 2e-5 * correct.norm() + 1e-6


@pytest.mark.usefixtures("tiling")
def test_bfloat16_products_come_close_to_the_textbook() -> None:
    z_ND, codebook_KD, g_ND = inputs(33, 35, 20)
    exact = [tensor.double().requires_grad_() for tensor in (z_ND, codebook_KD)]
    mine = [tensor.bfloat16().requires_grad_() for tensor in (z_ND, codebook_KD)]
    expected, actual = textbook(*exact, 0.05), by("triton")(*mine, 0.05)
    assert torch.equal(actual[1], expected[1])
    gradients = torch.autograd.grad(scalar(actual, "z_q sample codebook", g_ND), mine)
    wanted = torch.autograd.grad(scalar(expected, "z_q sample codebook", g_ND.double()), exact)
    for gradient, correct in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert 0 < error(gradient, correct) < 1e-2


@pytest.mark.usefixtures("tiling")
def test_equal_inputs_give_equal_bits() -> None:
    z_ND, codebook_KD, g_ND = inputs(33, 35, 20)

    def run() -> list[torch.Tensor]:
        mine = [tensor.clone().requires_grad_() for tensor in (z_ND, codebook_KD)]
        outputs = by("triton")(*mine, 0.05)
        return [*outputs, *torch.autograd.grad(scalar(outputs, "z_q sample codebook", g_ND), mine)]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("tiling")
def test_ties_go_to_the_lower_index() -> None:
    distinct_KD = torch.tensor([[0.0, -1.0], [2.0, 1.0], [1.0, 2.0]], device=DEVICE)
    z_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]], device=DEVICE).repeat(5, 1)
    for codebook_KD in (distinct_KD, distinct_KD.repeat(17, 1)):
        assert by("triton")(z_ND, codebook_KD, 0.01)[1].tolist() == [1, 2, 0, 1] * 5
    grid_KD = torch.tensor([[1.0], [-1.0], [5.0], [1.0]], device=DEVICE).repeat(11, 1)
    assert nearest_code(torch.tensor([[0.0], [3.0]], device=DEVICE), grid_KD, backend="triton").tolist() == [0, 0]


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (33, 35, 20), (17, 49, 33)], ids=str)
def test_nearest_code_is_that_of_dense(sizes: tuple[int, int, int]) -> None:
    z_ND, codebook_KD, _ = inputs(*sizes)
    assert torch.equal(
        nearest_code(z_ND, codebook_KD, backend="triton"), nearest_code(z_ND.double(), codebook_KD, backend="dense")
    )


def test_large_logits_stay_finite() -> None:
    z_ND, codebook_KD, g_ND = (200 * tensor for tensor in inputs(20, 37, 4))
    mine = [tensor.requires_grad_() for tensor in (z_ND, codebook_KD)]
    outputs = by("triton")(*mine, 0.01)
    assert all(
        t.isfinite().all() for t in (*outputs, *torch.autograd.grad(scalar(outputs, "z_q sample codebook", g_ND), mine))
    )


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ibq.ops import triton as tiles
from ibq.ops import triton_kernels as kernels

import torch

names = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
for kernel in (kernels.row_statistics, kernels.assignment_sums, kernels.row_means, kernels.logit_gradients):
    for dtype, blocks in tiles._BLOCKS.items():
        signature, constants = {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name.isupper() and len(name) > 1:
                signature[name], constants[(i,)] = "constexpr", blocks.get(name, True)
            elif name in ("z_ptr", "codebook_ptr", "g_ptr", "out_ptr"):
                signature[name] = names[dtype]
            elif name.endswith("_ptr"):
                signature[name] = "*i32" if name == "index_ptr" else "*fp32"
            else:
                signature[name] = "fp32" if name == "inverse_tau" else "i32"
        options = {"num_warps": blocks["num_warps"], "num_stages": blocks["num_stages"], "enable_fp_fusion": True}
        source, target = ASTSource(kernel, signature, constexprs=constants), GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.metadata.shared <= 227 * 1024, (kernel.__name__, dtype, compiled.metadata.shared)
        print(kernel.__name__, dtype, compiled.metadata.shared)
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    """The interpreter runs what the compiler would refuse; this does not measure anything."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


# --- When they are chosen ---------------------------------------------------------------------------------------------

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def new_card() -> Iterator[None]:
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        yield


@pytest.mark.usefixtures("new_card")
def test_auto_is_triton_for_bfloat16_on_cuda_and_chunks_elsewhere() -> None:
    assert arguments.choose_backend("auto", CUDA, torch.bfloat16) == "triton"
    assert arguments.choose_backend("auto", CUDA, torch.float32) == "chunked"
    assert arguments.choose_backend("auto", CPU, torch.bfloat16) == "chunked"


def test_an_old_card_gets_chunks_and_a_warning() -> None:
    arguments._warn_once.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(7, 5)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="Tesla T4"),
        pytest.warns(RuntimeWarning, match=r"Tesla T4 is older than compute capability 8.0; index_backprop falls back"),
    ):
        assert arguments.choose_backend("auto", CUDA, torch.bfloat16) == "chunked"


@pytest.mark.parametrize("N", [1, 1000, 3136, 65536, 10**7])
def test_panels_are_whole_blocks_within_their_budget(N: int) -> None:
    width = triton.panel_width(N, 2**20, 2, 128)
    assert width % 128 == 0
    assert width == 128 or width * N * 2 <= triton.PANEL_BYTES
    assert triton.panel_width(N, 100, 2, 128) == 100


def test_without_triton_auto_falls_back_with_one_warning_and_a_request_is_refused() -> None:
    arguments._warn_once.cache_clear()
    with mock.patch.object(triton.importlib.util, "find_spec", return_value=None):
        with pytest.warns(
            RuntimeWarning, match="Triton is not installed; index_backprop falls back to backend='chunked'"
        ):
            assert arguments.choose_backend("auto", CUDA, torch.bfloat16) == "chunked"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert arguments.choose_backend("auto", CUDA, torch.bfloat16) == "chunked"
        with pytest.raises(
            ValueError, match="backend='triton' cannot run: Triton is not installed; use backend='chunked'"
        ):
            index_backprop(torch.zeros(2, 3), torch.zeros(5, 3), backend="triton")


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"tensors are on cpu, which Triton serves only in its interpreter \(TRITON_INTERPRET=1\)"
    ):
        index_backprop(torch.zeros(2, 3), torch.zeros(5, 3), backend="triton")


def test_triton_has_no_float64() -> None:
    with pytest.raises(ValueError, match="its kernels have no float64; use backend='chunked'"):
        nearest_code(torch.zeros(2, 3, device=DEVICE).double(), torch.zeros(5, 3, device=DEVICE), backend="triton")
