"""Evaluation of a tokenizer that was cast: close to that of float32, and its protocol says what it was cast to."""

from __future__ import annotations

import pytest
import torch

from ibq import Tokenizer
from ibq.config import DataConfig, TrainConfig
from ibq.data import load_images
from ibq.evaluation.tokenizer import evaluate
from ibq.metrics.distances import to_uint8
from ibq.metrics.quality import ImageQuality


def test_the_protocol_names_the_precision_of_the_weights() -> None:
    """Images of the split are float32; it said fp32 of whatever came out of them."""
    torch.manual_seed(0)
    model = {"base_channels": 8, "norm_groups": 4, "z_channels": 8, "res_blocks": 1}
    config = TrainConfig.parse({"model": model, "quantizer": {"method": "vq", "codebook_size": 32, "code_dim": 4}})
    tokenizer, images = Tokenizer(config), load_images(DataConfig(), "test")
    found = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        metrics, protocol, _ = evaluate(tokenizer.to(dtype), images, 16, 8, "raw")
        assert protocol["precision"] == name
        found[name] = metrics
    for name in ("bf16", "fp16"):
        assert found[name]["l1"] == pytest.approx(found["fp32"]["l1"], rel=0.01)
        assert found[name]["ssim"] == pytest.approx(found["fp32"]["ssim"], abs=0.01)


def test_images_of_another_type_than_the_weights_are_taken_and_bytes_are_refused() -> None:
    model = {"base_channels": 8, "norm_groups": 4, "z_channels": 8, "res_blocks": 1}
    config = TrainConfig.parse({"model": model, "quantizer": {"method": "vq", "codebook_size": 32, "code_dim": 4}})
    tokenizer = Tokenizer(config).bfloat16()
    assert tokenizer(torch.rand(1, 1, 32, 32)).images.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"images of dtype torch.uint8 are not floating; pass floats in \[-1, 1\]"):
        tokenizer.encode(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_are_measured_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_BCHW = (2 * torch.rand(2, 3, 32, 32) - 1).to(dtype)
    y_BCHW = (2 * torch.rand(2, 3, 32, 32) - 1).to(dtype)
    assert torch.equal(to_uint8(x_BCHW), to_uint8(x_BCHW.float()))
    found = []
    for cast in (dtype, torch.float32):
        quality = ImageQuality()
        quality.update(x_BCHW.to(cast), y_BCHW.to(cast))
        found.append(quality.compute())
    assert found[0] == found[1]
