"""The contract of quantizers as rules that any of them can be tried by, each of which says in words what breaks it.

What `ibq check` runs, and the tests of every built-in method. A rule gets a config and yields sentences, none where it
is kept.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ibq.quantizers.contract import inputs, outputs, precision, state
from ibq.quantizers.contract.trial import seeded
from ibq.schema import QuantizerConfig

Rule = Callable[[QuantizerConfig], Iterator[str]]

RULES: dict[str, Rule] = {
    "shapes and types": outputs.shapes_and_types,
    "round trip": outputs.round_trip,
    "losses": outputs.losses,
    "gradients": outputs.gradients,
    "logits": outputs.logits,
    "each token alone": outputs.each_token_alone,
    "evaluation": state.evaluation,
    "config": state.config_as_json,
    "resume": state.resume,
    "changes in forward": state.changes_in_forward,
    "recomputation": state.recomputation,
    "two forwards": state.two_forwards,
    "late quantization": state.late_quantization,
    "masks": inputs.masks,
    "mask of all": inputs.mask_of_all,
    "sequences, videos": inputs.sequences_and_videos,
    "empty batches": inputs.empty_batches,
    "not finite": inputs.values_that_are_not_finite,
    "autocast": precision.autocast,
    "casts": precision.casts,
    "other types": precision.other_types,
    "accumulators": precision.accumulators,
}
"""By name; the first line of a rule's docstring says what it demands."""
OURS = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent))


def broken(rule: str, config: QuantizerConfig) -> list[str]:
    """What breaks a rule, a sentence each; none where it is kept. Nothing that was drawn before counts."""
    sentences: list[str] = []
    with seeded(0):
        try:
            sentences += RULES[rule](config)
        except Exception as error:  # whatever a method raises breaks the rule
            frames = [
                frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OURS)
            ]
            where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
            text = " ".join(str(error).split())
            sentences.append(f"it raises {type(error).__name__}: {text[:300]}{where}")
    return sentences


def demand(rule: str) -> str:
    """What a rule demands, in a sentence."""
    return " ".join(str(RULES[rule].__doc__).split())
