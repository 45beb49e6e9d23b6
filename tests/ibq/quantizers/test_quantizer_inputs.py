"""Inputs of a quantizer: masks, sequences, video, indices of every integer type; one sentence on what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from quantizer_variants import K, assert_codes, every_variant, features_for, make, total_loss

from ibq import Tokenizer
from ibq.config import TrainConfig

INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64]


@pytest.mark.parametrize("variant", ["vq", "lfq", "fsq", "grouped ibq"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_indices_of_every_integer_type_are_taken(variant: str, dtype: torch.dtype) -> None:
    quantizer, indices_BHW = make(variant), torch.randint(K, (2, 3, 4))
    assert torch.equal(quantizer.indices_to_codes(indices_BHW.to(dtype)), quantizer.indices_to_codes(indices_BHW))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_saved_tokens_of_every_integer_type_are_decoded(dtype: torch.dtype) -> None:
    tokenizer = small_tokenizer()
    indices_BHW = torch.randint(K, (1, 4, 4))
    assert torch.equal(tokenizer.decode(indices_BHW.to(dtype)), tokenizer.decode(indices_BHW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_what_is_no_integer_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"indices of dtype {dtype} are not integers; pass integers in \[0, 64\)"):
        make("vq").indices_to_codes(torch.zeros(1, 2, 2).to(dtype))


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 2, 2, 2)])
def test_indices_of_another_shape_are_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"are not those of a grid; pass \(B, H, W\), \(B, N\) or \(B, T, H, W\)$"):
        make("vq").indices_to_codes(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 2, 4, 4)])
def test_a_tokenizer_says_which_shape_its_indices_have(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, H, W\), which is \(B, 4, 4\) for images of the config's size"):
        small_tokenizer().decode(torch.zeros(shape, dtype=torch.int64))


def small_tokenizer() -> Tokenizer:
    model = {"base_channels": 8, "norm_groups": 4, "z_channels": 8, "channel_multipliers": (1, 1, 1), "res_blocks": 1}
    fields: dict[str, Any] = {"model": model, "data": {"resolution": 16}}
    config = TrainConfig.parse(fields | {"quantizer": {"method": "ibq", "codebook_size": K, "code_dim": 6}})
    return Tokenizer(config).eval()


# --- Sequences and video ----------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 2, 2)])
def test_sequences_and_video_are_the_same_tokens_in_another_shape(variant: str, shape: tuple[int, ...]) -> None:
    """In the order of the tokens, so that it is the feature map (2, D, 3, 4) reshaped."""
    quantizer = make(variant)
    twin, z_BDHW = copy.deepcopy(quantizer), features_for(quantizer)
    tokens = z_BDHW.movedim(1, -1).reshape(*shape, -1)
    z = tokens if len(shape) == 2 else tokens.movedim(-1, 1)
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = quantizer(z_BDHW)
        torch.manual_seed(seed)
        actual = twin(z)
        assert actual.z_q.shape == z.shape
        assert actual.indices.shape == shape
        assert torch.equal(actual.indices.flatten(), expected.indices.flatten())
        assert_codes(twin, actual)
        assert all(torch.equal(term, expected.losses[name]) for name, term in actual.losses.items())


@pytest.mark.parametrize(
    "shape", [(6,), (4, 6), (2, 6, 12), (2, 5, 3, 4), (2, 3, 4, 6), (2, 4, 6, 3, 4), (1, 6) + (2,) * 4]
)
def test_features_of_another_shape_are_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"do not fit code_dim=6; pass \(B, code_dim, H, W\), \(B, N, code_dim\) or "):
        make("vq")(torch.zeros(shape))


@every_variant
@pytest.mark.parametrize("shape", [(0, 12), (2, 0), (0, 3, 4), (2, 0, 4), (0, 3, 2, 2)])
def test_an_empty_batch_is_one_sentence(variant: str, shape: tuple[int, ...]) -> None:
    quantizer = make(variant)
    D = quantizer.config.code_dim
    z = torch.zeros(*shape, D) if len(shape) == 2 else torch.zeros(shape[0], D, *shape[1:])
    with pytest.raises(ValueError, match=r"hold no token; pass at least one$"):
        quantizer(z)


# --- Masks ------------------------------------------------------------------------------------------------------------


@every_variant
def test_a_mask_gives_what_its_tokens_alone_would(variant: str) -> None:
    """z_q, indices, losses, gradients and all that a training forward leaves in the quantizer."""
    masked = make(variant)
    alone = copy.deepcopy(masked)
    mask_BHW = torch.rand(2, 3, 4) > 0.4
    for seed in range(3):
        torch.manual_seed(seed)
        z_BDHW = features_for(masked)
        z_1NT = z_BDHW.detach().movedim(1, -1)[mask_BHW][None].clone().requires_grad_()
        padded = z_BDHW.detach().masked_fill(~mask_BHW[:, None], float("nan")).requires_grad_()
        torch.manual_seed(seed)
        expected = alone(z_1NT)
        torch.manual_seed(seed)
        actual = masked(padded, mask=mask_BHW)
        assert torch.equal(actual.indices[mask_BHW], expected.indices[0])
        assert not actual.indices[~mask_BHW].any()
        assert torch.equal(actual.z_q.movedim(1, -1)[mask_BHW], expected.z_q[0])
        assert_codes(masked, actual)
        for name, term in actual.losses.items():
            assert torch.equal(term, expected.losses[name])
        g_BDHW = torch.randn(z_BDHW.shape)
        for quantizer, quantized, g in (
            (masked, actual, g_BDHW),
            (alone, expected, g_BDHW.movedim(1, -1)[mask_BHW][None]),
        ):
            quantizer.zero_grad()
            terms = total_loss(quantizer, quantized._replace(z_q=torch.zeros(())))
            ((quantized.z_q * g).sum() + terms).backward()
        assert torch.equal(padded.grad.movedim(1, -1)[mask_BHW], z_1NT.grad[0])
        assert not padded.grad.movedim(1, -1)[~mask_BHW].any()
        for mine, theirs in zip(masked.parameters(), alone.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
        state = alone.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in masked.state_dict().items())


@every_variant
def test_a_mask_of_all_tokens_changes_nothing(variant: str) -> None:
    quantizer = make(variant).eval()
    z_BDHW = features_for(quantizer)
    with_mask, without = quantizer(z_BDHW, torch.ones(2, 3, 4, dtype=torch.bool)), quantizer(z_BDHW)
    assert torch.equal(with_mask.z_q, without.z_q)
    assert torch.equal(with_mask.indices, without.indices)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3, 4), r"torch.float32 does not fit the tokens; pass bool of shape \(2, 3, 4\)"),
        (torch.ones(2, 12, dtype=torch.bool), r"\(2, 12\) .* pass bool of shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, 4, dtype=torch.bool), "keeps no token; keep at least one"),
    ],
)
def test_masks_that_do_not_fit_are_one_sentence(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("vq")(torch.randn(2, 6, 3, 4), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_in_half_precision(dtype: torch.dtype) -> None:
    quantizer = make("ibq").to(dtype)
    quantized = quantizer(features_for(quantizer).to(dtype), torch.rand(2, 3, 4) > 0.5)
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)


def test_what_is_no_real_tensor_is_one_sentence() -> None:
    quantizer = make("vq")
    with pytest.raises(ValueError, match=r"^indices are a ndarray; pass a tensor, as torch\.as_tensor makes it$"):
        quantizer.indices_to_codes(np.zeros((1, 2, 2), np.uint16))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^indices are a list; pass a tensor"):
        small_tokenizer().decode([[[1]]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^features are a ndarray; pass a tensor of real numbers$"):
        quantizer(np.zeros((1, 6, 2, 2), np.float32))
    with pytest.raises(ValueError, match=r"^features are torch\.complex64; pass a tensor of real numbers$"):
        quantizer(torch.zeros(1, 6, 2, 2, dtype=torch.complex64))
