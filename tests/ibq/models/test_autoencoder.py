"""The VQGAN autoencoder: released names, shapes, and the layers that are easy to get subtly wrong."""

from __future__ import annotations

import math

import pytest
import torch

from ibq.config import TrainConfig
from ibq.models.autoencoder import AttentionBlock, Decoder, Downsample, Encoder, ResBlock, Upsample
from ibq.models.config import AutoencoderConfig
from ibq.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def paper_sized() -> dict[str, tuple[int, ...]]:
    """Shapes by parameter name of the tokenizer of the paper, which is never allocated."""
    model = {
        "base_channels": 128,
        "channel_multipliers": (1, 1, 2, 2, 4),
        "res_blocks": 4,
        "attention_resolutions": (16,),
        "z_channels": 256,
        "norm_groups": 32,
    }
    quantizer = {"method": "ibq", "codebook_size": 16384, "code_dim": 256}
    config = TrainConfig.parse({"data": {"name": "photos", "resolution": 256}, "model": model, "quantizer": quantizer})
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Tokenizer(config).named_parameters()}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", (128, 3, 3, 3)),
        ("encoder.down.0.block.0.norm1.weight", (128,)),
        ("encoder.down.0.block.3.conv2.bias", (128,)),
        ("encoder.down.0.downsample.conv.weight", (128, 128, 3, 3)),
        ("encoder.down.2.block.0.nin_shortcut.weight", (256, 128, 1, 1)),
        ("encoder.down.4.block.0.nin_shortcut.weight", (512, 256, 1, 1)),
        ("encoder.down.4.attn.0.norm.weight", (512,)),
        ("encoder.down.4.attn.0.q.weight", (512, 512, 1, 1)),
        ("encoder.down.4.attn.3.k.weight", (512, 512, 1, 1)),
        ("encoder.mid.block_1.conv1.weight", (512, 512, 3, 3)),
        ("encoder.mid.attn_1.v.weight", (512, 512, 1, 1)),
        ("encoder.mid.attn_1.proj_out.weight", (512, 512, 1, 1)),
        ("encoder.mid.block_2.norm2.bias", (512,)),
        ("encoder.norm_out.weight", (512,)),
        ("encoder.conv_out.weight", (256, 512, 3, 3)),
        ("decoder.conv_in.weight", (512, 256, 3, 3)),
        ("decoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("decoder.up.4.block.4.conv1.weight", (512, 512, 3, 3)),
        ("decoder.up.4.attn.4.proj_out.weight", (512, 512, 1, 1)),
        ("decoder.up.4.upsample.conv.weight", (512, 512, 3, 3)),
        ("decoder.up.3.block.0.nin_shortcut.weight", (256, 512, 1, 1)),
        ("decoder.up.1.upsample.conv.weight", (128, 128, 3, 3)),
        ("decoder.up.0.block.4.conv2.weight", (128, 128, 3, 3)),
        ("decoder.norm_out.weight", (128,)),
        ("decoder.conv_out.weight", (3, 128, 3, 3)),
        ("quant_conv.weight", (256, 256, 1, 1)),
        ("post_quant_conv.weight", (256, 256, 1, 1)),
    ],
)
def test_parameters_bear_the_released_names(
    paper_sized: dict[str, tuple[int, ...]], name: str, shape: tuple[int, ...]
) -> None:
    assert paper_sized[name] == shape


@pytest.mark.parametrize(
    "absent",
    [
        "encoder.down.4.downsample.",
        "decoder.up.0.upsample.",
        "encoder.down.4.block.4.",
        "decoder.up.0.block.5.",
        "encoder.down.0.attn.",
        "encoder.down.0.block.0.nin_shortcut.",
        "encoder.down.2.block.1.nin_shortcut.",
    ],
)
def test_parameters_that_the_release_lacks_are_absent(paper_sized: dict[str, tuple[int, ...]], absent: str) -> None:
    assert not [name for name in paper_sized if name.startswith(absent)]


