"""The loss of the next token in chunks: the dense form's value and gradients, and none of its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor

from ibq import losses
from ibq.losses import NextTokenLoss, cross_entropy
from ibq.models.config import TransformerConfig
from ibq.models.transformer import Transformer
from ibq.models.transformer.subtokens import split

GRID, CLASSES = 3, 4
PLAIN = {"codebook_size": 300}
SUBTOKENS = {"codebook_size": 512, "subtoken_bits": (1, 8)}
every_kind = pytest.mark.parametrize("fields", [PLAIN, SUBTOKENS], ids=["plain", "sub-tokens"])


def transformer_of(fields: dict[str, Any]) -> Transformer:
    """Without dropout, and with a head that is no longer 0."""
    torch.manual_seed(0)
    none = dict.fromkeys(("token_dropout", "attention_dropout", "ffn_dropout", "class_dropout"), 0.0)
    transformer = Transformer(TransformerConfig(depth=1, classes=CLASSES, grid=GRID, **none, **fields))
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer


def batch_of(transformer: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(transformer.config.codebook_size, (5, GRID**2), generator=generator)
    return tokens_BT, torch.randint(CLASSES, (5,), generator=generator)


def dense(transformer: Transformer, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
    """The log-probability of every token, from the logits of all its symbols."""
    hidden_NW = transformer.hidden(tokens_BT[:, :-1], classes_B).flatten(0, 1)
    digits_NJ = split(tokens_BT.flatten(), transformer.symbols)
    log_p_N = torch.zeros(len(digits_NJ), dtype=hidden_NW.dtype)
    for j in range(len(transformer.symbols)):
        log_p_NK = transformer.symbol_logits(hidden_NW, digits_NJ[:, :j]).log_softmax(1)
        log_p_N = log_p_N + log_p_NK[torch.arange(len(log_p_N)), digits_NJ[:, j]]
    return -log_p_N.mean()


def gradients(loss: torch.Tensor, transformer: Transformer) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(transformer.parameters())))


@every_kind
@pytest.mark.parametrize("largest", [1, 45 * 128, 2**26], ids=["smallest chunks", "chunks", "one chunk"])
def test_value_and_gradients_are_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], largest: int
) -> None:
    monkeypatch.setattr(losses, "LARGEST_LOGITS", largest)
    transformer = transformer_of(fields).double()
    batch = batch_of(transformer)
    loss, expected = NextTokenLoss(transformer)(*batch), dense(transformer, *batch)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(3 * loss, transformer), gradients(3 * expected, transformer), rtol=1e-9, atol=1e-12
    )


@every_kind
def test_chunks_change_a_training_step_by_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    transformer = transformer_of(fields)
    batch = batch_of(transformer)
    whole = NextTokenLoss(transformer)(*batch)
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 1)
    chunked = NextTokenLoss(transformer)(*batch)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(chunked, transformer), gradients(whole, transformer), rtol=1e-4, atol=1e-6)


@every_kind
@pytest.mark.parametrize("largest", [1, 2**26], ids=["chunks", "one chunk"])
def test_under_autocast_the_logits_are_bfloat16_and_the_loss_is_not(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], largest: int
) -> None:
    monkeypatch.setattr(losses, "LARGEST_LOGITS", largest)
    transformer = transformer_of(fields)
    batch = batch_of(transformer)
    expected = dense(transformer, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = NextTokenLoss(transformer)(*batch)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - expected.item()) < 0.02
    for mine, theirs in zip(gradients(loss, transformer), gradients(expected, transformer), strict=True):
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


def test_a_new_transformer_knows_nothing() -> None:
    transformer = Transformer(TransformerConfig(depth=1, classes=CLASSES, grid=GRID, codebook_size=300))
    assert NextTokenLoss(transformer)(*batch_of(transformer)).item() == pytest.approx(math.log(300))


def test_what_is_not_finite_stays_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 1)
    hidden_NW, weight_KW = torch.ones(2, 3), torch.ones(300, 3)
    weight_KW[290] = math.nan
    assert cross_entropy(hidden_NW, weight_KW, torch.zeros(2, dtype=torch.int64)).isnan()


def test_at_two_to_the_eighteenth_codes_the_logits_of_all_tokens_are_never_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 2**20)
    K, W, N = 2**18, 4, 128
    hidden_NW, weight_KW = torch.randn(N, W, requires_grad=True), torch.randn(K, W, requires_grad=True)
    targets_N = torch.randint(K, (N,))
    with LargestTensor() as largest:
        loss = cross_entropy(hidden_NW, weight_KW, targets_N)
        loss.backward()
    assert largest.numbers == losses.LARGEST_LOGITS == K * W == N * K // 32
    few_NW = hidden_NW[:8].detach()
    with torch.no_grad(), LargestTensor() as of_few:
        loss = cross_entropy(few_NW, weight_KW, targets_N[:8])
    assert of_few.numbers == 8 * losses.MOST_CODES, "of few tokens neither"
    torch.testing.assert_close(loss, F.cross_entropy(few_NW @ weight_KW.T, targets_N[:8]))
    weight_kW, targets_N = weight_KW[: losses.MOST_CODES], targets_N % losses.MOST_CODES
    with torch.no_grad(), LargestTensor() as dense_form:
        cross_entropy(hidden_NW[:64], weight_kW, targets_N[:64])
    assert dense_form.numbers == 64 * losses.MOST_CODES, "the witness sees logits where they are few"
    assert weight_KW.grad is not None
    assert weight_KW.grad.abs().max() > 0
