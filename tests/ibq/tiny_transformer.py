"""An untrained transformer whose predictions depend on class and tokens, for tests that sample and measure."""

from __future__ import annotations

import torch
from transformer_runs import few_images, transformer_config, untrained_tokenizer

from ibq.config import DataConfig
from ibq.data import Images
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer

CONFIG = transformer_config(seed=5)


def fashion(n_images: int) -> Images:
    """The first test images of Fashion-MNIST."""
    return few_images(DataConfig(), "test", n_images)


def build() -> tuple[Transformer, Tokenizer]:
    torch.manual_seed(0)
    transformer = Transformer(CONFIG.transformer_config)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.5 if name.startswith("head.") else 0.1)
    return transformer, untrained_tokenizer(CONFIG)