@pytest.mark.parametrize("resolution", [16, 32, 48])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_through_encoder_and_decoder(resolution: int, multipliers: tuple[int, ...], channels: int) -> None:
    config = AutoencoderConfig(
        base_channels=4, channel_multipliers=multipliers, z_channels=6, norm_groups=2, attention_resolutions=(16,)
    )
    images_BCHW = torch.randn(2, channels, resolution, resolution)
    z_BCHW = Encoder(config, channels, resolution)(images_BCHW)
    side = resolution // config.downsampling
    assert z_BCHW.shape == (2, 6, side, side)
    assert Decoder(config, channels, resolution)(z_BCHW).shape == images_BCHW.shape


def test_the_decoder_mirrors_the_encoder() -> None:
    config = AutoencoderConfig(
        base_channels=4, channel_multipliers=(1, 2, 3), res_blocks=2, norm_groups=4, attention_resolutions=(8,)
    )
    encoder, decoder = Encoder(config, 1, 32), Decoder(config, 1, 32)
    for i, (down, up) in enumerate(zip(encoder.down, decoder.up, strict=True)):
        assert len(up.block) == len(down.block) + 1
        assert up.block[-1].conv2.out_channels == down.block[-1].conv2.out_channels == 4 * (i + 1)
        assert bool(len(up.attn)) == bool(len(down.attn)) == (i == 2)
        assert (down.downsample is not None) == (i < 2)
        assert (up.upsample is not None) == (i > 0)


def test_attention_is_softmax_of_scaled_products_times_values() -> None:
    block, x_BCHW = AttentionBlock(8, 4).double(), torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h_BCHW = torch.nn.functional.group_norm(x_BCHW, 4, block.norm.weight, block.norm.bias, eps=1e-6)
    q, k, v = (
        torch.einsum("oc,bcl->bol", layer.weight[:, :, 0, 0], h_BCHW.flatten(2)) + layer.bias[None, :, None]
        for layer in (block.q, block.k, block.v)
    )
    weights_BLM = torch.softmax(torch.einsum("bcl,bcm->blm", q, k) / math.sqrt(8), dim=2)
    out_BCL = torch.einsum("blm,bcm->bcl", weights_BLM, v)
    expected = x_BCHW + block.proj_out(out_BCL.reshape(x_BCHW.shape))
    torch.testing.assert_close(block(x_BCHW), expected, rtol=1e-12, atol=1e-12)


def test_downsampling_pads_right_and_bottom_only() -> None:
    layer = Downsample(1).double()
    with torch.no_grad():
        layer.conv.weight.fill_(1.0)
        layer.conv.bias.zero_()
    x_BCHW = torch.arange(16, dtype=torch.float64).reshape(1, 1, 4, 4)
    padded_HW = torch.zeros(5, 5, dtype=torch.float64)
    padded_HW[:4, :4] = x_BCHW[0, 0]
    expected_HW = torch.stack([torch.stack([padded_HW[i : i + 3, j : j + 3].sum() for j in (0, 2)]) for i in (0, 2)])
    assert torch.equal(layer(x_BCHW)[0, 0], expected_HW)


def test_upsampling_doubles_by_the_nearest_pixel() -> None:
    layer = Upsample(1).double()
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 1, 1] = 1.0
        layer.conv.bias.zero_()
    x_BCHW = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    assert torch.equal(layer(x_BCHW), x_BCHW.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (4, 8)])
def test_a_resblock_with_a_silent_last_convolution_is_its_skip(inputs: int, outputs: int) -> None:
    block, x_BCHW = ResBlock(inputs, outputs, 2), torch.randn(2, inputs, 5, 5)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    skip = (
        x_BCHW
        if inputs == outputs
        else torch.nn.functional.conv2d(x_BCHW, block.nin_shortcut.weight, block.nin_shortcut.bias)
    )
    torch.testing.assert_close(block(x_BCHW), skip)


def test_every_parameter_of_the_autoencoder_receives_a_gradient() -> None:
    config = AutoencoderConfig(base_channels=4, channel_multipliers=(1, 2), norm_groups=2, attention_resolutions=(16,))
    encoder, decoder = Encoder(config, 1, 32), Decoder(config, 1, 32)
    decoder(encoder(torch.randn(2, 1, 32, 32))).square().mean().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        if not name.endswith("k.bias"):  # adds one constant per query to its logits, which softmax ignores
            assert parameter.grad.abs().max() > 0, name
