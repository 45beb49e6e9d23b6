"""Inputs of a quantizer: masks, sequences, video, indices of every integer type; one sentence on what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantizer_variants import K, features_for, make

from ibq import Tokenizer
from ibq.config import TrainConfig

INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64]


@pytest.mark.parametrize("variant", ["vq", "lfq", "fsq"])
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


@pytest.mark.parametrize(
    "shape", [(6,), (4, 6), (2, 6, 12), (2, 5, 3, 4), (2, 3, 4, 6), (2, 4, 6, 3, 4), (1, 6) + (2,) * 4]
)
def test_features_of_another_shape_are_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"do not fit code_dim=6; pass \(B, code_dim, H, W\), \(B, N, code_dim\) or "):
        make("vq")(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 12, 6), (2, 0, 6), (0, 6, 3, 4), (2, 6, 0, 4), (0, 6, 3, 2, 2)])
def test_an_empty_batch_is_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hold no token; pass at least one$"):
        make("vq")(torch.zeros(shape))


# --- Masks ------------------------------------------------------------------------------------------------------------


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
