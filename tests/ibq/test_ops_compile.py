"""torch.compile of a module that holds the operator: one graph, the same values and gradients."""

from __future__ import annotations

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
    expected, actual = (torch.autograd.grad(function(z_ND, codebook_KD), (z_ND, codebook_KD)) for function in (step, compiled))
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
    z_ND, codebook_KD = inputs(9, 5, 3)
    for tau in (0.1, None):
        arguments = (z_ND, codebook_KD, tau, "", torch.float64, "chunked")
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.ibq.index_backprop, arguments, test_utils=utilities)
