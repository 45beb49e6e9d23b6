"""Effects, read from pairs of arms that differ in one factor and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from experiments.ablations import Ablation, Arm
from experiments.analysis.metrics import compared

RATE_AND_DISTORTION = ("bits", "l1")
"""Metrics that main effects are shown in, side by side."""


@dataclass(frozen=True)
class Pair:
    """Two arms that differ in one factor: `high` has the later level."""

    factor: str
    change: str
    low: Arm
    high: Arm


def matched_pairs(ablation: Ablation) -> list[Pair]:
    """All pairs of arms that differ in exactly one factor, ordered by factor and level."""
    pairs = []
    for one, other in combinations(ablation.arms, 2):
        different = [factor for factor in ablation.factors if one.levels[factor.name] != other.levels[factor.name]]
        if len(different) == 1:
            factor = different[0]
            ascending = factor.levels.index(one.levels[factor.name]) < factor.levels.index(other.levels[factor.name])
            low, high = (one, other) if ascending else (other, one)
            pairs.append(
                Pair(factor.name, f"{factor.name}: {low.levels[factor.name]} → {high.levels[factor.name]}", low, high)
            )
    order = [factor.name for factor in ablation.factors]
    return sorted(pairs, key=lambda pair: (order.index(pair.factor), pair.change))


def paired_differences(
    rows: pd.DataFrame, low: str, high: str, outcomes: Iterable[str] = RATE_AND_DISTORTION
) -> pd.DataFrame:
    """Differences (high - low) of outcomes at every seed that both arms have finished; columns seed and the outcomes'
    names.

    A seed at which one of the two lacks an outcome is left out.
    """
    finished = rows[rows["status"] == "ok"]
    values = pd.DataFrame({name: compared(finished, name) for name in outcomes}).set_index(finished["seed"])
    sides = [values[(finished["arm"] == name).to_numpy()] for name in (low, high)]
    return (sides[1] - sides[0]).dropna().rename_axis("seed").reset_index()


def effects(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """One line per matched pair and seed: factor, change, the letters of both arms, seed, differences of the
    outcomes."""
    lines = []
    for pair in matched_pairs(ablation):
        letters = f"{ablation.letter(pair.low.name)}→{ablation.letter(pair.high.name)}"
        method = ablation.factors[0].name
        surrounding = "both" if pair.factor == method else pair.low.levels[method]
        for difference in paired_differences(rows, pair.low.name, pair.high.name).to_dict("records"):
            lines.append(
                {"factor": pair.factor, "change": pair.change, "pair": letters, "surrounding": surrounding} | difference
            )
    return pd.DataFrame(lines, columns=["factor", "change", "pair", "surrounding", "seed", *RATE_AND_DISTORTION])


def main_effects(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Per change of a factor: number of pairs and, for each outcome, mean, least and greatest of the pairs (their seeds
    averaged first)."""
    table = effects(ablation, rows)
    lines = []
    for change, group in table.groupby("change", sort=False):
        by_pair = group.groupby("pair")[list(RATE_AND_DISTORTION)].mean()
        line: dict[str, object] = {"factor": group["factor"].iloc[0], "change": change, "pairs": len(by_pair)}
        for outcome in RATE_AND_DISTORTION:
            line |= {
                f"{outcome}_mean": by_pair[outcome].mean(),
                f"{outcome}_min": by_pair[outcome].min(),
                f"{outcome}_max": by_pair[outcome].max(),
            }
        lines.append(line)
    return pd.DataFrame(lines)
