"""Differences of arms, read from the configs of their runs: only these fields, and beside them what all have in
common."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from experiments.ablations import Ablation
from experiments.study import Study
from ibq.config import RunConfig, TransformerTrainConfig
from ibq.models.config import AdversarialConfig
from ibq.schema import flatten

ABSENT = "–"


def differing_fields(study: Study, ablation: Ablation) -> tuple[pd.DataFrame, dict[str, str]]:
    """Config fields of the arms, seeds and runs of searches left out.

    Returns:
        A line per arm with the fields in which arms differ ("–" where the method has no such field, "not chosen yet"
        where a search goes on), and the fields that all arms have in common, by dotted path.
    """
    configs = _configs(study, ablation)
    names = list(dict.fromkeys(name for config in configs.values() for name in config))
    values = {name: [config.get(name, ABSENT) for config in configs.values()] for name in names}
    common = {name: of_arms[0] for name, of_arms in values.items() if len(set(of_arms)) == 1}
    table = pd.DataFrame({name: of_arms for name, of_arms in values.items() if name not in common})
    table.insert(0, "arm", list(configs))
    table.insert(0, "", [ablation.letter(arm) for arm in configs])
    return table, common


def _configs(study: Study, ablation: Ablation) -> dict[str, dict[str, str]]:
    """Fields and values, as texts, of every arm that the study has."""
    ready, waiting = (
        [cell for cell in cells if cell.ablation.name == ablation.name] for cells in (study.cells, study.waiting)
    )
    of_arm = {cell.arm.name: cell.config for cell in waiting} | {
        cell.arm.name: cell.config for cell in ready if not cell.search
    }
    searching = {cell.tokenizer_of or cell.arm.name for cell in waiting if cell.stage == "tokenizer"}
    configs = {}
    for arm in ablation.arms:
        if config := of_arm.get(arm.name):
            fields = {name: _text(value) for name, value in active_fields(config).items()}
            if (tuned := ablation.adaptive.tuned) and arm.name in searching:
                fields[f"tokenizer.{tuned}" if ablation.of_transformers else tuned] = "not chosen yet"
            configs[arm.name] = fields
    return configs


def active_fields(config: RunConfig) -> dict[str, Any]:
    """All fields by dotted path but the seed and those that are idle: of a discriminator, perceptual term or schedule
    that is not there. Those of a transformer's tokenizer begin with `tokenizer.`."""
    if isinstance(config, TransformerTrainConfig):
        own = flatten(config.to_json_dict() | {"tokenizer": active_fields(config.tokenizer)})
        idle = ["seed", *([] if config.tokenizer_sha256 else ["tokenizer_sha256"])]
        return {name: value for name, value in own.items() if name not in idle}
    idle = ["seed"]
    if not config.loss.adversarial.weight:
        idle += [f"loss.adversarial.{name}" for name in AdversarialConfig.model_fields if name != "weight"]
    if config.loss.perceptual == "none":
        idle.append("loss.perceptual_weight")
    idle += (
        ["optim.final_factor"] if config.optim.schedule == "multi-step" else ["optim.milestones", "optim.decay_factor"]
    )
    return {name: value for name, value in flatten(config.to_json_dict()).items() if name not in idle}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)
