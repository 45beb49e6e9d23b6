"""Files of the released layout (docs/method.md section 8) in small: the names are written out here, not taken from
ibq's modules."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq import load_released
from ibq.errors import DataError

Tensors = dict[str, torch.Tensor]

CODES, CODE_DIM, Z_CHANNELS, CLASSES = 12, 6, 8, 5
BASE, MULTIPLIERS, BLOCKS = 32, (1, 1, 2), 2
DEPTH = 2


class Draw:
    """Collects random tensors by name: convolutions and matrices that keep the scale of what they read, norms around
    1."""

    def __init__(self, seed: int) -> None:
        self.tensors: Tensors = {}
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, mean: float = 0.0, std: float = 1.0) -> None:
        self.tensors[name] = mean + std * torch.randn(shape, generator=self.generator)

    def conv(self, name: str, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        self.normal(f"{name}.weight", outputs, inputs, kernel, kernel, std=(inputs * kernel**2) ** -0.5)
        if bias:
            self.normal(f"{name}.bias", outputs, std=0.3)

    def norm(self, name: str, channels: int) -> None:
        self.normal(f"{name}.weight", channels, mean=1.0, std=0.3)
        self.normal(f"{name}.bias", channels, std=0.3)

    def matrix(self, name: str, inputs: int, outputs: int, bias: bool = False) -> None:
        self.normal(f"{name}.weight", outputs, inputs, std=inputs**-0.5)
        if bias:
            self.normal(f"{name}.bias", outputs, std=0.3)

    def resblock(self, name: str, inputs: int, outputs: int) -> None:
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs, 3)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            self.conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for layer in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{layer}", channels, channels, 1)

    def middle(self, name: str, channels: int) -> None:
        self.resblock(f"{name}.block_1", channels, channels)
        self.attention(f"{name}.attn_1", channels)
        self.resblock(f"{name}.block_2", channels, channels)


def networks(
    seed: int = 0,
    *,
    base: int = BASE,
    multipliers: tuple[int, ...] = MULTIPLIERS,
    blocks: int = BLOCKS,
    attention_levels: tuple[int, ...] = (len(MULTIPLIERS) - 1,),
    codes: int = CODES,
    channels: int = 3,
) -> Tensors:
    """Encoder, decoder, the convolutions around the codebook, and the codebook."""
    draw, widths = Draw(seed), [base * multiplier for multiplier in multipliers]
    draw.conv("encoder.conv_in", channels, base, 3)
    for i, width in enumerate(widths):
        for j in range(blocks):
            draw.resblock(f"encoder.down.{i}.block.{j}", ([base, *widths][i] if j == 0 else width), width)
            if i in attention_levels:
                draw.attention(f"encoder.down.{i}.attn.{j}", width)
        if i < len(widths) - 1:
            draw.conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    draw.middle("encoder.mid", widths[-1])
    draw.norm("encoder.norm_out", widths[-1])
    draw.conv("encoder.conv_out", widths[-1], Z_CHANNELS, 3)
    draw.conv("decoder.conv_in", Z_CHANNELS, widths[-1], 3)
    draw.middle("decoder.mid", widths[-1])
    for i, width in enumerate(widths):
        for j in range(blocks + 1):
            draw.resblock(f"decoder.up.{i}.block.{j}", ([*widths, widths[-1]][i + 1] if j == 0 else width), width)
            if i in attention_levels:
                draw.attention(f"decoder.up.{i}.attn.{j}", width)
        if i > 0:
            draw.conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    draw.norm("decoder.norm_out", widths[0])
    draw.conv("decoder.conv_out", widths[0], channels, 3)
    draw.conv("quant_conv", Z_CHANNELS, CODE_DIM, 1)
    draw.conv("post_quant_conv", CODE_DIM, Z_CHANNELS, 1)
    draw.normal("quantize.embedding.weight", codes, CODE_DIM)
    return draw.tensors


def loss_networks(seed: int = 1) -> Tensors:
    """A PatchGAN of BatchNorm and the beginning of a perceptual loss."""
    draw = Draw(seed)
    draw.conv("loss.discriminator.main.0", 3, 4, 4)
    draw.conv("loss.discriminator.main.2", 4, 8, 4, bias=False)
    draw.norm("loss.discriminator.main.3", 8)
    draw.tensors["loss.discriminator.main.3.running_mean"] = torch.zeros(8)
    draw.tensors["loss.discriminator.main.3.running_var"] = torch.ones(8)
    draw.tensors["loss.discriminator.main.3.num_batches_tracked"] = torch.tensor(7)
    draw.conv("loss.discriminator.main.5", 8, 1, 4)
    draw.normal("loss.perceptual_loss.scaling_layer.shift", 1, 3, 1, 1)
    draw.conv("loss.perceptual_loss.net.slice1.0", 3, 4, 3)
    draw.conv("loss.perceptual_loss.lin0.model.1", 4, 1, 1, bias=False)
    return draw.tensors


def averages(trained: Tensors) -> Tensors:
    """`model_ema.`: of what an optimizer trains, which buffers and the perceptual loss are not; other values than the
    trained ones."""
    frozen = ("running_mean", "running_var", "num_batches_tracked")
    kept = {n: t for n, t in trained.items() if not n.startswith("loss.perceptual_loss.") and not n.endswith(frozen)}
    shadows = {"model_ema." + name.replace(".", ""): 0.9 * tensor + 0.01 for name, tensor in kept.items()}
    return {
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(-1, dtype=torch.int32),
    } | shadows


def tokenizer_state(**sizes: Any) -> Tensors:
    """A tokenizer's state_dict, whole."""
    trained = networks(**sizes) | loss_networks()
    return trained | averages(trained)


