"""torch.export of a tokenizer's encode and decode: no branch on values, torch's own operators alone, any batch size.

That is what other runtimes need: torch.onnx.export makes ONNX of opset 18 of such a graph (tried with onnx 1.23.2,
onnxscript 0.7.2 and onnxruntime 1.32.0, every method: indices equal, images within 4e-6), and asks for nothing more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from ibq import Tokenizer
from ibq.config import TrainConfig
from ibq.quantizers import Quantizer

METHODS: dict[str, dict[str, Any]] = {
    "ibq": {"code_dim": 8},
    "vq": {"code_dim": 8},
    "simvq": {"code_dim": 8},
    "gumbel": {"code_dim": 8},
    "diveq": {"code_dim": 8},
    "wasserstein": {"code_dim": 8},
    "vqbridge": {"code_dim": 8, "width": 16},
    "optvq": {"code_dim": 8},
    "nsvq": {"code_dim": 8},
    "lfq": {"code_dim": 6},
    "bsq": {"code_dim": 6},
    "fsq": {"code_dim": 2, "levels": (8, 8)},
    "spherical": {"code_dim": 8},
    "grouped": {"code_dim": 8},
}


class Part(nn.Module):
    """A module whose forward is one method of the tokenizer, as torch.export wants it."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        super().__init__()
        self.tokenizer, self.name = tokenizer, name

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(self.tokenizer, self.name)(given)
        return out


def tokenizer(method: str) -> Tokenizer:
    model = {"base_channels": 4, "channel_multipliers": (1, 2, 2), "z_channels": 8, "norm_groups": 2}
    quantizer = {"method": method, "codebook_size": 64} | METHODS[method]
    torch.manual_seed(0)
    return Tokenizer(TrainConfig.parse({"model": model, "quantizer": quantizer})).eval()


def test_every_method_is_tried() -> None:
    assert METHODS.keys() == Quantizer.registry.keys()


@pytest.mark.filterwarnings("ignore")  # torch's own, about its internals
@pytest.mark.parametrize("method", METHODS)
def test_encode_and_decode_are_exported_and_give_the_same(method: str) -> None:
    trained = tokenizer(method)
    x_BCHW = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    indices_BHW = trained.encode(x_BCHW)
    for name, given in (("encode", x_BCHW), ("decode", indices_BHW)):
        with torch.no_grad():
            program = export(Part(trained, name), (given[:2],), dynamic_shapes=({0: Dim("B", min=1, max=64)},))
        called = [node.target for node in program.graph.nodes if node.op == "call_function"]
        others = {str(each) for each in called if not str(each).startswith("aten.") and "operator" not in repr(each)}
        assert {each for each in others if "getitem" not in each and "_grad_enabled" not in each} == set()
        assert "aten.frexp.Tensor" not in map(str, called), "ONNX has none"
        exported, own = program.module()(given), getattr(trained, name)(given)
        if name == "encode":
            assert torch.equal(exported, own)
        else:
            torch.testing.assert_close(exported, own, rtol=1e-5, atol=1e-5)


def test_outside_an_export_values_are_looked_at_as_ever() -> None:
    trained = tokenizer("vq")
    with pytest.raises(ValueError, match="indices reach from 0 to 64"):
        trained.decode(torch.tensor([[[0, 64]]]).expand(1, 8, 2).repeat(1, 1, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        trained.encode(torch.full((1, 1, 32, 32), torch.nan))
