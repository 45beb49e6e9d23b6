"""Arms of quantizers of one's own, which plugins have registered: a family of the comparison, searched and drawn as the
others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.ablations.base import Ablation, Arm
from experiments.ablations.changes import Times, of_quantizer
from ibq.errors import ConfigError
from ibq.plugins import Plugin

FAMILY = "yours"


def with_plugins(ablation: Ablation, plugins: Sequence[Plugin], step_share: float) -> Ablation:
    """An ablation with the arms of plugins after its own, at the preset's sizes; itself where there are no plugins.

    Args:
        ablation: its factors are `family` and `method`.
        plugins: those that are loaded.
        step_share: of the preset's steps.

    Raises:
        ConfigError: two arms have one name.
    """
    names, arms = {arm.name for arm in ablation.arms}, []
    for plugin in plugins:
        for name, fields in plugin.arms.items():
            if name in names:
                raise ConfigError(
                    f"the arm {name!r} of the plugin {plugin.path} is an arm of {ablation.name} already; give it "
                    f"another name by ARMS = {{'NAME': {{'field': value}}}}"
                )
            names.add(name)
            changes = {**of_quantizer(fields), "steps": Times(step_share)}
            arms.append(Arm(name, {"family": FAMILY, "method": _in_words(fields, plugin)}, changes, focal=True))
    if not arms:
        return ablation
    levels = {"family": (FAMILY,), "method": tuple(dict.fromkeys(arm.levels["method"] for arm in arms))}
    factors = tuple(replace(factor, levels=factor.levels + levels[factor.name]) for factor in ablation.factors)
    return replace(ablation, arms=ablation.arms + tuple(arms), factors=factors)


def _in_words(fields: Mapping[str, Any], plugin: Plugin) -> str:
    own = ", ".join(f"{name}={value}" for name, value in fields.items() if name != "method")
    return f"{fields['method']} {f'with {own}' if own else 'at its defaults'} ({plugin})"
