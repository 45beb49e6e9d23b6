"""torch.compile of a module that holds the operator: one graph, the same values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operators import inputs, scalar
from torch import nn

from ibq.ops import index_backprop
from ibq.quantizers import build_quantizer


@pytest.mark.parametrize("tau", [0.05, None])
def test_the_operator_compiles_into_one_graph(tau: float | None) -> None:
    z_ND, codebook_KD = inputs(33, 17, 5)
    weight_ND = torch.randn_like(z_ND)

    def step(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        outputs = index_backprop(2 * z, codebook, entropy_temperature=tau)
        return scalar(outputs, "z_q sample codebook" if tau else "z_q", weight_ND)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected, actual = (
        torch.autograd.grad(function(z_ND, codebook_KD), (z_ND, codebook_KD)) for function in (step, compiled)
    )
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_module_with_the_quantizer_compiles_into_one_graph() -> None:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.quantize = build_quantizer({"method": "ibq", "codebook_size": 32, "code_dim": 8})

        def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z_q, indices, losses = self.quantize(self.conv(x_BCHW))
            return z_q.square().mean() + torch.stack(list(losses.values())).sum(), indices

    model, x_BCHW = Bottleneck(), torch.randn(2, 3, 4, 4)
    results = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss, indices = function(x_BCHW)
        results.append([loss, indices, *torch.autograd.grad(loss, list(model.parameters()))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_torch_finds_the_operator_well_formed() -> None:
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for tau in (0.1, None):
        for z_ND, codebook_KD in (inputs(9, 5, 3), [tensor.detach().T.requires_grad_() for tensor in inputs(4, 4, 7)]):
            arguments = (z_ND, codebook_KD, tau, "", torch.float64, "chunked")
            torch.library.opcheck(torch.ops.ibq.index_backprop, arguments, test_utils=utilities)
            *_, mean_K, statistics_SN = torch.ops.ibq.index_backprop(*arguments)
            indices_N, g = torch.zeros(len(z_ND), dtype=torch.int64), torch.ones((), dtype=torch.float64)
            entropies = (None, None) if tau is None else (g, g)
            saved = [tensor.detach() for tensor in (z_ND, codebook_KD, indices_N, mean_K, statistics_SN)]
            for g_ND in (None, torch.ones(z_ND.shape, dtype=torch.float64)):
                backward = (g_ND, *entropies, *saved, *arguments[2:])
                torch.library.opcheck(torch.ops.ibq.index_backprop_backward, backward, test_utils=utilities)


def test_one_graph_serves_every_number_of_tokens() -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda z, codebook: index_backprop(z, codebook)[0], backend=counting, dynamic=True)
    codebook_KD = torch.randn(7, 3)
    for N in (5, 9, 20):
        assert step(torch.randn(N, 3), codebook_KD).shape == (N, 3)
    assert len(graphs) == 1
