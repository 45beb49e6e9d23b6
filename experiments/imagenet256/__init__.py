"""The paper's recipes on ImageNet 256×256: of its tokenizers, and of the transformers that are trained on a tokenizer's
indices."""

from __future__ import annotations

from collections.abc import Callable

from experiments.imagenet256.tokenizers import TOKENIZERS
from experiments.imagenet256.transformers import TRANSFORMERS
from ibq.config import RunConfig
from ibq.errors import ConfigError, nearest

RECIPES: dict[str, Callable[[], RunConfig]] = {**TOKENIZERS, **TRANSFORMERS}
"""Recipes that `train` and `plan` know by name."""


def recipe_of(name: str) -> Callable[[], RunConfig]:
    """A recipe by name.

    Raises:
        ConfigError: no such recipe; the nearest is named.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} does not exist; {nearest(name, RECIPES)}")
    return RECIPES[name]
