"""Finished transformer runs in small, with random weights: what a trainer leaves in a folder and others read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ibq.config import TransformerTrainConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.run_directory import write_json, write_tensors

MODEL = {"base_channels": 4, "channel_multipliers": (1, 2, 2), "res_blocks": 1, "z_channels": 8, "norm_groups": 4}
"""A tokenizer with f = 4."""


def transformer_config(**dotted: Any) -> TransformerTrainConfig:
    """16 codes on a grid of 4 x 4 tokens, one block, 10 classes; changes by dotted path."""
    quantizer = {"method": "ibq", "codebook_size": 16, "code_dim": 8}
    tree: dict[str, Any] = {
        "tokenizer": {"data": {"resolution": 16}, "model": MODEL, "quantizer": quantizer, "steps": 8, "batch_size": 4},
        "data": {"resolution": 16},
        "model": {"depth": 1},
        "steps": 2,
    }
    return TransformerTrainConfig.parse(tree).with_fields(**dotted)


def write_transformer(folder: Path, *, seed: int = 0, **dotted: Any) -> Path:
    """A finished run; every weight is random, also those that begin at zero, so that no two tokens or classes are
    alike."""
    config = transformer_config(**dotted)
    torch.manual_seed(seed)
    tokenizer, transformer = Tokenizer(config.tokenizer), Transformer(config.transformer_config)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=1.0 if "emb" in name else parameter.shape[1] ** -0.5)
    tokenizer.save(folder / "tokenizer")
    write_json(folder / "config.json", config.to_json_dict())
    write_tensors(folder / "model.safetensors", transformer.state_dict())
    write_json(folder / "row.json", {"status": "ok", "tokenizer_sha256": tokenizer.digest()})
    return folder
