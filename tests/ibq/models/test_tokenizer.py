"""The tokenizer: the same image from indices as from the forward pass, and weights that come back or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq import Tokenizer, load_tokenizer
from ibq.errors import ConfigError

METHODS = ["vq", "ibq"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_decoding_from_indices_gives_the_image_of_the_forward_pass(
    tiny: Any, method: str, batch: int, layout: torch.memory_format
) -> None:
    tokenizer = Tokenizer(tiny(method)).eval().to(memory_format=layout)
    images = torch.rand(batch, 1, 32, 32).mul(2).sub(1).to(memory_format=layout)
    with torch.no_grad():
        reconstruction = tokenizer(images)
        indices = tokenizer.encode(images)
        assert torch.equal(indices, reconstruction.quantized.indices)
        assert torch.equal(tokenizer.decode(indices), reconstruction.images)
        assert torch.equal(tokenizer.features(images), reconstruction.features)
    assert reconstruction.images.shape == images.shape
    assert indices.shape == (batch, 8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_other_sizes_than_the_configured_one_work_where_the_factor_divides(tiny: Any, method: str) -> None:
    tokenizer = Tokenizer(tiny(method)).eval()
    images = torch.rand(2, 1, 24, 40)
    assert tokenizer.encode(images).shape == (2, 6, 10)
    assert tokenizer(images).images.shape == images.shape


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 30, 32), (2, 1, 32, 31), (1, 32, 32), (32, 32)])
@pytest.mark.parametrize("function", ["encode", "forward", "features"])
def test_images_that_do_not_fit_are_refused_with_their_shape(tiny: Any, shape: tuple[int, ...], function: str) -> None:
    with pytest.raises(ValueError, match=r"do not fit; pass \(B, 1, H, W\) with H and W multiples of 4") as caught:
        getattr(Tokenizer(tiny()), function)(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_the_quantizer_does_not_change_the_networks_initial_weights(tiny: Any) -> None:
    weights = []
    for config in (
        tiny("vq"),
        tiny("ibq"),
        tiny("ibq", **{"quantizer.codebook_size": 64, "quantizer.codebook_init": "features"}),
    ):
        torch.manual_seed(7)
        weights.append(
            {name: p for name, p in Tokenizer(config).named_parameters() if not name.startswith("quantize.")}
        )
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weights[0][name]) for name in other)


@pytest.mark.parametrize("method", METHODS)
def test_the_decoders_loss_trains_the_encoder(tiny: Any, method: str) -> None:
    tokenizer = Tokenizer(tiny(method))
    tokenizer(torch.rand(2, 1, 32, 32)).images.square().mean().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    codebook_gradient = tokenizer.quantize.embedding.grad
    assert (codebook_gradient is None) == (method == "vq")


# --- Saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "fields"),
    [("vq", {}), ("ibq", {}), ("vq", {"quantizer.codebook_init": "features"}), ("ibq", {"data.name": "photos"})],
)
def test_save_and_load_round_trip(tiny: Any, tmp_path: Path, method: str, fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer(tiny(method, **fields)).to(memory_format=torch.channels_last)
    if tokenizer.quantize.awaits_features:
        tokenizer.quantize.initialize_from(torch.randn(20, 8), torch.Generator())
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(str(tmp_path / "new" / "folder"))
    assert loaded.config == tokenizer.config
    assert not loaded.training
    assert loaded.state_dict().keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tokenizer.state_dict().items())


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    Tokenizer(tiny()).save(tmp_path)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert f"{saved} holds no {name}; pass a folder" in refusal(saved)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "absent holds no config.json" in refusal(tmp_path / "absent")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_refused(saved: Path, kept: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert str(weights) in refusal(saved)


@pytest.mark.parametrize(
    ("path", "value", "mentions"),
    [
        ("quantizer.codebook_size", 32, "quantize.embedding"),
        ("model.res_blocks", 2, "encoder.down.0.block.1"),
        (
            "model.channel_multipliers",
            (1, 2),
            "decoder.up.2.block.0.conv1.bias' has the shape (8,) there and is absent",
        ),
    ],
)
def test_weights_of_another_config_are_refused(tiny: Any, saved: Path, path: str, value: Any, mentions: str) -> None:
    (saved / "config.json").write_text(json.dumps(tiny(**{path: value}).to_json_dict()))
    assert mentions in refusal(saved)


@pytest.mark.parametrize(
    "text", ["", '{"quantizer": {"meth', "[]", "null", '{"quantizer": {"method": "vqq"}}', '{"steps": 3}']
)
def test_a_config_that_is_not_valid_is_refused(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    refusal(saved)
