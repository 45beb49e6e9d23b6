"""Effects, read from pairs of arms that differ in one factor and nothing else, and verdicts on claims stated beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.ablations import Ablation, Arm, Contrast

MIN_SEEDS = 3
"""Below this many seeds nothing is confirmed or refuted."""


class Outcome(NamedTuple):
    """Something that differences are taken of: how the difference is written, its unit in a sentence, digits, and its value in rows."""

    label: str
    unit: str
    digits: int
    value: Callable[[pd.DataFrame], pd.Series]


def _entry(name: str, scale: float = 1.0) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda rows: scale * rows[name].astype(float) if name in rows else pd.Series(float("nan"), rows.index)


OUTCOMES = {
    "bits": Outcome("Δ bits a token", "bits a token", 2, _entry("bits")),
    "l1": Outcome("Δ L1", "L1", 4, _entry("l1")),
    "usage": Outcome("Δ usage, points", "points of usage", 1, _entry("usage", 100)),
    "share": Outcome("Δ perplexity / K, points", "points of perplexity / K", 1, _entry("perplexity_share", 100)),
    "fid": Outcome("Δ log2 FID[fashion-cnn]", "doublings of FID[fashion-cnn]", 2, lambda rows: np.log2(_entry("fid[fashion-cnn]")(rows))),
}
RATE_AND_DISTORTION = ("bits", "l1")
"""What main effects are shown in, side by side."""


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


def paired_differences(rows: pd.DataFrame, low: str, high: str, outcomes: Iterable[str] = RATE_AND_DISTORTION) -> pd.DataFrame:
    """Differences (high - low) of outcomes at every seed that both arms have finished; columns seed and the outcomes' names.

    A seed at which one of the two lacks an outcome is left out.
    """
    finished = rows[rows["status"] == "ok"]
    values = pd.DataFrame({name: OUTCOMES[name].value(finished) for name in outcomes}).set_index(finished["seed"])
    sides = [values[(finished["arm"] == name).to_numpy()] for name in (low, high)]
    return (sides[1] - sides[0]).dropna().rename_axis("seed").reset_index()


def effects(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """One line per matched pair and seed: factor, change, the letters of both arms, seed, differences of the outcomes."""
    lines = []
    for pair in matched_pairs(ablation):
        letters = f"{ablation.letter(pair.low.name)}→{ablation.letter(pair.high.name)}"
        method = ablation.factors[0].name
        surrounding = "both" if pair.factor == method else pair.low.levels[method]
        for difference in paired_differences(rows, pair.low.name, pair.high.name).to_dict("records"):
            lines.append({"factor": pair.factor, "change": pair.change, "pair": letters, "surrounding": surrounding} | difference)
    return pd.DataFrame(lines, columns=["factor", "change", "pair", "surrounding", "seed", *RATE_AND_DISTORTION])


def main_effects(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Per change of a factor: number of pairs and, for each outcome, mean, least and greatest of the pairs (their seeds averaged first)."""
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


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a claim: confirmed, consistent, undecided or refuted; with fewer than 3 seeds at most consistent."""

    contrast: Contrast
    word: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences) if self.differences else math.nan

    @property
    def reached(self) -> list[bool]:
        """For each seed whether its difference has the sign and at least the size that the claim requires."""
        return _reached(self.contrast, self.differences)


def verdict(contrast: Contrast, rows: pd.DataFrame) -> Verdict:
    """Judge a claim by its own rule: every seed's paired difference reaches the effect size, or none does."""
    table = paired_differences(rows, contrast.without, contrast.with_, (contrast.outcome,))
    seeds, differences = tuple(table["seed"]), tuple(table[contrast.outcome])
    reached = _reached(contrast, differences)
    if not reached or any(reached) != all(reached):
        return Verdict(contrast, "undecided", seeds, differences)
    if len(reached) < MIN_SEEDS:
        return Verdict(contrast, "consistent" if all(reached) else "undecided", seeds, differences)
    return Verdict(contrast, "confirmed" if all(reached) else "refuted", seeds, differences)


def _reached(contrast: Contrast, differences: Iterable[float]) -> list[bool]:
    return [difference * math.copysign(1, contrast.effect) >= abs(contrast.effect) for difference in differences]
