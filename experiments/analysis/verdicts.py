"""Verdicts on claims, read off the 95% t-interval of the mean paired difference over seeds.

A claim says that an outcome changes by at least a threshold from one arm to another. Differences are taken seed by
seed, and signed so that the claimed change is positive. The claim is

- supported, if the whole interval lies beyond the threshold;
- contradicted, if the whole interval lies beyond zero on the other side;
- smaller than claimed, if the interval lies short of the threshold, and the claim is not contradicted;
- inconclusive, if the interval holds the threshold, or where there is none: a lost run, no finished pair, fewer than
  MIN_SEEDS seeds; or if the change is short of a threshold that the outcome had no room to reach.

A claim that something `keeps` says that the change stays short of a threshold, that of a loss that would matter. It is
supported if the whole interval lies short of the threshold (also where the outcome improves), contradicted if the whole
interval lies beyond it, and else inconclusive. Differences that are all equal have a point for an interval.

An interval of 95% excludes a value exactly if the two-sided t-test of the mean against this value has p < .05, 2.5% on
each side; so p is two-sided here, and against the threshold. The claims of an ablation are a family: p is corrected by
Holm's method over those that have an interval, and so is p against zero, which decides what is contradicted. The
verdict is the word of the corrected p; the uncorrected word, that of the interval, is shown where it differs.

Letters: S seeds; leading axes, if any, are of independent experiments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from experiments.ablations import Ablation, Contrast
from experiments.analysis import registration
from experiments.analysis.effects import paired_differences
from experiments.analysis.metrics import compared
from ibq.metrics import METRICS, Metric

SUPPORTED, SMALLER, CONTRADICTED, INCONCLUSIVE = "supported", "smaller than claimed", "contradicted", "inconclusive"
WORDS = (SUPPORTED, SMALLER, CONTRADICTED, INCONCLUSIVE)
ALPHA = 0.05
MIN_SEEDS = 3
"""Fewer seeds than this decide nothing, and what rests on them is exploratory."""
HOLDS = "the interval holds the threshold"
FEW = ("no seed", "one seed", "two seeds")
LOST = ("nan", "oom", "failed")
"""States of a run that was to give a result and gave none."""


def interval(differences_S: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% t-interval of the mean."""
    n = len(differences_S)
    half = stats.t.ppf(1 - ALPHA / 2, n - 1) * differences_S.std(ddof=1) / math.sqrt(n)
    return float(differences_S.mean() - half), float(differences_S.mean() + half)


def p_value(differences_S: NDArray[np.float64], value: float) -> NDArray[np.float64]:
    """Two-sided p of the t-test that the mean over the last axis is `value`; 1 where all differences are."""
    n = differences_S.shape[-1]
    error = differences_S.std(axis=-1, ddof=1) / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(differences_S.mean(axis=-1) - value) / error
    p: NDArray[np.float64] = np.nan_to_num(2 * stats.t.sf(t, n - 1), nan=1.0)
    return p


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's corrected p of a family, over the last axis."""
    m = p.shape[-1]
    order = np.argsort(p, axis=-1)
    raised = np.maximum.accumulate(np.take_along_axis(p, order, -1) * np.arange(m, 0, -1), axis=-1)
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.minimum(raised, 1.0), -1)
    return corrected


def words(
    mean: NDArray[np.float64] | float,
    threshold: float,
    p_threshold: NDArray[np.float64] | float,
    p_zero: NDArray[np.float64] | float,
    keeps: bool = False,
) -> NDArray[np.str_]:
    """The word of each claim by its p, of the interval or corrected.

    Args:
        mean: difference in the claimed direction.
        threshold: above zero.
        p_threshold: against the threshold.
        p_zero: against zero.
        keeps: the claim is that the change stays short of the threshold.
    """
    decided, beyond = np.less(p_threshold, ALPHA), np.greater(mean, threshold)
    if keeps:
        return np.select([decided & ~beyond, decided], [SUPPORTED, CONTRADICTED], INCONCLUSIVE)
    opposite = np.less(mean, 0) & np.less(p_zero, ALPHA)
    return np.select([decided & beyond, decided & opposite, decided], [SUPPORTED, CONTRADICTED, SMALLER], INCONCLUSIVE)


