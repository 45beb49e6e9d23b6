"""Registration of claims: `experiments/claims.jsonl` holds a line for each, with the time at which it was stated.

What defines a claim is its wording, outcome, threshold, whether something is kept, and what its two arms change of the
preset's config; `digest` is the hash of these. A change of any of them makes another claim, which has to be registered
anew: `python -m experiments register` appends what is not there yet and rewrites no line. Names, titles and the paper's
numbers may change. A change that depends on the preset counts as what it is at quick.

A claim is exploratory if it is not registered, was registered after a run that it is judged by began (the start of its
first attempt, column `started` of rows), or if that start is not known.

Lines with a `commit` have the time at which that commit stated the claim as it is now, since they are older than this
file; how it was found: docs/evidence.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from experiments.ablations import ABLATIONS, Ablation, Arm, Contrast
from experiments.ablations.changes import tokenizer_config, transformer_config
from experiments.recipes import PRESETS
from experiments.study import ROOT
from ibq.run_directory import append_line, read_lines
from ibq.schema import flatten

REGISTER = ROOT / "experiments" / "claims.jsonl"


def digest(ablation: Ablation, claim: Contrast) -> str:
    """Hash of what defines a claim."""
    arms = [_definition(ablation.arm(name)) for name in (claim.without, claim.with_)]
    parts = [claim.claim, claim.outcome, claim.effect, claim.keeps, *arms]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _definition(arm: Arm) -> dict[str, Any]:
    """Changes of an arm as JSON, by dotted path."""
    changes, of_transformer = dict(arm.changes), dict(arm.transformer or {})
    if any(map(callable, [*changes.values(), *of_transformer.values()])):
        config = tokenizer_config(PRESETS["quick"], changes, {})
        changes = _with_values(changes, config.to_json_dict())
        if arm.transformer is not None:
            own = transformer_config(PRESETS["quick"], config, of_transformer, {})
            of_transformer = _with_values(of_transformer, own.to_json_dict())
    known: dict[str, Any] = {"tokenizer": changes, "transformer": arm.transformer and of_transformer}
    return dict(json.loads(json.dumps(known, default=str)))  # a multiple as text, a tuple as a list


def _with_values(changes: Mapping[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Changes, those that are functions as the values that a config has in their place."""
    values = flatten(tree)
    return {path: values[path] if callable(value) else value for path, value in changes.items()}


def dates() -> dict[str, datetime]:
    """Time of registration of every claim, by its hash."""
    return {line["hash"]: datetime.fromisoformat(line["registered"]) for line in read_lines(REGISTER)}


def register() -> list[str]:
    """Append the claims that are not registered yet, with the time now; returns their names."""
    known, added = dates(), []
    for ablation in ABLATIONS.values():
        for claim in ablation.contrasts:
            key = digest(ablation, claim)
            if key not in known:
                known[key] = datetime.now(UTC)
                line = {"registered": known[key].isoformat(timespec="seconds"), "hash": key}
                append_line(REGISTER, line | {"ablation": ablation.name, "claim": claim.name})
                added.append(f"{ablation.name}: {claim.name}")
    return added


def exploratory(ablation: Ablation, claim: Contrast, judged: pd.DataFrame, registered: Mapping[str, datetime]) -> str:
    """The reason why a claim is not known to have been stated before the runs that it is judged by; empty if it is.

    Args:
        ablation: has the claim's arms.
        claim: what is judged.
        judged: rows of these runs; nothing is judged where there are none.
        registered: what `dates` gives.
    """
    if judged.empty:
        return ""
    if (stated := registered.get(digest(ablation, claim))) is None:
        return "not registered"
    if "started" not in judged or judged["started"].isna().any():
        return "start of its runs unknown"
    started = pd.to_datetime(judged["started"], utc=True, format="ISO8601")
    first = judged.iloc[int(started.argmin())]
    if started.min() >= stated:
        return ""
    return f"registered after the run of {first['arm']} seed {first['seed']} began"
