"""The VQGAN encoder and decoder (arXiv 2012.09841), sized by config, with the parameter names of the released IBQ
checkpoints.

Suffixes: B images, C channels, H W pixels of the level, L = H*W positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ibq.models.config import AutoencoderConfig


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around a skip."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return h_BCHW + (self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW)


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, around a skip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.norm(x_BCHW)
        q_BLC, k_BLC, v_BLC = (layer(h_BCHW).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if torch.compiler.is_exporting():  # ONNX knows attention with a dimension of heads alone
            out_BLC = F.scaled_dot_product_attention(q_BLC[:, None], k_BLC[:, None], v_BLC[:, None])[:, 0]
        else:
            out_BLC = F.scaled_dot_product_attention(q_BLC, k_BLC, v_BLC)
        return x_BCHW + self.proj_out(out_BLC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and at the bottom only, as released."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The ResBlocks of one resolution, each followed by attention where the config wants it, then at most one change of
    resolution."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        attention: bool,
        groups: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs, groups) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(outputs) if downsample else None
        self.upsample = Upsample(outputs) if upsample else None
        self.checkpointed = False
        """Recompute each block's activations in the backward pass instead of keeping them."""

    def forward(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        for i in range(len(self.block)):
            if self.checkpointed and torch.is_grad_enabled():
                h_BCHW = checkpoint(self._block, h_BCHW, i, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BCHW = self._block(h_BCHW, i)
        for resample in (self.downsample, self.upsample):
            h_BCHW = h_BCHW if resample is None else resample(h_BCHW)
        return h_BCHW

    def _block(self, h_BCHW: torch.Tensor, i: int) -> torch.Tensor:
        h_BCHW = self.block[i](h_BCHW)
        return self.attn[i](h_BCHW) if len(self.attn) else h_BCHW


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        out_BCHW: torch.Tensor = self.block_2(self.attn_1(self.block_1(h_BCHW)))
        return out_BCHW


class Encoder(nn.Module):
    """Images (B, C, H, W) to features (B, z_channels, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig, channels: int, resolution: int) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        inputs = config.base_channels
        for i, width in enumerate(widths):
            attention, last = resolution >> i in config.attention_resolutions, i == len(widths) - 1
            self.down.append(
                Level(inputs, width, config.res_blocks, attention, config.norm_groups, downsample=not last)
            )
            inputs = width
        self.mid = Middle(inputs, config.norm_groups)
        self.norm_out = _norm(inputs, config.norm_groups)
        self.conv_out = nn.Conv2d(inputs, config.z_channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            h_BCHW = level(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(h_BCHW))))


class Decoder(nn.Module):
    """Features (B, z_channels, H/f, W/f) to images (B, C, H, W); one ResBlock a level more than the encoder."""

    def __init__(self, config: AutoencoderConfig, channels: int, resolution: int) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        inputs = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, inputs, 3, padding=1)
        self.mid = Middle(inputs, config.norm_groups)
        levels: list[Level] = []
        for i in reversed(range(len(widths))):
            attention = resolution >> i in config.attention_resolutions
            levels.insert(
                0, Level(inputs, widths[i], config.res_blocks + 1, attention, config.norm_groups, upsample=i > 0)
            )
            inputs = widths[i]
        self.up = nn.ModuleList(levels)  # `up.{i}` is the level of resolution / 2**i, as released
        self.norm_out = _norm(inputs, config.norm_groups)
        self.conv_out = nn.Conv2d(inputs, channels, 3, padding=1)

    def forward(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h_BCHW = level(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))
