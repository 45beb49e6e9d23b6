"""VQBridge: the bridge against torch's own encoder layers, what it begins as, what it moves, and life without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from quantizer_variants import assert_refused, train_step
from safetensors.torch import save_file
from torch import nn

from ibq import Tokenizer, VectorQuantizer, VQBridgeConfig, VQBridgeQuantizer, build_quantizer, load_tokenizer
from ibq.config import TrainConfig
from ibq.quantizers.updates import kmeans

K, D = 64, 6
SMALL: dict[str, Any] = {"method": "vqbridge", "codebook_size": K, "code_dim": D, "patch": 8, "width": 16}


def make(**fields: Any) -> VQBridgeQuantizer:
    quantizer = build_quantizer(SMALL | {"codebook_init": "normal"} | fields)
    assert isinstance(quantizer, VQBridgeQuantizer)
    return quantizer


def moved(quantizer: VQBridgeQuantizer) -> VQBridgeQuantizer:
    """With a bridge that is no longer the identity."""
    for parameter in quantizer.bridge.parameters():
        nn.init.normal_(parameter, std=0.3)
    return quantizer


def by_encoder_layers(quantizer: VQBridgeQuantizer, codes_KD: torch.Tensor) -> torch.Tensor:
    """The same with torch's transformer layers, patch by patch."""
    bridge, config = quantizer.bridge, quantizer.config
    tokens = [codes_KD[i : i + config.patch].flatten() for i in range(0, len(codes_KD), config.patch)]
    tokens[-1] = F.pad(tokens[-1], (0, config.patch * D - len(tokens[-1])))
    x = torch.cat([bridge.registers_RW, bridge.down(torch.stack(tokens))])
    for block in bridge.blocks:
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            2 * config.width,
            dropout=0.0,
            activation=lambda y: F.gelu(y, approximate="tanh"),
            layer_norm_eps=1e-6,
            norm_first=True,
        ).double()
        pairs = [(layer.self_attn.out_proj, block.out), (layer.linear1, block.hidden), (layer.linear2, block.back)]
        for theirs, mine in pairs:
            theirs.weight, theirs.bias = mine.weight, mine.bias
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.qkv.weight, block.qkv.bias
        x = layer(x)
    final = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)(x[config.registers :])
    return codes_KD + bridge.up(final).flatten()[: codes_KD.numel()].view_as(codes_KD)


@pytest.mark.parametrize(
    "fields",
    [{}, {"codebook_size": 37}, {"registers": 0, "depth": 1, "heads": 1}, {"patch": 1}, {"patch": 100}],
    ids=str,
)
def test_the_codes_and_all_gradients_are_those_of_torchs_encoder_layers(fields: dict[str, Any]) -> None:
    quantizer = moved(make(**fields)).double()
    actual_KD, expected_KD = quantizer.codebook, by_encoder_layers(quantizer, quantizer.embedding)
    torch.testing.assert_close(actual_KD, expected_KD, rtol=1e-11, atol=1e-11)
    g_KD, parameters = torch.randn_like(actual_KD), list(quantizer.parameters())
    actual, expected = (
        torch.autograd.grad((codes_KD * g_KD).sum(), parameters) for codes_KD in (actual_KD, expected_KD)
    )
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_it_begins_as_the_identity_and_codes_as_their_initialisation_says() -> None:
    quantizer = make()
    assert torch.equal(quantizer.codebook, quantizer.embedding)
    quantizer, features_MD = moved(make(codebook_init="features")), torch.randn(100, D)
    quantizer.initialize_from(features_MD, torch.Generator().manual_seed(0))
    rows = {tuple(row) for row in features_MD.tolist()}
    assert all(tuple(code) in rows for code in quantizer.codebook.tolist())
    moved(quantizer).cluster(features_MD, torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.codebook, kmeans(features_MD, K, torch.Generator().manual_seed(0)))


def test_a_step_moves_codes_that_no_feature_has_selected() -> None:
    for method, moves in (("vqbridge", True), ("vq", False)):
        fields = {"codebook_size": K, "code_dim": D, "codebook_init": "normal"}
        quantizer = build_quantizer((SMALL if moves else {"method": "vq"}) | fields)
        before_KD = quantizer.codebook.detach().clone()
        selected = set(train_step(quantizer, 1).indices.flatten().tolist())
        changed_K = (quantizer.codebook != before_KD).any(1)
        assert len(selected) < K
        assert changed_K.all() if moves else set(changed_K.nonzero().flatten().tolist()) <= selected, method


def test_attention_makes_no_matrix_of_patches_by_patches() -> None:
    """256 patches of one code: the matrix would have 4 heads times 2^16 entries, qkv has 48 times 2^8."""
    quantizer = make(codebook_size=256, patch=1, depth=1)
    with LargestTensor() as largest:
        quantizer.codebook.square().sum().backward()
    assert largest.numbers == 3 * 16 * (256 + 2)


def test_without_its_bridge_it_is_a_vq_of_equal_codes_and_indices() -> None:
    quantizer = make(entropy_weight=0.05, beta=0.5, codebook_init="kmeans").eval()
    quantizer.initialize_from(torch.randn(4 * K, D), torch.Generator().manual_seed(0))
    plain = moved(quantizer).plain()
    assert isinstance(plain, VectorQuantizer)
    assert (plain.config.beta, plain.config.entropy_weight) == (0.5, 0.05)
    assert [name for name, _ in plain.named_parameters()] == ["embedding"]
    assert not plain.training
    assert not plain.awaits_features
    z_BDHW = torch.randn(2, D, 5, 5)
    assert torch.equal(plain.codebook, quantizer.codebook)
    for mine, theirs in zip(plain(z_BDHW)[:2], quantizer(z_BDHW)[:2], strict=True):
        assert torch.equal(mine, theirs)


def test_a_tokenizer_is_saved_without_its_bridge(tiny: Any, tmp_path: Path) -> None:
    trained = Tokenizer(tiny("vqbridge")).eval()
    moved(trained.quantize)
    plain = trained.quantize.plain()
    weights = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("quantize.")}
    weights |= {f"quantize.{name}": tensor for name, tensor in plain.state_dict().items()}
    config = trained.config.to_json_dict() | {"quantizer": plain.config.to_json_dict()}
    Tokenizer(TrainConfig.parse(config)).save(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    loaded, x_BCHW = load_tokenizer(tmp_path), torch.rand(2, 1, 32, 32)
    indices_BHW = trained.encode(x_BCHW)
    assert torch.equal(loaded.encode(x_BCHW), indices_BHW)
    assert torch.equal(loaded.decode(indices_BHW), trained.decode(indices_BHW))


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"width": 16, "heads": 3}, ("heads=3", "width=16", "multiple")),
        ({"codebook_size": 2**18, "patch": 4}, ("patch=4", "65,536 patches", "64 GiB", "set patch to 16 or more")),
        ({"patch": 0}, ("patch", "greater than or equal to 1")),
    ],
)
def test_what_cannot_be_is_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused(SMALL | fields, *mentions)


def test_the_defaults_are_fit_for_the_largest_published_codebook() -> None:
    assert build_quantizer({"method": "vqbridge"}).config.patch == 16
    _ = VQBridgeConfig(codebook_size=2**18, code_dim=256)
