"""The transformer's blocks: Llama's attention and feed-forward under AdaLN, with the released names (docs/method.md
section 6).

Suffixes: B sequences, S positions, W width, H heads, E = W/H dimension of a head, P = E/2 pairs that are rotated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ibq.models.config import HEAD_DIM, TransformerDials
from ibq.models.transformer.cache import Past

ROPE_BASE = 10000.0
NORM_EPS = 1e-5


class Attention(nn.Module):
    """Causal self-attention whose queries and keys are rotated by position: of a whole sequence, or of the position
    that follows a past."""

    def __init__(self, config: TransformerDials) -> None:
        super().__init__()
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, x_BSW: torch.Tensor, rotation_2SP: torch.Tensor, *, past: Past | None = None) -> torch.Tensor:
        q_BHSE, k_BHSE, v_BHSE = (
            part.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for part in self.wqkv(x_BSW).chunk(3, dim=2)
        )
        q_BHSE, k_BHSE = rotate(q_BHSE, rotation_2SP), rotate(k_BHSE, rotation_2SP)
        if past is None:
            out_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, is_causal=True)
        else:
            out_BHSE = F.scaled_dot_product_attention(q_BHSE, *past.extended(k_BHSE, v_BHSE), attn_mask=past.seen_1S)
        out_BSW: torch.Tensor = self.dropout(self.wo(out_BHSE.transpose(1, 2).flatten(2)))
        return out_BSW


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerDials) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x_BSW: torch.Tensor) -> torch.Tensor:
        out_BSW: torch.Tensor = self.dropout(self.w2(F.silu(self.w1(x_BSW)) * self.w3(x_BSW)))
        return out_BSW


class Modulation(nn.Sequential):
    """AdaLN's SiLU and Linear: a condition (B, W) to `parts` vectors (B, 1, W), for all positions alike."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition_BW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        modulation_B1V: torch.Tensor = super().forward(condition_BW)[:, None]
        return modulation_B1V.chunk(self.parts, dim=2)


class Block(nn.Module):
    """Attention and feed-forward, each scaled and shifted before and scaled by gamma after, around a skip."""

    def __init__(self, config: TransformerDials) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.ffn_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.ada_lin = Modulation(config.width, 6)
        self.checkpointed = False
        """Recompute the activations in the backward pass instead of keeping them."""

    def forward(self, x_BSW: torch.Tensor, condition_BW: torch.Tensor, rotation_2SP: torch.Tensor) -> torch.Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            out_BSW: torch.Tensor = checkpoint(self._forward, x_BSW, condition_BW, rotation_2SP, use_reentrant=False)
            return out_BSW
        return self._forward(x_BSW, condition_BW, rotation_2SP)

    def _forward(self, x_BSW: torch.Tensor, condition_BW: torch.Tensor, rotation_2SP: torch.Tensor) -> torch.Tensor:
        return self.modulated(x_BSW, self.ada_lin(condition_BW), rotation_2SP)

    def modulated(
        self,
        x_BSW: torch.Tensor,
        modulation: Sequence[torch.Tensor],
        rotation_2SP: torch.Tensor,
        *,
        past: Past | None = None,
    ) -> torch.Tensor:
        """The same from what `ada_lin` makes of the condition; with a past, of the position that follows it alone (S =
        1)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        x_BSW = x_BSW + gamma1 * self.attention(
            self.attention_norm(x_BSW) * (1 + scale1) + shift1, rotation_2SP, past=past
        )
        return x_BSW + gamma2 * self.feed_forward(self.ffn_norm(x_BSW) * (1 + scale2) + shift2)


class HeadNorm(nn.Module):
    """The AdaLN before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rmsnorm = nn.RMSNorm(width, eps=NORM_EPS)
        self.ada_lin = Modulation(width, 2)

    def forward(self, x_BSW: torch.Tensor, condition_BW: torch.Tensor) -> torch.Tensor:
        return self.modulated(x_BSW, self.ada_lin(condition_BW))

    def modulated(self, x_BSW: torch.Tensor, modulation: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same from what `ada_lin` makes of the condition."""
        scale, shift = modulation
        out_BSW: torch.Tensor = self.rmsnorm(x_BSW) * (1 + scale) + shift
        return out_BSW


def rotation_table(grid: int, like: torch.Tensor) -> torch.Tensor:
    """Cosine and sine (2, 1 + grid**2, P) of RoPE's angles by position: the first half of the pairs turns with the row,
    the other half with the column. At the class position both are zero, as released, so that its query and key vanish.
    At least float32, on `like`'s device.
    """
    dtype, pairs = torch.promote_types(like.dtype, torch.float32), HEAD_DIM // 4
    frequencies_P = ROPE_BASE ** -(torch.arange(pairs, dtype=dtype, device=like.device) / pairs)
    angles_GP = torch.outer(torch.arange(grid, dtype=dtype, device=like.device), frequencies_P)
    angles_TP = torch.cat([angles_GP.repeat_interleave(grid, 0), angles_GP.repeat(grid, 1)], dim=1)
    return F.pad(torch.stack([angles_TP.cos(), angles_TP.sin()]), (0, 0, 1, 0))


def rotate(x_BHSE: torch.Tensor, rotation_2SP: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs (0, 1), (2, 3), ... of the last dimension turned by the table's angles, computed in the
    table's precision."""
    even_BHSP, odd_BHSP = x_BHSE.to(rotation_2SP.dtype).unflatten(3, (-1, 2)).unbind(4)
    cos_SP, sin_SP = rotation_2SP
    turned_BHSP2 = torch.stack([even_BHSP * cos_SP - odd_BHSP * sin_SP, odd_BHSP * cos_SP + even_BHSP * sin_SP], dim=4)
    return turned_BHSP2.flatten(3).to(x_BHSE.dtype)
