"""Sub-tokens: bits that round-trip, probabilities of whole tokens, and every part of the head in use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sampling_oracles import network

from ibq.models.config import TransformerConfig
from ibq.models.transformer import Transformer
from ibq.models.transformer.subtokens import join, split
from ibq.sampling import Sampler, Sampling

SPLITS = [(4,), (2, 2), (1, 3), (3, 1), (1, 1, 1, 1), (1, 2, 1)]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_splitting_and_joining_round_trip(bits: list[int]) -> None:
    symbols = [2**b for b in bits]
    tokens_BT = torch.randint(0, 2 ** sum(bits), (3, 5))
    digits_BTJ = split(tokens_BT, symbols)
    assert digits_BTJ.shape == (3, 5, len(bits))
    assert all(
        0 <= digit < size
        for digits in digits_BTJ.flatten(0, 1).tolist()
        for digit, size in zip(digits, symbols, strict=True)
    )
    assert torch.equal(join(digits_BTJ, symbols), tokens_BT)


def test_the_most_significant_bits_come_first() -> None:
    assert split(torch.tensor(0b101101_000000000111), (2**6, 2**12)).tolist() == [0b101101, 0b111]
    assert join(torch.tensor([[0b1, 0b00, 0b11]]), (2, 4, 4)).tolist() == [0b1_00_11]
    assert split(torch.tensor([5, 10]), (11,)).tolist() == [[5], [10]]


def test_symbols_are_the_token_or_its_subtokens() -> None:
    assert network(codes=11).symbols == (11,)
    assert network(codes=1).symbols == (1,)
    assert network(codes=2**7, subtoken_bits=(3, 4)).symbols == (8, 16)


def test_a_token_is_embedded_as_the_sum_of_its_subtokens() -> None:
    embedding = network(codes=32, subtoken_bits=(2, 3)).tok_emb
    assert embedding(torch.tensor([[0b10_110]])).shape == (1, 1, 128)
    torch.testing.assert_close(
        embedding(torch.tensor(0b10_110)), embedding.parts[0].weight[0b10] + embedding.parts[1].weight[0b110]
    )


@pytest.mark.parametrize("bits", SPLITS)
def test_probabilities_of_whole_tokens_sum_to_one_and_are_those_of_the_loss(bits: tuple[int, ...]) -> None:
    transformer = network(codes=16, subtoken_bits=bits).eval()
    hidden_BSW = transformer.hidden(torch.randint(0, 16, (2, 4)), torch.tensor([0, 2]))
    hidden_BW, K = hidden_BSW[:, 3], 16
    log_p_BK = torch.zeros(2, K, dtype=torch.float64)
    for token in range(K):
        digits_BJ = split(torch.tensor([token, token]), transformer.symbols)
        for j, digit in enumerate(digits_BJ[0].tolist()):
            logits_BK = transformer.symbol_logits(hidden_BW, digits_BJ[:, :j])
            assert logits_BK.shape == (2, 2 ** bits[j])
            log_p_BK[:, token] += logits_BK.log_softmax(1)[:, digit]
        predictions = transformer.predictions(hidden_BSW, torch.full((2, 5), token))
        assert [tuple(weight_KW.shape) for _, weight_KW, _ in predictions] == [(2**b, 128) for b in bits]
        losses = [
            F.cross_entropy(hidden_NW @ weight_KW.T, targets_N, reduction="none")
            for hidden_NW, weight_KW, targets_N in predictions
        ]
        torch.testing.assert_close(
            -torch.stack(losses).sum(0).view(2, 5)[:, 3], log_p_BK[:, token], rtol=1e-10, atol=1e-10
        )
    assert log_p_BK.std(1).min() > 0.1
    torch.testing.assert_close(log_p_BK.exp().sum(1), torch.ones(2, dtype=torch.float64))


def test_a_plain_token_has_one_prediction_by_the_head() -> None:
    transformer = network().eval()
    tokens_BT, classes_B = torch.randint(0, 11, (2, 9)), torch.tensor([0, 1])
    hidden_BSW = transformer.hidden(tokens_BT[:, :-1], classes_B)
    ((hidden_NW, weight_KW, targets_N),) = transformer.predictions(hidden_BSW, tokens_BT)
    assert weight_KW is transformer.head.weight
    assert torch.equal(targets_N, tokens_BT.flatten())
    logits_BSK = transformer(tokens_BT[:, :-1], classes_B)
    torch.testing.assert_close((hidden_NW @ weight_KW.T).view(2, 9, 11), logits_BSK)
    torch.testing.assert_close(transformer.symbol_logits(hidden_BSW[:, 2], tokens_BT[:, :0]), logits_BSK[:, 2])


def test_a_new_head_predicts_nothing() -> None:
    transformer = Transformer(TransformerConfig(depth=2, codebook_size=16, classes=3, grid=3, subtoken_bits=(1, 3)))
    scales = {
        name: p.detach()[: 2 * 128].std().item()
        for name, p in transformer.named_parameters()
        if name.endswith("ada_lin.1.weight")
    }
    assert scales.pop("head_nm.ada_lin.1.weight") == pytest.approx(0.01, rel=0.05)
    assert scales.pop("head.norm.ada_lin.1.weight") == pytest.approx(0.01, rel=0.05)
    assert sorted(scales) == [f"{part}blocks.{i}.ada_lin.1.weight" for part in ("", "head.") for i in (0, 1)]
    assert list(scales.values()) == pytest.approx([2e-5] * 4, rel=0.05)
    for _, weight_KW, _ in transformer.predictions(torch.randn(1, 4, 128), torch.zeros(1, 4, dtype=torch.int64)):
        assert weight_KW.abs().max() == 0
    tokens_BN = Sampler(transformer, Sampling(), seed=0, batch_size=200)(
        torch.arange(200), torch.zeros(200, dtype=torch.int64)
    )
    assert tokens_BN.flatten().bincount(minlength=16).min() > 60  # uniform: 112.5 each


@pytest.mark.parametrize("bits", SPLITS)
def test_every_part_receives_a_gradient(bits: tuple[int, ...]) -> None:
    transformer = network(codes=16, subtoken_bits=bits).requires_grad_().train()
    tokens_BN = torch.randint(0, 16, (4, 9), generator=torch.Generator().manual_seed(0))
    hidden_BSW = transformer.hidden(tokens_BN[:, :-1], torch.tensor([0, 1, 2, 3]))
    parts = transformer.predictions(hidden_BSW, tokens_BN)
    sum(F.cross_entropy(hidden_NW @ weight_KW.T, targets_N) for hidden_NW, weight_KW, targets_N in parts).backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_whole_logits_of_subtokens_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^tokens are predicted in sub-tokens of 2 x 8 values, which have no logits over whole tokens"
    ):
        network(codes=16, subtoken_bits=(1, 3))(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]))


def test_parameters_of_a_split_at_the_papers_size() -> None:
    """2^18 codes in 6 + 12 bits: the head and the embeddings shrink from two matrices of 2^18 rows to a few small
    ones."""
    with torch.device("meta"):
        split_up, whole = (
            Transformer(TransformerConfig(depth=16, codebook_size=2**18, subtoken_bits=bits)) for bits in ((6, 12), ())
        )
    W, count = 1024, [sum(parameter.numel() for parameter in model.parameters()) for model in (split_up, whole)]
    block = sum(parameter.numel() for parameter in split_up.blocks[0].parameters())
    rows = (64 + 4096) * 2 + 64 + 2
    norm = W + W * 2 * W + 2 * W
    assert count[0] - (count[1] - 2 * 2**18 * W) == rows * W + 2 * block + norm
    assert {name for name, _ in split_up.head.named_children()} == {
        "embeddings",
        "positions",
        "blocks",
        "norm",
        "outputs",
    }
