"""Effects, read from pairs of arms that differ in one factor and nothing else, and verdicts on claims stated beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from experiments.ablations import Ablation, Arm, Contrast

MIN_SEEDS = 3
"""Below this many seeds nothing is confirmed or refuted."""

OUTCOMES = {"bits": "Δ bits a token", "l1": "Δ L1"}
"""What effects are measured in: rate (log2 of perplexity) and distortion, side by side."""


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
            pairs.append(Pair(factor.name, f"{factor.name}: {low.levels[factor.name]} → {high.levels[factor.name]}", low, high))
    order = [factor.name for factor in ablation.factors]
    return sorted(pairs, key=lambda pair: (order.index(pair.factor), pair.change))


def paired_differences(rows: pd.DataFrame, low: str, high: str) -> pd.DataFrame:
    """Differences (high - low) of the outcomes at every seed that both arms have finished."""
    finished = rows[rows["status"] == "ok"] if "bits" in rows else rows.iloc[:0]
    sides = [finished[finished["arm"] == name].set_index("seed") for name in (low, high)]
    seeds = sides[0].index.intersection(sides[1].index)
    if seeds.empty:
        return pd.DataFrame(columns=["seed", *OUTCOMES])
    return (sides[1].loc[seeds, list(OUTCOMES)] - sides[0].loc[seeds, list(OUTCOMES)]).astype(float).reset_index()


def effects(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """One line per matched pair and seed: factor, change, the letters of both arms, seed, differences of the outcomes."""
    lines = []
    for pair in matched_pairs(ablation):
        letters = f"{ablation.letter(pair.low.name)}→{ablation.letter(pair.high.name)}"
        method = ablation.factors[0].name
        surrounding = "both" if pair.factor == method else pair.low.levels[method]
        for difference in paired_differences(rows, pair.low.name, pair.high.name).to_dict("records"):
            lines.append({"factor": pair.factor, "change": pair.change, "pair": letters, "surrounding": surrounding} | difference)
    return pd.DataFrame(lines, columns=["factor", "change", "pair", "surrounding", "seed", *OUTCOMES])


def main_effects(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Per change of a factor: number of pairs and, for each outcome, mean, least and greatest of the pairs (their seeds averaged first)."""
    table = effects(ablation, rows)
    lines = []
    for change, group in table.groupby("change", sort=False):
        by_pair = group.groupby("pair")[list(OUTCOMES)].mean()
        line: dict[str, object] = {"factor": group["factor"].iloc[0], "change": change, "pairs": len(by_pair)}
        for outcome in OUTCOMES:
            line |= {
                f"{outcome}_mean": by_pair[outcome].mean(),
                f"{outcome}_min": by_pair[outcome].min(),
                f"{outcome}_max": by_pair[outcome].max(),
            }
        lines.append(line)
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a claim: confirmed, consistent, undecided or refuted; with fewer than 3 seeds at most consistent."""

    contrast: Contrast
    word: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences) if self.differences else math.nan


def verdict(contrast: Contrast, rows: pd.DataFrame) -> Verdict:
    """Judge a claim by its own rule: every seed's paired difference reaches the effect size, or none does."""
    differences = tuple(paired_differences(rows, contrast.without, contrast.with_)[contrast.outcome])
    reached = [difference * math.copysign(1, contrast.effect) >= abs(contrast.effect) for difference in differences]
    if not reached or any(reached) != all(reached):
        return Verdict(contrast, "undecided", differences)
    if len(reached) < MIN_SEEDS:
        return Verdict(contrast, "consistent" if all(reached) else "undecided", differences)
    return Verdict(contrast, "confirmed" if all(reached) else "refuted", differences)
