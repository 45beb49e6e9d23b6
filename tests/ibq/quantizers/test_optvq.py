"""OptVQ: the transport against the dense matrix in float64, in chunks too; the nearest code in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from largest_tensor import LargestTensor
from quantizer_variants import assert_refused
from torch import nn

from ibq import OptimalTransportQuantizer, build_quantizer
from ibq.errors import NonFiniteInputError
from ibq.ops import nearest_code
from ibq.quantizers import optvq
from ibq.quantizers.optvq import Costs, sinkhorn
from ibq.quantizers.updates import kmeans

K, D = 60, 5


def make(**fields: Any) -> OptimalTransportQuantizer:
    fields = {"method": "optvq", "codebook_size": K, "code_dim": D, "codebook_init": "normal"} | fields
    quantizer = build_quantizer(fields)
    assert isinstance(quantizer, OptimalTransportQuantizer)
    return quantizer


def dense(z_ND: torch.Tensor, codebook_KD: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Rows (N, K) of the assignment, each summing to 1, as the released code has it: on the whole matrix."""
    distance_NK = (z_ND[:, None] - codebook_KD).norm(dim=2)
    cost_NK = (distance_NK - distance_NK.mean()) / (distance_NK.std() + 1e-6)
    q_NK = torch.exp(-epsilon * (cost_NK - cost_NK.min()))
    q_NK = q_NK / (q_NK.sum() + 1e-8)
    for _ in range(iterations):
        q_NK = q_NK / (q_NK.sum(0, keepdim=True) + 1e-8) / codebook_KD.shape[0]
        q_NK = q_NK / (q_NK.sum(1, keepdim=True) + 1e-8) / z_ND.shape[0]
    return q_NK / q_NK.sum(1, keepdim=True)


def in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Chunks of so many tokens, and distances that are not kept."""

    def chunks(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> Iterator[slice]:
        return (slice(start, min(start + rows, len(z_ND))) for start in range(0, len(z_ND), rows))

    monkeypatch.setattr(optvq, "chunks", chunks)
    monkeypatch.setattr(optvq, "MEMORY_BYTES", 0)


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(("epsilon", "iterations", "scale"), [(10.0, 5, 1.0), (10.0, 1, 0.1), (30.0, 3, 4.0)])
def test_rows_and_indices_are_those_of_the_dense_matrix(
    monkeypatch: pytest.MonkeyPatch, rows: int | None, epsilon: float, iterations: int, scale: float
) -> None:
    z_ND = torch.randn(90, D, dtype=torch.float64) + 3
    codebook_KD = scale * torch.randn(K, D, dtype=torch.float64) + 3
    if rows:
        in_chunks(monkeypatch, rows)
    costs = Costs(z_ND, codebook_KD, epsilon, None)
    log_u_K = sinkhorn(costs, iterations)
    rows_NK = torch.cat([(log_nK + log_u_K).softmax(1) for _, log_nK in costs])
    expected_NK = dense(z_ND, codebook_KD, epsilon, iterations)
    torch.testing.assert_close(rows_NK, expected_NK, rtol=1e-8, atol=1e-11)
    indices_N = optvq.transported(z_ND, codebook_KD, epsilon, iterations, None)
    assert torch.equal(indices_N, expected_NK.argmax(1))
    assert not torch.equal(indices_N, nearest_code(z_ND, codebook_KD))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_chooses_as_float64_does_far_from_the_origin_too(offset: float) -> None:
    z_ND, codebook_KD = torch.randn(500, D) + offset, torch.randn(K, D) + offset
    expected_N = dense(z_ND.double(), codebook_KD.double(), 10.0, 5).argmax(1)
    agree = optvq.transported(z_ND, codebook_KD, 10.0, 5, None) == expected_N
    assert agree.double().mean() > 0.995  # where two codes are equally good in either


def test_training_spreads_a_batch_over_codes_that_a_nearest_search_leaves_unused() -> None:
    quantizer = make(codebook_size=512)
    z_BDHW = 0.05 * torch.randn(8, D, 8, 8) + 1
    used = [len(quantizer.train(training)(z_BDHW).indices.unique()) for training in (True, False)]
    assert used[0] > 5 * used[1]


@pytest.mark.parametrize("entropy_weight", [0.0, 0.05])
def test_evaluation_takes_the_nearest_code_whatever_is_beside_a_token(entropy_weight: float) -> None:
    quantizer, z_BDHW = make(entropy_weight=entropy_weight).eval(), torch.randn(2, D, 6, 6)
    nearest_N = nearest_code(z_BDHW.movedim(1, -1).flatten(0, 2), quantizer.codebook)
    assert torch.equal(quantizer(z_BDHW).indices.flatten(), nearest_N)


def test_terms_and_gradients_are_vqs_at_the_transported_codes() -> None:
    quantizer, z_BDHW = make(reparametrization="none").double(), torch.randn(2, D, 4, 4, dtype=torch.float64)
    z_BDHW.requires_grad_()
    z_q, indices, losses = quantizer(z_BDHW)
    codes_BDHW = quantizer.embedding[indices].movedim(-1, 1)
    torch.testing.assert_close(losses["commitment"], (z_BDHW - codes_BDHW.detach()).square().mean())
    (dC,) = torch.autograd.grad(losses["codebook"], [quantizer.embedding])
    (expected_KD,) = torch.autograd.grad((z_BDHW.detach() - codes_BDHW).square().mean(), [quantizer.embedding])
    torch.testing.assert_close(dC, expected_KD)
    g_BDHW = torch.randn_like(z_BDHW)
    assert torch.equal(torch.autograd.grad(z_q, [z_BDHW], g_BDHW)[0], g_BDHW)


def test_codes_are_clustered_whatever_the_map_has_become() -> None:
    quantizer, features_MD = make(), torch.randn(300, D)
    nn.init.normal_(quantizer.projection.weight)
    quantizer.cluster(features_MD, torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.codebook, kmeans(features_MD, K, torch.Generator().manual_seed(0)))


def test_no_matrix_of_tokens_by_codes_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 16)
    quantizer, z_BDHW = make(codebook_size=2048), torch.randn(4, D, 8, 8)
    quantizer.embedding.requires_grad_(False)
    with LargestTensor() as largest:
        optvq.transported(z_BDHW.movedim(1, -1).flatten(0, 2), quantizer.codebook, 10.0, 5, None)
    assert largest.numbers == 16 * 2048


def test_one_code_and_one_token_are_a_batch_too() -> None:
    for size, tokens in ((1, 1), (1, 6), (7, 1)):
        indices = make(codebook_size=size)(torch.randn(1, D, tokens, 1)).indices
        assert indices.max() < size


def test_a_codebook_that_is_not_finite_is_refused() -> None:
    quantizer = make()
    with torch.no_grad():
        quantizer.embedding[3, 1] = float("nan")
    with pytest.raises(NonFiniteInputError, match="values of codebook are NaN or infinite"):
        quantizer(torch.randn(1, D, 2, 2))


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [({"epsilon": 0.0}, ("epsilon", "greater than 0")), ({"iterations": 0}, ("iterations", "equal to 1"))],
)
def test_what_cannot_be_is_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "optvq"} | fields, *mentions)