@dataclass(frozen=True)
class Verdict:
    """The verdict of rows on a claim.

    Args:
        contrast: the claim.
        word: one of WORDS, corrected for the family.
        uncorrected: the word of the interval alone.
        reason: why it is inconclusive; empty otherwise.
        exploratory: why the claim was not stated beforehand, or that its seeds are too few; empty: neither.
        seeds: those that both arms have finished.
        differences: of the outcome at each of them, not signed by the claim.
        p: of the t-test against the threshold; None where there is none.
        holm: the same, corrected for the family.
    """

    contrast: Contrast
    word: str
    uncorrected: str
    reason: str
    exploratory: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    p: float | None = None
    holm: float | None = None

    @property
    def metric(self) -> Metric:
        return METRICS[self.contrast.outcome]

    @property
    def claimed(self) -> str:
        """The claimed change, e.g. "Δ L1 ≤ -0.003"."""
        signs = (">", "<") if self.contrast.keeps else ("≤", "≥")
        return f"{self.metric.change} {signs[self.contrast.effect > 0]} {self.contrast.effect:+g}"

    @property
    def change(self) -> str:
        """The mean difference and its interval, e.g. "+0.017 (-0.002 to +0.036)"; the mean alone where seeds are too
        few, and empty where there is none."""
        if not self.differences:
            return ""
        differences = np.array(self.differences)
        low, high = interval(differences) if len(differences) >= MIN_SEEDS else (math.nan, math.nan)
        mean = self._signed(float(differences.mean()))
        return mean if math.isnan(low) else f"{mean} ({self._signed(low)} to {self._signed(high)})"

    @property
    def correction(self) -> str:
        """Holm's p as it is shown, e.g. "0.012"; empty where there is no test."""
        if self.holm is None:
            return ""
        return f"{self.holm:.3f}" if self.holm >= 0.001 else "<0.001"

    @property
    def text(self) -> str:
        """The verdict as it stands in tables."""
        return verdict_text(self.word, self.uncorrected, self.reason, self.exploratory)

    @property
    def sentence(self) -> str:
        """The verdict with its numbers, e.g. "Supported: +5.64 bits per token (95% +5.10 to +6.18; at least +1 claimed;
        3 seeds; Holm's p 0.002)."."""
        head = self.text[0].upper() + self.text[1:]
        if not self.differences:
            return f"{head}."
        mean, _, rest = self.change.partition(" (")
        n, effect = len(self.seeds), self.contrast.effect
        bound = ("more than", "less than") if self.contrast.keeps else ("at most", "at least")
        parts = [f"95% {rest.rstrip(')')}"] if rest else []
        parts += [f"{bound[effect > 0]} {effect:+g} claimed", f"{n} seed{'s' * (n != 1)}"]
        parts += [f"Holm's p {self.correction}"] if self.correction else []
        return f"{head}: {mean} {self.metric.change_unit} ({'; '.join(parts)})."

    def _signed(self, value: float) -> str:
        return f"{value:+.{self.metric.change_digits}f}"


def verdict_text(word: str, uncorrected: str, reason: str, exploratory: str) -> str:
    """A verdict as it stands in tables: the word, why it is inconclusive, the uncorrected word where it is another, and
    why the claim is exploratory."""
    notes = ([f"uncorrected: {uncorrected}"] if uncorrected != word else []) + (
        [f"exploratory: {exploratory}"] if exploratory else []
    )
    return word + (f": {reason}" if reason else "") + (f" ({'; '.join(notes)})" if notes else "")


