"""A tiny generator and its data, for tests that sample and measure."""

from __future__ import annotations

import torch
from training_runs import images_once

from ibq.config import DataConfig, parse_train_config
from ibq.data import Images
from ibq.generator_config import GeneratorConfig, parse_generator_config
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer

MODEL = {"base_channels": 4, "channel_multipliers": [1, 2, 2, 2], "res_blocks": 1, "z_channels": 8, "norm_groups": 4}
TOKENIZER = {"model": MODEL, "quantizer": {"method": "ibq", "codebook_size": 16, "code_dim": 8}}
CONFIG = parse_generator_config({"tokenizer": TOKENIZER, "data": {}, "transformer": {"depth": 1}, "batch_size": 8, "seed": 5})


def fashion(n_images: int) -> Images:
    """The first test images of Fashion-MNIST."""
    whole = images_once(DataConfig(), "test")
    assert whole.labels_N is not None
    return Images("fashion-mnist", "test", whole.images_NCHW[:n_images], whole.labels_N[:n_images])


def build(config: GeneratorConfig = CONFIG) -> tuple[Transformer, Tokenizer]:
    """Untrained, but of opinions: its predictions hang on class and tokens."""
    torch.manual_seed(0)
    transformer, tokenizer = Transformer(config.transformer_config), Tokenizer(parse_train_config(TOKENIZER))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.5 if name.startswith("head.") else 0.1)
    return transformer, tokenizer
