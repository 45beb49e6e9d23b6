"""vector-quantize-pytorch on shared weights and inputs: equal codes and indices, and where a definition differs, which
and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize

from ibq import build_quantizer
from ibq.losses import weighted_sum
from ibq.quantizers import Quantized, Quantizer

K, D, GRID = 64, 6, (2, 6, 5, 4)


def make(**fields: Any) -> Quantizer:
    return build_quantizer({"codebook_size": K, "code_dim": D} | fields)


def tokens(z_BDHW: torch.Tensor) -> torch.Tensor:
    """(B, D, H, W) as the library's sequences (B, H*W, D)."""
    return z_BDHW.flatten(2).mT


def assert_same_codes(mine: Quantized, codes_BND: torch.Tensor, indices_BN: torch.Tensor) -> None:
    """Their training output is z + sg(q - z), which rounds; ours is the code itself."""
    assert torch.equal(mine.indices.flatten(1), indices_BN.long())
    torch.testing.assert_close(tokens(mine.z_q), codes_BND, rtol=1e-5, atol=1e-6)


def assert_same_gradient(z_BDHW: torch.Tensor, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    gradients = [torch.autograd.grad(loss, [z_BDHW], retain_graph=True)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_vq_with_a_learnt_codebook(gradient: str) -> None:
    """Their one loss |z - q|^2 without stop-gradient is our two terms of weight 1: equal gradients, and half our sum in
    value."""
    mine = make(method="vq", codebook_init="normal", beta=1.0, gradient=gradient)
    rotation = gradient == "rotation"
    theirs = VectorQuantize(
        D, K, ema_update=False, learnable_codebook=True, rotation_trick=rotation, commitment_weight=1.0
    )
    theirs._codebook.embed.data.copy_(mine.embedding[None])
    z_BDHW, g_BDHW = torch.randn(GRID, requires_grad=True), torch.randn(GRID)
    codes_BND, indices_BN, loss = theirs(tokens(z_BDHW))
    quantized = mine(z_BDHW)
    assert_same_codes(quantized, codes_BND, indices_BN)
    assert_same_gradient(z_BDHW, (quantized.z_q * g_BDHW).sum(), (codes_BND * tokens(g_BDHW)).sum())
    total = weighted_sum(quantized.losses, mine.config.loss_weights)
    torch.testing.assert_close(total / 2, loss.squeeze())
    assert_same_gradient(z_BDHW, total, loss)
    (dC,) = torch.autograd.grad(total, [mine.embedding])
    torch.testing.assert_close(dC, torch.autograd.grad(loss, [theirs._codebook.embed])[0][0])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_vq_with_moving_averages(distance: str) -> None:
    """They update within a forward and return the codes of before; we update at the start of the next forward: the same
    sequence."""
    mine = make(method="vq", codebook_init="normal", distance=distance, ema_decay=0.8, beta_on="commitment", beta=0.25)
    theirs = VectorQuantize(
        D, K, decay=0.8, use_cosine_sim=distance == "cosine", rotation_trick=False, commitment_weight=0.25
    )
    start_KD = mine.codebook.detach().clone()
    theirs._codebook.embed.copy_(start_KD[None])
    theirs._codebook.embed_avg.copy_(start_KD[None])
    for _ in range(4):
        z_BDHW = torch.randn(GRID, requires_grad=True)
        codes_BND, indices_BN, loss = theirs(tokens(z_BDHW))
        quantized = mine(z_BDHW)
        assert_same_codes(quantized, codes_BND, indices_BN)
        torch.testing.assert_close(0.25 * quantized.losses["commitment"], loss.squeeze(), rtol=1e-5, atol=1e-7)
        assert_same_gradient(z_BDHW, 0.25 * quantized.losses["commitment"], loss)
        assert_same_gradient(z_BDHW, quantized.z_q.square().sum(), codes_BND.square().sum())
    mine(torch.randn(GRID))
    torch.testing.assert_close(mine.codebook, theirs.codebook, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mine.codebook, start_KD)


def test_cosine_vq_in_evaluation() -> None:
    mine = make(method="vq", codebook_init="normal", distance="cosine").eval()
    theirs = VectorQuantize(D, K, use_cosine_sim=True).eval()
    theirs._codebook.embed.copy_(mine.codebook.detach()[None])
    z_BDHW = torch.randn(GRID)
    codes_BND, indices_BN, _ = theirs(tokens(z_BDHW))
    assert_same_codes(mine(z_BDHW), codes_BND, indices_BN)
    torch.testing.assert_close(
        tokens(mine.indices_to_codes(mine(z_BDHW).indices)), theirs.get_codes_from_indices(indices_BN)
    )


def bits_reversed(indices: torch.Tensor) -> torch.Tensor:
    return sum(((indices >> d) & 1) << (D - 1 - d) for d in range(D))


@pytest.mark.parametrize("method", ["lfq", "bsq"])
def test_binary_quantizers(method: str) -> None:
    """Their first channel is the most significant bit, ours the least. Their entropies clamp p at 1e-5 within the
    logarithm; ours are exact for a token, and add 1e-5 in the codebook's, as IBQ released it: they differ by at most K
    times 1e-5.
    """
    mine = make(method=method, entropy_temperature=2.0)
    theirs = LFQ(
        dim=D, codebook_size=K, spherical=method == "bsq", commitment_loss_weight=0.25, entropy_loss_weight=0.1
    )
    z_BDHW, g_BDHW = torch.randn(GRID, requires_grad=True), torch.randn(GRID)
    (codes_BND, indices_BN, _), parts = theirs(tokens(z_BDHW), inv_temperature=0.5, return_loss_breakdown=True)
    quantized = mine(z_BDHW)
    assert_same_codes(quantized, codes_BND, bits_reversed(indices_BN))
    assert_same_gradient(z_BDHW, (quantized.z_q * g_BDHW).sum(), (codes_BND * tokens(g_BDHW)).sum())
    losses = quantized.losses
    torch.testing.assert_close(losses["commitment"], parts.commitment)
    torch.testing.assert_close(losses["sample_entropy"], parts.per_sample_entropy, rtol=0, atol=1.01e-5 * K)
    torch.testing.assert_close(losses["codebook_entropy"], parts.batch_entropy, rtol=0, atol=1.01e-5 * K)
    assert_same_gradient(z_BDHW, losses["commitment"], parts.commitment)
    codes_of_theirs = theirs.indices_to_codes(bits_reversed(quantized.indices.flatten(1)))
    torch.testing.assert_close(tokens(mine.indices_to_codes(quantized.indices)), codes_of_theirs)


@pytest.mark.parametrize("levels", [(4, 4, 4), (8, 5, 5, 5), (3, 6, 7)])
def test_fsq(levels: tuple[int, ...]) -> None:
    theirs = FSQ(list(levels))
    mine = build_quantizer(
        {"method": "fsq", "levels": levels, "codebook_size": theirs.codebook_size, "code_dim": len(levels)}
    )
    z_BDHW = (2 * torch.randn(2, len(levels), 5, 4)).requires_grad_()
    g_BDHW = torch.randn_like(z_BDHW)
    codes_BND, indices_BN = theirs(tokens(z_BDHW))
    quantized = mine(z_BDHW)
    assert_same_codes(quantized, codes_BND, indices_BN)
    assert_same_gradient(z_BDHW, (quantized.z_q * g_BDHW).sum(), (codes_BND * tokens(g_BDHW)).sum())
    torch.testing.assert_close(mine.codebook, theirs.implicit_codebook)


def test_simvq() -> None:
    """Their default adds the rotation trick, which the paper has not; switched off here. Beta stands on the commitment
    term there.

    Their map has no bias, where the authors' code, as ours, has one: ours is set to zero.
    """
    mine = make(method="simvq", beta=0.25, beta_on="commitment")
    theirs = SimVQ(D, K, rotation_trick=False)
    theirs.frozen_codebook.copy_(mine.embedding)
    theirs.code_transform.weight.data.copy_(mine.projection.weight)
    nn.init.zeros_(mine.projection.bias)
    z_BDHW = torch.randn(GRID, requires_grad=True)
    codes_BND, indices_BN, loss = theirs(tokens(z_BDHW))
    quantized = mine(z_BDHW)
    assert_same_codes(quantized, codes_BND, indices_BN)
    total = weighted_sum(quantized.losses, mine.config.loss_weights)
    torch.testing.assert_close(total, loss)
    assert_same_gradient(z_BDHW, total, loss)
    assert_same_gradient(z_BDHW, quantized.z_q.square().sum(), codes_BND.square().sum())
    (dw,) = torch.autograd.grad(total, [mine.projection.weight])
    torch.testing.assert_close(dw, torch.autograd.grad(loss, [theirs.code_transform.weight])[0])


def test_vqbridge() -> None:
    """Theirs takes any module as bridge, here ours; its one loss is ours as in VQ."""
    mine = make(method="vqbridge", codebook_init="normal", beta=1.0, patch=8, width=16)
    for parameter in mine.bridge.parameters():
        nn.init.normal_(parameter, std=0.2)
    bridge = copy.deepcopy(mine.bridge)
    theirs = VectorQuantize(D, K, vq_bridge=AllHeads(bridge), rotation_trick=False, commitment_weight=1.0)
    theirs._codebook.embed.data.copy_(mine.embedding[None])
    z_BDHW = torch.randn(GRID, requires_grad=True)
    codes_BND, indices_BN, loss = theirs(tokens(z_BDHW))
    quantized = mine(z_BDHW)
    assert_same_codes(quantized, codes_BND, indices_BN)
    total = weighted_sum(quantized.losses, mine.config.loss_weights)
    torch.testing.assert_close(total / 2, loss.squeeze())
    assert_same_gradient(z_BDHW, total, loss)
    assert_same_gradient(z_BDHW, quantized.z_q.square().sum(), codes_BND.square().sum())
    learnt = [mine.embedding, *mine.bridge.parameters()], [theirs._codebook.embed, *bridge.parameters()]
    for mine_x, theirs_x in zip(
        torch.autograd.grad(total, learnt[0]), torch.autograd.grad(loss, learnt[1]), strict=True
    ):
        torch.testing.assert_close(mine_x, theirs_x.view_as(mine_x), rtol=1e-4, atol=1e-6)


class AllHeads(nn.Module):
    """A bridge (K, D) as theirs want it, (heads, K, D) with one head."""

    def __init__(self, bridge: nn.Module) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(self, codes_1KD: torch.Tensor) -> torch.Tensor:
        return self.bridge(codes_1KD[0])[None]
