"""VQBridge (FVQ, arXiv 2509.10140): the codes are B(C), a small ViT over patches of a learnt embedding C, so that every
step moves every code.

B cuts C into patches of consecutive codes, maps each to one token, lets transformer blocks attend over all patches and
a few registers, and maps back (the paper's compress, process, recover). What it changes against VQ: a gradient of any
selected code moves B, and with it every code. After training B is dropped: `plain` gives the VQ with the codes B(C).

The paper's second half is a learning rate that falls to 0, which is a matter of the recipe: optim.schedule="cosine",
whose final_factor is 0.

Two differences from the authors' code: B here is C + F(C), with the last layer of F at zero, so that it begins as the
identity and codes begin as `codebook_init` says; theirs is F alone, and all codes begin at the origin. And registers,
which their code has not and vector-quantize-pytorch found necessary (2 of them); 0 leaves them out.
Suffixes: K codes, D code dimension, T patches, R registers, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from ibq.ops.precision import at_least_float32
from ibq.quantizers.base import CodebookQuantizer, Quantizer, quantization_terms, straight_through
from ibq.quantizers.config import CodebookConfig, CodebookInit
from ibq.quantizers.vq import VectorQuantizer, VQConfig, linear, nearest_with_entropies

MLP_RATIO = 2
NORM_EPS = 1e-6
MOST_PATCHES = 2**14
"""That attend to each other: the work grows with their square, the memory only where no fused attention is."""


class VQBridgeConfig(CodebookConfig):
    """Terms and entropy penalty as in `VQConfig`. The bridge's defaults are those of the authors' QBridge-L/4, for
    16,384 codes; their QBridge-L/8, for 262,144, has patches of 64."""

    method: Literal["vqbridge"] = "vqbridge"
    patch: int = Field(16, strict=True, ge=1, description="codes a patch; the last is filled up with zeros")
    width: int = Field(256, strict=True, ge=1, description="of the bridge's tokens")
    depth: int = Field(2, strict=True, ge=1, description="transformer blocks")
    heads: int = Field(4, strict=True, ge=1)
    registers: int = Field(2, strict=True, ge=0, description="learnt tokens beside the patches")

    @model_validator(mode="after")
    def _patches_fit(self) -> VQBridgeConfig:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} do not divide width={self.width}; set width to a multiple of heads")
        if (patches := -(-self.codebook_size // self.patch)) > MOST_PATCHES:
            gib = 4 * self.heads * patches**2 / 2**30
            raise ValueError(
                f"patch={self.patch} cuts codebook_size={self.codebook_size} into {patches:,} patches, whose attention "
                f"is {gib:,.0f} GiB a block where no fused kernel spares it; set patch to "
                f"{-(-self.codebook_size // MOST_PATCHES)} or more"
            )
        return self

    @property
    def places_codes(self) -> bool:
        return False


class VQBridgeQuantizer(CodebookQuantizer, config=VQBridgeConfig):
    """Nearest code of B(C) by Euclidean distance.

    Gradient reach: z through the straight-through copy and `commitment`; B, and so all codes, through `codebook`; z, B
    and C through the two entropy terms. B(C) is computed anew wherever codes are asked for, in evaluation too, from the
    same weights by the same operations: its bits are those that trained.
    """

    config: VQBridgeConfig
    paper = "FVQ, arXiv 2509.10140"

    def __init__(self, config: VQBridgeConfig) -> None:
        super().__init__(config)
        self.bridge = Bridge(config)

    @property
    def codebook(self) -> torch.Tensor:
        codes_KD: torch.Tensor = self.bridge(at_least_float32(self.embedding))
        return codes_KD

    @torch.no_grad()
    def place_codes(self, features_MD: torch.Tensor, generator: torch.Generator, init: CodebookInit) -> None:
        """As `CodebookQuantizer.place_codes`; the bridge becomes the identity again, so that the codes are what they
        were set to."""
        super().place_codes(features_MD, generator, init)  # which may refuse them
        self.bridge.become_identity()

    def restart_codes(
        self, dead_K: torch.Tensor, features_MD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        return Quantizer.restart_codes(self, dead_K, features_MD, generator)

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        codebook_KD = self.codebook
        indices_N, entropies = nearest_with_entropies(
            z_ND, codebook_KD, self.config.active_entropy_temperature, self.training_group
        )
        codes_ND = codebook_KD[indices_N]
        return straight_through(z_ND, codes_ND), indices_N, quantization_terms(z_ND, codes_ND) | entropies

    @torch.no_grad()
    def plain(self) -> VectorQuantizer:
        """The VQ whose embedding is B(C), without the bridge: equal codes and indices, bit for bit.

        A tokenizer goes without its bridge once its config has `plain().config` as quantizer, and its weights
        `quantize.*` are those of `plain()`.
        """
        shared = set(CodebookConfig.model_fields) - {"method"}
        fields = {name: value for name, value in self.config.model_dump().items() if name in shared}
        quantizer = VectorQuantizer(VQConfig.model_validate(fields)).to(self.embedding.device)
        quantizer.embedding = nn.Parameter(self.codebook.clone())
        quantizer.initialized.copy_(self.initialized)
        return quantizer.train(self.training)


class Bridge(nn.Module):
    """ViT over patches of codes, (K, D) to (K, D): C + up(blocks(down(C))). It computes in the type of C, whatever it
    was cast to."""

    def __init__(self, config: VQBridgeConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.down = nn.Linear(config.patch * config.code_dim, config.width)
        self.registers_RW = nn.Parameter(0.02 * torch.randn(config.registers, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.up = nn.Linear(config.width, config.patch * config.code_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.become_identity()

    @torch.no_grad()
    def become_identity(self) -> None:
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, codes_KD: torch.Tensor) -> torch.Tensor:
        K, D = codes_KD.shape
        patches_TW = linear(self.down, F.pad(codes_KD, (0, 0, 0, -K % self.patch)).view(-1, self.patch * D))
        tokens_LW = torch.cat([self.registers_RW.to(patches_TW.dtype), patches_TW])
        for block in self.blocks:
            tokens_LW = block(tokens_LW)
        moved_TP = linear(self.up, norm(tokens_LW[len(self.registers_RW) :]))
        return codes_KD + moved_TP.reshape(-1, D)[:K]


class Block(nn.Module):
    """Pre-norm transformer block without learnt scales in its norms, attention over all L tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.back = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)

    def forward(self, tokens_LW: torch.Tensor) -> torch.Tensor:
        L, W = tokens_LW.shape
        qkv_3hLE = linear(self.qkv, norm(tokens_LW)).view(1, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        q_1hLE, k_1hLE, v_1hLE = qkv_3hLE
        mixed_1hLE = F.scaled_dot_product_attention(q_1hLE, k_1hLE, v_1hLE)  # four dimensions: the fused kernels' shape
        tokens_LW = tokens_LW + linear(self.out, mixed_1hLE.transpose(1, 2).reshape(L, W))
        return tokens_LW + linear(self.back, F.gelu(linear(self.hidden, norm(tokens_LW)), approximate="tanh"))


def norm(tokens_LW: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(tokens_LW, tokens_LW.shape[-1:], eps=NORM_EPS)
