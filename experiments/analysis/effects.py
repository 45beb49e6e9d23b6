"""Effects, read from pairs of arms that differ in one factor and nothing else, and verdicts on claims stated
beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from experiments.ablations import Ablation, Arm, Contrast
from experiments.analysis.metrics import compared
from ibq.metrics import METRICS, Metric

MIN_SEEDS = 3
"""Below this many seeds nothing is confirmed or refuted."""

LOST = ("nan", "oom", "failed")
"""States of a run that was to give a result and gave none."""


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


@dataclass(frozen=True)
class Verdict:
    """The verdict of rows on a claim: confirmed, consistent, undecided or refuted, why it is undecided, and the
    differences seed by seed."""

    contrast: Contrast
    word: str
    reason: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences) if self.differences else math.nan

    @property
    def metric(self) -> Metric:
        return METRICS[self.contrast.outcome]

    @property
    def required(self) -> str:
        """The change required beforehand, e.g. "Δ L1 ≤ -0.003"."""
        signs = (">", "<") if self.contrast.keeps else ("≤", "≥")
        sign = signs[self.contrast.effect > 0]
        return f"{self.metric.change} {sign} {self.contrast.effect:+g}"

    @property
    def text(self) -> str:
        """The verdict as it stands in tables."""
        return verdict_text(self.word, self.reason, self.contrast.exploratory)

    @property
    def seen(self) -> tuple[str, ...]:
        """The differences as text, in the digits of their outcome."""
        return tuple(f"{difference:+.{self.metric.change_digits}f}" for difference in self.differences)


def verdict_text(word: str, reason: str, exploratory: str) -> str:
    """A verdict as it stands in tables: the word, why it is undecided, and why the claim is exploratory."""
    return word + (f": {reason}" if reason else "") + (f" (exploratory: {exploratory})" if exploratory else "")


def verdict(contrast: Contrast, rows: pd.DataFrame) -> Verdict:
    """Judge a claim by its own rule: every seed's paired difference reaches the effect size, or none does.

    Undecided if a seed of the pair has lost its run, if seeds disagree, or if the outcome has no room for the effect
    where it starts. With fewer than MIN_SEEDS seeds it is at most consistent.
    """
    table = paired_differences(rows, contrast.without, contrast.with_, (contrast.outcome,))
    seeds, differences = tuple(map(int, table["seed"])), tuple(table[contrast.outcome])
    reached = [
        (difference * math.copysign(1, contrast.effect) >= abs(contrast.effect)) != contrast.keeps
        for difference in differences
    ]
    word, reason = _word(contrast, rows, reached)
    return Verdict(contrast, word, reason, seeds, differences)


def _word(contrast: Contrast, rows: pd.DataFrame, reached: list[bool]) -> tuple[str, str]:
    """The verdict, and why it is undecided if it is."""
    if obstacle := _obstacle(contrast, rows, bool(reached)):
        return "undecided", obstacle
    if any(reached) != all(reached):
        return "undecided", "the seeds disagree"
    if all(reached):
        return "consistent" if len(reached) < MIN_SEEDS else "confirmed", ""
    if no_room := _no_room(contrast, rows):
        return "undecided", no_room
    return (
        ("undecided", f"not seen, but in fewer than {MIN_SEEDS} seeds") if len(reached) < MIN_SEEDS else ("refuted", "")
    )


def _obstacle(contrast: Contrast, rows: pd.DataFrame, has_pair: bool) -> str:
    """The reason why nothing can be said: a lost run, or no finished pair; empty otherwise."""
    pair = rows[rows["arm"].isin([contrast.without, contrast.with_])]
    if (lost := pair[pair["status"].isin(LOST)]).size:
        return f"no result of {', '.join(f'{row.arm} seed {row.seed} ({row.status})' for row in lost.itertuples())}"
    if has_pair:
        return ""
    if pair["status"].isin(["pending", "stopped", "waiting"]).all():  # or no row at all
        return "not trained"
    if absent := [arm for arm in (contrast.without, contrast.with_) if arm not in set(pair["arm"])]:
        return f"{absent[0]} is not in this study"
    sides = [
        set(pair[(pair["arm"] == arm) & (pair["status"] == "ok")]["seed"]) for arm in (contrast.without, contrast.with_)
    ]
    if sides[0] & sides[1]:
        return f"{METRICS[contrast.outcome].change_unit} not measured"
    unfinished = (f"{row.arm} seed {row.seed} {row.status}" for row in pair.itertuples() if row.status != "ok")
    return f"no finished pair: {', '.join(unfinished)}"


def _no_room(contrast: Contrast, rows: pd.DataFrame) -> str:
    """The reason why the outcome cannot change by the effect, e.g. usage by +10 points from 93%; empty if it can."""
    metric = METRICS[contrast.outcome]
    finished = rows[(rows["arm"] == contrast.without) & (rows["status"] == "ok")]
    starts = compared(finished, contrast.outcome).dropna()
    ends = starts + contrast.effect
    if contrast.keeps or ends.between(metric.least, metric.most).all():
        return ""
    return (
        f"it starts at {', '.join(f'{start:.{metric.change_digits}f}' for start in starts)}, which leaves no room for "
        f"{contrast.effect:+g}"
    )
