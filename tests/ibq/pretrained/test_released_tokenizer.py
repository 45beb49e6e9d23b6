"""Imported tokenizers compute docs/method.md section 5: every module type against its formula, in float64, written in
sums and products of tensors that come from the file by their released names. No layer of torch.nn and none of its
functions takes part in the formulas.
"""

from __future__ import annotations

import pytest
import released_layout
import torch
from released_layout import BLOCKS, MULTIPLIERS, Tensors

from ibq import Tokenizer, load_released

LEVELS = len(MULTIPLIERS)


@pytest.fixture(scope="module")
def state() -> Tensors:
    return released_layout.tokenizer_state()


@pytest.fixture(scope="module")
def tokenizer(state: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Imported as trained, in float64."""
    loaded = load_released(
        released_layout.write(tmp_path_factory.mktemp("released") / "tokenizer.ckpt", state), weights="raw"
    )
    assert isinstance(loaded, Tokenizer)
    return loaded.double().requires_grad_(False)


@pytest.fixture
def w(state: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in state.items() if not name.startswith(("loss.", "model_ema."))}


def features(channels: int, side: int = 6) -> torch.Tensor:
    return torch.randn(2, channels, side, side + 2, dtype=torch.float64)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- The formulas -----------------------------------------------------------------------------------------------------


def convolution(
    w: Tensors, name: str, x_BCHW: torch.Tensor, *, stride: int = 1, before: int = 0, after: int = 0
) -> torch.Tensor:
    """The sum over the kernel's offsets of a matrix times the shifted image, which stands in zeros: `before` rows and
    columns, then it."""
    kernel_OCYX, (B, C, H, W) = w[f"{name}.weight"], x_BCHW.shape
    Y, X = kernel_OCYX.shape[2:]
    framed = torch.zeros(B, C, before + H + after, before + W + after, dtype=x_BCHW.dtype)
    framed[:, :, before : before + H, before : before + W] = x_BCHW
    rows, columns = (framed.shape[2] - Y) // stride + 1, (framed.shape[3] - X) // stride + 1
    out = w[f"{name}.bias"][None, :, None, None].expand(B, -1, rows, columns).clone()
    for y in range(Y):
        for x in range(X):
            shifted = framed[
                :, :, y : y + stride * (rows - 1) + 1 : stride, x : x + stride * (columns - 1) + 1 : stride
            ]
            out += torch.einsum("oc,bchw->bohw", kernel_OCYX[:, :, y, x], shifted)
    return out


def conv3(w: Tensors, name: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    return convolution(w, name, x_BCHW, before=1, after=1)


def group_norm(w: Tensors, name: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    """32 groups of neighbouring channels, each to mean 0 and variance 1 over its channels and positions; eps 1e-6."""
    x_BGM = x_BCHW.reshape(x_BCHW.shape[0], 32, -1)
    centred = x_BGM - x_BGM.mean(2, keepdim=True)
    normed = centred / ((centred**2).mean(2, keepdim=True) + 1e-6) ** 0.5
    return normed.reshape(x_BCHW.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def resblock(w: Tensors, name: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    h_BCHW = conv3(w, f"{name}.conv1", silu(group_norm(w, f"{name}.norm1", x_BCHW)))
    h_BCHW = conv3(w, f"{name}.conv2", silu(group_norm(w, f"{name}.norm2", h_BCHW)))
    shortcut = f"{name}.nin_shortcut"
    return h_BCHW + (convolution(w, shortcut, x_BCHW) if f"{shortcut}.weight" in w else x_BCHW)


def attention(w: Tensors, name: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt C) v over positions, projected, beside the skip."""
    h_BCHW = group_norm(w, f"{name}.norm", x_BCHW)
    q_BCL, k_BCL, v_BCL = (
        convolution(w, f"{name}.{layer}", h_BCHW).reshape(*x_BCHW.shape[:2], -1) for layer in ("q", "k", "v")
    )
    weights_BLM = (torch.einsum("bcl,bcm->blm", q_BCL, k_BCL) / x_BCHW.shape[1] ** 0.5).exp()
    weights_BLM = weights_BLM / weights_BLM.sum(2, keepdim=True)
    return x_BCHW + convolution(
        w, f"{name}.proj_out", torch.einsum("blm,bcm->bcl", weights_BLM, v_BCL).reshape(x_BCHW.shape)
    )


def down(w: Tensors, name: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    return convolution(w, name, x_BCHW, stride=2, after=1)


def up(w: Tensors, name: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    rows, columns = (torch.arange(2 * side) // 2 for side in x_BCHW.shape[2:])
    return conv3(w, name, x_BCHW[:, :, rows][:, :, :, columns])


def middle(w: Tensors, name: str, h_BCHW: torch.Tensor) -> torch.Tensor:
    return resblock(w, f"{name}.block_2", attention(w, f"{name}.attn_1", resblock(w, f"{name}.block_1", h_BCHW)))


def encoder(w: Tensors, x_BCHW: torch.Tensor) -> torch.Tensor:
    h_BCHW = conv3(w, "encoder.conv_in", x_BCHW)
    for i in range(LEVELS):
        for j in range(BLOCKS):
            h_BCHW = resblock(w, f"encoder.down.{i}.block.{j}", h_BCHW)
            if i == LEVELS - 1:
                h_BCHW = attention(w, f"encoder.down.{i}.attn.{j}", h_BCHW)
        if i < LEVELS - 1:
            h_BCHW = down(w, f"encoder.down.{i}.downsample.conv", h_BCHW)
    h_BCHW = middle(w, "encoder.mid", h_BCHW)
    return conv3(w, "encoder.conv_out", silu(group_norm(w, "encoder.norm_out", h_BCHW)))


def decoder(w: Tensors, z_BCHW: torch.Tensor) -> torch.Tensor:
    h_BCHW = middle(w, "decoder.mid", conv3(w, "decoder.conv_in", z_BCHW))
    for i in reversed(range(LEVELS)):
        for j in range(BLOCKS + 1):
            h_BCHW = resblock(w, f"decoder.up.{i}.block.{j}", h_BCHW)
            if i == LEVELS - 1:
                h_BCHW = attention(w, f"decoder.up.{i}.attn.{j}", h_BCHW)
        if i > 0:
            h_BCHW = up(w, f"decoder.up.{i}.upsample.conv", h_BCHW)
    return conv3(w, "decoder.conv_out", silu(group_norm(w, "decoder.norm_out", h_BCHW)))


def nearest_code(w: Tensors, z_BDHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k = argmax_k z c_k, and c_k."""
    codebook_KD = w["quantize.embedding.weight"]
    indices_BHW = torch.einsum("bdhw,kd->bkhw", z_BDHW, codebook_KD).max(1).indices
    return indices_BHW, codebook_KD[indices_BHW].permute(0, 3, 1, 2)


# --- Modules against formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("encoder.down.0.block.0", 32),
        ("encoder.down.2.block.0", 32),  # with nin_shortcut
        ("encoder.mid.block_1", 64),
        ("decoder.up.1.block.0", 64),  # with nin_shortcut
        ("decoder.up.2.block.2", 64),
    ],
)
def test_resblock(tokenizer: Tokenizer, w: Tensors, name: str, channels: int) -> None:
    x_BCHW = features(channels)
    assert_same(tokenizer.get_submodule(name)(x_BCHW), resblock(w, name, x_BCHW))


@pytest.mark.parametrize(
    "name", ["encoder.down.2.attn.1", "encoder.mid.attn_1", "decoder.mid.attn_1", "decoder.up.2.attn.2"]
)
def test_attention_block(tokenizer: Tokenizer, w: Tensors, name: str) -> None:
    x_BCHW = features(64)
    assert_same(tokenizer.get_submodule(name)(x_BCHW), attention(w, name, x_BCHW))


def test_group_norm(tokenizer: Tokenizer, w: Tensors) -> None:
    x_BCHW = features(64) * 1e-3  # so small that eps counts
    assert_same(tokenizer.encoder.norm_out(x_BCHW), group_norm(w, "encoder.norm_out", x_BCHW))


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("level", [0, 1])
def test_downsample(tokenizer: Tokenizer, w: Tensors, level: int, side: int) -> None:
    x_BCHW, name = features(32, side), f"encoder.down.{level}.downsample"
    assert_same(tokenizer.get_submodule(name)(x_BCHW), down(w, f"{name}.conv", x_BCHW))


@pytest.mark.parametrize(("level", "channels"), [(1, 32), (2, 64)])
def test_upsample(tokenizer: Tokenizer, w: Tensors, level: int, channels: int) -> None:
    x_BCHW, name = features(channels), f"decoder.up.{level}.upsample"
    assert_same(tokenizer.get_submodule(name)(x_BCHW), up(w, f"{name}.conv", x_BCHW))


@pytest.mark.parametrize("name", ["encoder.mid", "decoder.mid"])
def test_middle(tokenizer: Tokenizer, w: Tensors, name: str) -> None:
    h_BCHW = features(64)
    assert_same(tokenizer.get_submodule(name)(h_BCHW), middle(w, name, h_BCHW))


def test_encoder_whole(tokenizer: Tokenizer, w: Tensors) -> None:
    images_BCHW = torch.rand(2, 3, 16, 24, dtype=torch.float64).mul(2).sub(1)
    z_BCHW = encoder(w, images_BCHW)
    assert z_BCHW.shape == (2, 8, 4, 6)
    assert_same(tokenizer.encoder(images_BCHW), z_BCHW)
    assert_same(tokenizer.features(images_BCHW), convolution(w, "quant_conv", z_BCHW))


def test_decoder_whole(tokenizer: Tokenizer, w: Tensors) -> None:
    z_BCHW = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    assert_same(tokenizer.decoder(z_BCHW), decoder(w, z_BCHW))


def test_quantizer(tokenizer: Tokenizer, w: Tensors) -> None:
    z_BDHW = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    indices_BHW, codes_BDHW = nearest_code(w, z_BDHW)
    quantized = tokenizer.quantize(z_BDHW)
    assert len(indices_BHW.unique()) > 3
    assert torch.equal(quantized.indices, indices_BHW)
    assert torch.equal(quantized.z_q, codes_BDHW)
    assert torch.equal(tokenizer.quantize.indices_to_codes(indices_BHW), codes_BDHW)


def test_tokenizer_whole(tokenizer: Tokenizer, w: Tensors) -> None:
    images_BCHW = torch.rand(2, 3, 16, 24, dtype=torch.float64).mul(2).sub(1)
    z_BDHW = convolution(w, "quant_conv", encoder(w, images_BCHW))
    indices_BHW, codes_BDHW = nearest_code(w, z_BDHW)
    expected_BCHW = decoder(w, convolution(w, "post_quant_conv", codes_BDHW))
    reconstruction = tokenizer(images_BCHW)
    assert len(indices_BHW.unique()) > 1
    assert torch.equal(reconstruction.quantized.indices, indices_BHW)
    assert_same(reconstruction.images, expected_BCHW)
    assert_same(tokenizer.decode(indices_BHW), expected_BCHW)
