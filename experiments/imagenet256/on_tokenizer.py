"""A transformer's recipe on another tokenizer than its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ibq.config import TrainConfig, TransformerTrainConfig
from ibq.errors import ConfigError
from ibq.models.tokenizer import Tokenizer
from ibq.schema import set_fields


def on_tokenizer(
    config: TransformerTrainConfig, tokenizer: Tokenizer, overrides: dict[str, Any]
) -> TransformerTrainConfig:
    """A transformer's config on another tokenizer, tied to its weights, with fields set by dotted path; validated once
    all is in its place.

    The tokenizer may be any, also of another method, K or grid than the recipe's: they are the tokenizer's choice and
    not the recipe's, and who names one by its path has chosen it, while batch, schedule and transformer of the recipe
    serve every tokenizer. That the recipe's expected numbers are then of something else is said in a line. What cannot
    go together (sub-tokens that do not make K, another number of channels, a grid that does not divide the images) the
    config refuses.

    Raises:
        ConfigError: a path names no field, or one of the tokenizer, which is trained already; or the result contradicts
            itself.
    """
    for path in overrides:
        if path.split(".")[0] in ("tokenizer", "tokenizer_sha256"):
            raise ConfigError(
                f"--set {path} cannot change the tokenizer of --tokenizer, which is trained already; leave it out"
            )
    tree = config.to_json_dict() | {
        "tokenizer": tokenizer.config.to_json_dict(),
        "tokenizer_sha256": tokenizer.digest(),
    }
    return TransformerTrainConfig.parse(set_fields(tree, overrides))


def say_of_another(usual: TrainConfig, given: TrainConfig, say: Callable[[str], None]) -> None:
    """A line, by the first process alone, where the tokens are of another kind than the recipe's."""
    theirs, ours = (
        f"{config.quantizer.method} with {config.quantizer.codebook_size:,} codes, f = {config.model.downsampling}"
        for config in (given, usual)
    )
    if theirs != ours and os.environ.get("RANK", "0") == "0":
        say(f"the tokenizer is {theirs}; the recipe has {ours}, and its expected numbers are for that")