def verdicts(ablation: Ablation, rows: pd.DataFrame) -> list[Verdict]:
    """Verdicts on the claims of an ablation, which are one family, by its rows."""
    claims, registered = (*ablation.contrasts, *ablation.shown_elsewhere), registration.dates()
    tables = [paired_differences(rows, claim.without, claim.with_, (claim.outcome,)) for claim in claims]
    obstacles = [_obstacle(claim, rows, len(table)) for claim, table in zip(claims, tables, strict=True)]
    tests = [
        (math.nan, math.nan) if obstacle else _tests(claim, table[claim.outcome].to_numpy())
        for claim, table, obstacle in zip(claims, tables, obstacles, strict=True)
    ]
    corrected = _corrected(np.array(tests).reshape(-1, 2))
    judged = []
    for claim, table, obstacle, ps, holms in zip(claims, tables, obstacles, tests, corrected, strict=True):
        seeds = tuple(map(int, table["seed"]))
        notes = [registration.exploratory(ablation, claim, _of_pair(claim, rows, seeds), registered)]
        notes += [f"fewer than {MIN_SEEDS} seeds"] if 0 < len(seeds) < MIN_SEEDS else []
        differences = tuple(map(float, table[claim.outcome]))
        exploratory = "; ".join(filter(None, notes))
        unjudged = Verdict(claim, INCONCLUSIVE, INCONCLUSIVE, obstacle, exploratory, seeds, differences)
        judged.append(unjudged if obstacle else _decided(unjudged, rows, ps, holms))
    return judged[: len(ablation.contrasts)]


def _decided(verdict: Verdict, rows: pd.DataFrame, p: Sequence[float], corrected: Sequence[float]) -> Verdict:
    """The verdict with its words, by p against the threshold and against zero, and both corrected."""
    claim = verdict.contrast
    mean, size = float(np.mean(verdict.differences)) * math.copysign(1, claim.effect), abs(claim.effect)
    raw, word = (str(words(mean, size, each[0], each[1], claim.keeps)) for each in (p, corrected))
    if no_room := _no_room(claim, rows):
        raw, word = (INCONCLUSIVE if each == SMALLER else each for each in (raw, word))
    reason = no_room or (HOLDS if raw == INCONCLUSIVE else "")
    return replace(
        verdict,
        word=word,
        uncorrected=raw,
        reason=reason if word == INCONCLUSIVE else "",
        p=float(p[0]),
        holm=float(corrected[0]),
    )


def _tests(claim: Contrast, differences_S: NDArray[np.float64]) -> tuple[float, float]:
    """p against the threshold, and against zero."""
    signed_S = differences_S * math.copysign(1, claim.effect)
    return float(p_value(signed_S, abs(claim.effect))), float(p_value(signed_S, 0.0))


def _corrected(tests: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's p, a column each; claims without a test are not of the family."""
    corrected, tested = tests.copy(), ~np.isnan(tests[:, 0])
    corrected[tested] = holm(tests[tested].T).T
    return corrected


def _of_pair(contrast: Contrast, rows: pd.DataFrame, seeds: tuple[int, ...]) -> pd.DataFrame:
    """The rows that a claim is judged by."""
    arms = rows["arm"].isin([contrast.without, contrast.with_])
    return rows[arms & (rows["status"] == "ok") & rows["seed"].isin(seeds)]


def _obstacle(contrast: Contrast, rows: pd.DataFrame, pairs: int) -> str:
    """The reason why there is no interval: a lost run, no finished pair, too few; empty if there is one."""
    pair = rows[rows["arm"].isin([contrast.without, contrast.with_])]
    if (lost := pair[pair["status"].isin(LOST)]).size:
        return f"no result of {', '.join(f'{row.arm} seed {row.seed} ({row.status})' for row in lost.itertuples())}"
    if pairs:
        return "" if pairs >= MIN_SEEDS else FEW[pairs]
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
