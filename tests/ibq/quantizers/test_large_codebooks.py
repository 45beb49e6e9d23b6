"""Implied codebooks (lfq, bsq, fsq) that no memory could hold: codes come from the digits of their indices."""

from __future__ import annotations

import math
import resource
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantizer_variants import assert_refused

from ibq import build_quantizer
from ibq.quantizers import Quantizer
from ibq.schema import COUNTABLE_CODES

LARGE: dict[str, dict[str, Any]] = {
    "lfq": {"codebook_size": 2**36, "code_dim": 36},
    "bsq": {"codebook_size": 2**36, "code_dim": 36},
    "fsq": {"codebook_size": 8**12, "code_dim": 12, "levels": (8,) * 12},
    "lfq of 62 bits": {"method": "lfq", "codebook_size": 2**62, "code_dim": 62},
}
large = pytest.mark.parametrize("name", LARGE)


def make(name: str, **fields: Any) -> Quantizer:
    return build_quantizer({"method": name} | LARGE[name] | fields)


@large
def test_codes_come_from_the_digits_of_their_indices(name: str) -> None:
    """36 bits asked for 512 GiB when they were built."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quantizer = make(name)
    D, K = quantizer.config.code_dim, quantizer.config.codebook_size
    z_BDHW = torch.randn(2, D, 4, 4, requires_grad=True)
    quantized = quantizer(z_BDHW)
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)
    assert quantized.losses.keys() == quantizer.config.loss_weights.keys()
    (quantized.z_q.sum() + sum(quantized.losses.values())).backward()
    assert z_BDHW.grad.isfinite().all()
    assert torch.equal(quantizer(quantized.z_q.detach() * 1.01).indices, quantized.indices) or "fsq" in name
    ends = quantizer.indices_to_codes(torch.tensor([[[0, K - 1]]]))[0, :, 0]
    assert (ends[:, 0] < 0).all()
    assert (ends[:, 1] > 0).all()
    with pytest.raises(ValueError, match="they must lie in"):
        quantizer.indices_to_codes(torch.tensor([[[K]]]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "KiB"


@large
def test_a_codebook_too_large_to_be_built_is_one_sentence(name: str) -> None:
    quantizer = make(name)
    for ask in (lambda: quantizer.codebook, lambda: quantizer.logits(torch.zeros(1, quantizer.config.code_dim))):
        with pytest.raises(ValueError, match=r"^a codebook of [\d,]+ codes is not built whole, 2\^24 are the most"):
            ask()


@pytest.mark.parametrize("method", ["lfq", "bsq"])
def test_the_entropy_of_bits_is_that_of_their_means(method: str) -> None:
    """By the formula in float64, gradients too; where bits are independent and sure, it is that of the codes."""
    tau, D = 0.7, 6
    quantizer = build_quantizer(
        {"method": method, "codebook_size": 64, "code_dim": D, "entropy_temperature": tau, "codebook_entropy": "bits"}
    )
    z_ND = torch.randn(40, D, dtype=torch.float64, requires_grad=True)
    x_ND = z_ND if method == "lfq" else F.normalize(z_ND, dim=1)
    p_D = torch.sigmoid(4 * (1 if method == "lfq" else D**-0.5) * x_ND / tau).mean(0)
    expected = -(p_D * (p_D + 1e-5).log() + (1 - p_D) * (1 - p_D + 1e-5).log()).sum()
    actual = quantizer.quantize(z_ND)[2]["codebook_entropy"]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, [z_ND], retain_graph=True)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)

    codes_KD = 100 * quantizer.codebook
    entropies = [
        build_quantizer(quantizer.config.with_fields(codebook_entropy=how)).quantize(codes_KD)[2]["codebook_entropy"]
        for how in ("codes", "bits")
    ]
    torch.testing.assert_close(*entropies, rtol=2e-3, atol=0)
    assert entropies[1].item() == pytest.approx(D * math.log(2), rel=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_the_entropy_of_bits_is_finite_at_any_size_of_features(scale: float) -> None:
    z_BDHW = torch.full((1, 36, 1, 3), scale, requires_grad=True)
    losses = make("lfq")(z_BDHW).losses
    (dz,) = torch.autograd.grad(losses["codebook_entropy"], [z_BDHW])
    assert dz.isfinite().all()
    assert losses["codebook_entropy"].item() == pytest.approx(36 * math.log(2) if scale == 0 else 0, abs=1e-3)


def test_which_entropy_it_is_follows_from_the_size_unless_named() -> None:
    small, most = ({"method": "bsq", "codebook_size": 2**bits, "code_dim": bits} for bits in (18, 24))
    assert not build_quantizer(small).config.entropy_of_bits
    assert not build_quantizer(most).config.entropy_of_bits
    assert COUNTABLE_CODES == 2**24
    assert build_quantizer({"method": "bsq", "codebook_size": 2**25, "code_dim": 25}).config.entropy_of_bits
    assert build_quantizer(small | {"codebook_entropy": "bits"}).config.entropy_of_bits


@pytest.mark.parametrize(
    ("config", "mentions"),
    [
        (
            {"method": "lfq", "codebook_size": 2**36, "code_dim": 36, "codebook_entropy": "codes"},
            ("codebook_size=68719476736", "2^24", "set codebook_entropy='bits'"),
        ),
        ({"method": "bsq", "codebook_size": 2**63, "code_dim": 63}, ("more than an index can name", "62 bits")),
        ({"method": "lfq", "codebook_size": 2**600, "code_dim": 600}, ("more than an index can name", "62 bits")),
        (
            {"method": "fsq", "codebook_size": 8**21, "code_dim": 21, "levels": (8,) * 21},
            ("more codes than the 2^62", "take fewer"),
        ),
    ],
)
def test_codebooks_that_cannot_be_are_one_sentence(config: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused(config, *mentions)


def test_large_codebooks_in_half_precision() -> None:
    for name in LARGE:
        quantizer = make(name).bfloat16()
        quantized = quantizer(torch.randn(1, quantizer.config.code_dim, 4, 4).bfloat16())
        assert quantized.z_q.dtype == torch.bfloat16
        assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)


@large
def test_indices_of_another_device_are_taken_where_the_quantizer_is(name: str) -> None:
    """Saved tokens lie on the CPU, and a table of codes took them too."""
    assert make(name).to("meta").codes_of(torch.zeros(1, 2, 2, dtype=torch.int64)).device.type == "meta"