def transformer_network(seed: int = 2, *, depth: int = DEPTH, codes: int = CODES, classes: int = CLASSES) -> Tensors:
    draw, width, hidden = Draw(seed), 64 * depth, {1: 256, 2: 512, 3: 512}[depth]
    draw.normal("tok_emb.weight", codes, width)
    draw.normal("class_emb.embedding_table.weight", classes + 1, width)
    for i in range(depth):
        draw.matrix(f"blocks.{i}.attention.wqkv", width, 3 * width)
        draw.matrix(f"blocks.{i}.attention.wo", width, width)
        draw.matrix(f"blocks.{i}.feed_forward.w1", width, hidden)
        draw.matrix(f"blocks.{i}.feed_forward.w3", width, hidden)
        draw.matrix(f"blocks.{i}.feed_forward.w2", hidden, width)
        draw.normal(f"blocks.{i}.attention_norm.weight", width, mean=1.0, std=0.3)
        draw.normal(f"blocks.{i}.ffn_norm.weight", width, mean=1.0, std=0.3)
        draw.matrix(f"blocks.{i}.ada_lin.1", width, 6 * width, bias=True)
    draw.normal("head_nm.rmsnorm.weight", width, mean=1.0, std=0.3)
    draw.matrix("head_nm.ada_lin.1", width, 2 * width, bias=True)
    draw.matrix("head", width, codes)
    return draw.tensors


def transformer_state(*, tokenizer: Tensors | None = None, **sizes: Any) -> Tensors:
    """A transformer's state_dict: the transformer, and its tokenizer, by default as released: networks alone, averages
    in their place."""
    tokenizer = networks() if tokenizer is None else tokenizer
    state = {f"first_stage_model.{name}": tensor for name, tensor in tokenizer.items()}
    return state | {f"transformer.{name}": tensor for name, tensor in transformer_network(**sizes).items()}


def write(path: Path, state: Tensors | dict[str, Any]) -> Path:
    """A Lightning checkpoint around a state_dict."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}}
    groups = [{"lr": 1e-4, "betas": (0.5, 0.9), "params": [0]}]
    extras = {
        "epoch": 329,
        "global_step": 1_651_320,
        "pytorch-lightning_version": "2.2.0",
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 330, "completed": 329}}}},
        "callbacks": {
            "ModelCheckpoint": {"best_model_score": torch.tensor(0.25), "best_k_models": {}, "dirpath": "checkpoints"}
        },
        "optimizer_states": [{"state": moments, "param_groups": groups}] * 2,
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"n_embed": CODES, "embed_dim": CODE_DIM, "ddconfig": {"ch_mult": [1, 1, 2]}},
    }
    torch.save(extras | {"state_dict": OrderedDict(state)}, path)
    return path


def sentence(path: Path, **weights: Any) -> str:
    """Error message of `load_released` for a file, its path as FILE."""
    with pytest.raises(DataError) as caught:
        load_released(path, **weights)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text.replace(str(path), "FILE")
