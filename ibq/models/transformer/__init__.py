"""The autoregressive transformer over a tokenizer's indices, with its config, key-value cache and sub-tokens."""

from ibq.models.transformer.model import Transformer, build_transformer

__all__ = ["Transformer", "build_transformer"]
