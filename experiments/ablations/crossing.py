"""An ablation at several levels of a further factor: on other data, with another objective, trained for longer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from experiments.ablations.base import Ablation, Arm, Factor
from experiments.ablations.changes import together


def crossed(
    ablation: Ablation, factor: Factor, changes: Mapping[str, Mapping[str, Any]], tuned_at: str | None = None
) -> Ablation:
    """Every arm and every claim at every level of a further factor, its level behind their names.

    Args:
        ablation: what is crossed.
        factor: joins its factors.
        changes: by level, what changes in every arm; multiples of a field that an arm multiplies too are multiplied.
        tuned_at: the level whose search decides for arms at all levels; None: each level has a search of its own.
    """
    arms = [
        replace(
            arm,
            name=f"{arm.name}, {level}",
            levels={**arm.levels, factor.name: level},
            changes=together(arm.changes, changes[level]),
            tuned_as=_tuned_as(arm, level, tuned_at),
        )
        for level in factor.levels
        for arm in ablation.arms
    ]
    claims = [
        replace(
            claim,
            name=f"{claim.name}, {level}",
            without=f"{claim.without}, {level}",
            with_=f"{claim.with_}, {level}",
            claim=f"{claim.claim.removesuffix('.')} ({factor.name}: {level}).",
        )
        for level in factor.levels
        for claim in ablation.contrasts
    ]
    return replace(ablation, factors=(*ablation.factors, factor), arms=tuple(arms), contrasts=tuple(claims))


def _tuned_as(arm: Arm, level: str, tuned_at: str | None) -> str | None:
    if arm.tuned_as is None and level == (tuned_at or level):
        return None
    return f"{arm.tuned_as or arm.name}, {tuned_at or level}"


def thinned(ablation: Ablation, seeds: Callable[[Arm], int]) -> Ablation:
    """The arms with so many seeds; those with none, and claims on them, are left out."""
    arms = tuple(replace(arm, seeds=seeds(arm)) for arm in ablation.arms if seeds(arm))
    names = {arm.name for arm in arms}
    claims = tuple(claim for claim in ablation.contrasts if {claim.without, claim.with_} <= names)
    return replace(ablation, arms=arms, contrasts=claims)
