"""Diagnosis of a codebook from the history of a tokenizer's training, in words and with numbers: whether it has
collapsed, and of what.

Judged is what a run has come to by its last line, from the lines of history.jsonl alone; what a line lacks is not
judged. So the same words come from a live run, a finished one and one that was lost. Thresholds are constants, each
with its reason; the runs that the reasons speak
of are those of the study at quick: 171 tokenizers on Fashion-MNIST, 64 to 4,096 codes of 8 to 256 dimensions, 300 steps
    of 32 images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Cause = Literal["collapsed", "dimension", "entropy", "norms", "saturated", "gap", "never_used"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
"""The states first, then what brings them about, from what acts on all else to what is left when nothing else is
seen."""

COLLAPSED = 1 / 4
"""Perplexity over what as many uniform tokens would give: two bits a token are lost. 81 runs end below it and do not
rise; 84 end above .42, none of which would have been named at an earlier line; six lie between, rising or half alive,
and are not named."""
COLLAPSED_EARLY, EARLY, SETTLED = 1 / 16, 20, 100
"""A healthy codebook needs time: IBQ as released begins at .06 to .2 and passes 1/4 within 80 steps. Before SETTLED
steps only a loss of four bits counts, before EARLY ones nothing does. A run that quantizes late is as old as its
quantizer."""
WINDOW = 3
"""Lines whose median stands for a moment: one window of tokens more or less is noise."""
ENTROPY_PULL = 100.0
"""Gradient of the entropy penalty at the features over that of all other terms. With released weights healthy runs have
1 to 5 (VQ), 2 to 35 (IBQ) and 15 to 28 (LFQ, which lives on it). A hundred times the weight gives hundreds, and the
pictures come second."""
RUNAWAY, LONGER, STILL = 3.0, 2.0, 1.2
"""A norm runs away if it is RUNAWAY times what it was at its smallest, LONGER times that of the other side, and STILL
times what it was half the run ago. Features of healthy LFQ grow fourfold and codes of VQ from U(-1/K, 1/K) sevenfold,
but towards the other side."""
HEARD, LARGEST = 4.0, 0.5
"""A softmax is saturated if it hears of HEARD codes or fewer (exponential of its entropy), or its largest entry is
above LARGEST: as means over tokens, half of which then pass next to no gradient. Healthy IBQ has .01 to .05 there, and
hears of dozens."""
FOLLOWS = 1.5
"""Assignments that were saturated only so much later than the collapse, in steps, do not explain it: features that have
become one point are sure of their code."""
LEFT_BEHIND, WIDENED = 1.5, 2.0
"""Dead codes are left behind if their gap is LEFT_BEHIND times that of codes in use: 1.0 to 1.3 in healthy runs, where
both lie alike, and 2 to 20 in collapsed VQ. A gap has grown if it is WIDENED times what it was at its smallest."""
FLAT, NARROWER = 1 / 16, 1 / 2
"""Codes in use are flat if 99% of their variance lies in FLAT of the dimensions that they could span, as 4 of 64; or in
NARROWER of those that their features have. Healthy runs have 26 to 63 of 64, LFQ and FSQ all of theirs, and never fewer
than their features, 23 to 28. SimVQ at the preset's rate ends with 58% of its codes in use, in 5 dimensions where the
features have 17. Codebooks of 256 dimensions are reported with 3 to 5, cured with 17 to 19 (arXiv 2605.06870)."""
ENOUGH = 2
"""Codes in effect for each dimension of the features, before the two are compared: fewer span less by their number."""
NEVER_USED = 1 / 4
"""Share of the codes that no token ever chose, beyond those that uniform sampling would have left out so far."""

NOTHING_SEEN = "nothing seen"


@dataclass(frozen=True)
class Finding:
    """One thing that a history shows.

    Attributes:
        cause: one of CAUSES.
        step: since when.
        value: its number: perplexity over that of uniform tokens (collapsed), d_99 of the codes in use (dimension),
            pull (entropy), growth (norms), spread of the logits (saturated), gap of the dead codes over that of those
            in use, or growth of the gap (gap), codes (never_used).
        sentence: it in words, with its number.
        phrase: it in a few words, for `summary`.
    """

    cause: Cause
    step: int
    value: float
    sentence: str
    phrase: str


def diagnose(history: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Findings on a run's codebook from its history; an empty list if nothing is wrong.

    Args:
        history: lines of history.jsonl in their order, of a tokenizer (one of a transformer has nothing that is judged
            here); any columns may be absent, and values that are not finite numbers count as absent.

    Returns:
        If the codebook has collapsed, that first; then whether the codes in use span few dimensions. Then the causes,
        in the order of CAUSES, so that the first is the one to mend first; but assignments that were saturated only
        after the collapse come last. Dimension, entropy penalty and norms are judged in any case, the others only where
        they explain a collapse.
    """
    lines = _Lines(history)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # NaN passes no threshold
        collapse = _collapsed(lines)
        found = [collapse, _dimension(lines), _entropy(lines), _norms(lines)]
        if collapse:
            saturated, others = _saturated(lines), [_gap(lines), _never_used(lines)]
            followed = saturated is not None and lines.age(saturated.step) > FOLLOWS * lines.age(collapse.step)
            found += [*others, saturated] if followed else [saturated, *others]
    return [finding for finding in found if finding]


def summary(findings: Sequence[Finding]) -> str:
    """Findings as one phrase: "collapsed since step 40: dead codes left behind (gap 3.2 times that of used ones), 937
    codes never used"."""
    collapsed = [finding.phrase for finding in findings if finding.cause == "collapsed"]
    causes = [finding.phrase for finding in findings if finding.cause != "collapsed"]
    return ": ".join(part for part in (*collapsed, ", ".join(causes)) if part) or NOTHING_SEEN


class _Lines:
    """Lines of a history as columns of numbers, NaN where a line has none; of a run that quantizes late, those since it
    does, which are the first with a perplexity and all after it."""

    def __init__(self, history: Sequence[Mapping[str, Any]]) -> None:
        lines = [line for line in history if "step" in line]
        began = next((n for n, line in enumerate(lines) if math.isfinite(_number(line, "perplexity"))), 0)
        self._lines, self._began = lines[began:], int(lines[began - 1]["step"]) if began else 0
        self._columns: dict[str, NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name not in self._columns:
            column = np.fromiter((_number(line, name) for line in self._lines), np.float64, len(self))
            self._columns[name] = np.where(np.isfinite(column), column, np.nan)
        return self._columns[name]

    @cached_property
    def steps(self) -> list[int]:
        return [int(line["step"]) for line in self._lines]

    @cached_property
    def middle(self) -> int:
        """The line of half the last age, or the one before."""
        half = (self._began + self.steps[-1]) / 2
        return max(0, int(np.searchsorted(self.steps, half, side="right")) - 1)

    def age(self, step: int | None = None) -> int:
        """Steps with a quantizer until a step, by default the last one."""
        return (self.steps[-1] if step is None else step) - self._began

    def now(self, name: str) -> float:
        return float(self[name][-1]) if len(self) else np.nan

    def since(self, holds: NDArray[np.bool_]) -> int | None:
        """The step since which something has held without a break; None if it does not now."""
        if not len(holds) or not holds[-1]:
            return None
        breaks = np.flatnonzero(~holds)
        return self.steps[breaks[-1] + 1 if len(breaks) else 0]


def _number(line: Mapping[str, Any], name: str) -> float:
    value = line.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _smooth(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every line the median of it and those before, WINDOW of them."""
    padded = np.concatenate([np.full(WINDOW - 1, column[0] if len(column) else np.nan), column])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), axis=1) if len(column) else column


def _collapsed(lines: _Lines) -> Finding | None:
    """Few codes are in use, and it is not getting better: at its pace the run would not be alive when it is twice as
    old."""
    if len(lines) < WINDOW or lines.age() < EARLY:
        return None
    share = lines["perplexity"] / lines["uniform_perplexity"]
    smooth, limit = _smooth(share), COLLAPSED if lines.age() >= SETTLED else COLLAPSED_EARLY
    now = float(smooth[-1])
    if not now < limit or now * (now / smooth[lines.middle]) >= limit:
        return None
    alive = np.flatnonzero(share >= limit)
    peak = int(alive[-1]) if len(alive) else int(np.nanargmax(share))
    fallen = np.flatnonzero(share[peak:] < min(limit, share[peak] / 2))
    step = lines.steps[peak + fallen[0]] if len(fallen) else lines.steps[0]
    codes = "" if np.isnan(lines.now("codebook_size")) else f" of {lines.now('codebook_size'):,.0f} codes"
    dead = (
        ""
        if np.isnan(lines.now("dead_codes"))
        else f"; {lines.now('dead_codes'):,.0f} codes have no token in the last window"
    )
    return Finding(
        "collapsed",
        step,
        now,
        f"The codebook has collapsed since step {step}: perplexity {lines.now('perplexity'):.3g}{codes}, where as many "
        f"uniform tokens "
        f"would give {lines.now('uniform_perplexity'):,.0f}{dead}.",
        f"collapsed since step {step}",
    )


def _dimension(lines: _Lines) -> Finding | None:
    """Codes in use lie in few dimensions of the D: usage does not show it. Few codes cannot span more, and are not
    named for it."""
    if len(lines) < WINDOW or lines.age() < EARLY:
        return None
    used, features = _smooth(lines["dimension99_used"]), _smooth(lines["dimension99_features"])
    perplexity, D = _smooth(lines["perplexity"]), lines["code_dim"]
    flat = np.maximum(1, used) <= FLAT * np.minimum(D, perplexity - 1)
    step = lines.since(flat | ((used <= NARROWER * features) & (perplexity > ENOUGH * features)))
    if step is None or np.isnan(D[-1]):
        return None
    span, usage, could = used[-1], lines.now("usage"), min(D[-1], perplexity[-1] - 1)
    lead = "Codes in use span" if np.isnan(usage) else f"{usage:.0%} of the codes are in use, but they span"
    beside = "" if np.isnan(features[-1]) else f"; the features have {features[-1]:.0f}"
    remedy = "Codes that are learnt should begin as features, by k-means."
    if not span <= NARROWER * features[-1]:
        remedy = "More codes give no more: quantize later in the run, or give the encoder more channels."
    return Finding(
        "dimension",
        step,
        float(span),
        f"{lead} {span:.0f} of {D[-1]:.0f} dimensions since step {step} (99% of their variance), where a perplexity of "
        f"{perplexity[-1]:.3g} could span {could:.0f}{beside}. {remedy}",
        f"used codes span {span:.0f} of {D[-1]:.0f} dimensions",
    )


def _entropy(lines: _Lines) -> Finding | None:
    pull = _smooth(lines["entropy_pull"])
    step = lines.since(pull > ENTROPY_PULL)
    if step is None or len(lines) < WINDOW:
        return None
    return Finding(
        "entropy",
        step,
        float(pull[-1]),
        f"The entropy term dominates since step {step}: it pulls {pull[-1]:.3g} times as hard on the features as all "
        f"other terms together; "
        f"below {ENTROPY_PULL:g} is usual. Lower entropy_weight.",
        f"entropy term pulls {pull[-1]:.3g} times as hard as all others",
    )


def _norms(lines: _Lines) -> Finding | None:
    sides = {"features": _smooth(lines["feature_norm"]), "codes": _smooth(lines["code_norm"])}
    for (name, norm), (other_name, other) in zip(sides.items(), reversed(sides.items()), strict=True):
        if np.isnan(norm).all():
            continue
        smallest = int(np.nanargmin(norm))
        growth = norm[-1] / norm[smallest]
        if growth >= RUNAWAY and norm[-1] >= LONGER * other[-1] and norm[-1] >= STILL * norm[lines.middle]:
            step = lines.steps[smallest]
            return Finding(
                "norms",
                step,
                float(growth),
                f"The norm of the {name} runs away since step {step}: it has grown {growth:.3g}-fold, from "
                f"{norm[smallest]:.3g} to "
                f"{norm[-1]:.3g}, and that of the {other_name} is {other[-1]:.3g}. Lower the learning rate, or raise "
                f"the weight of the "
                "commitment term.",
                f"norm of the {name} runs away ({growth:.3g}-fold)",
            )
    return None


def _saturated(lines: _Lines) -> Finding | None:
    """Of methods whose gradient goes through a softmax of the logits; only they log its factor."""
    largest, heard, K = lines["max_probability"], np.exp(lines["assignment_entropy"]), lines["codebook_size"]
    step = lines.since(~np.isnan(lines["logit_scale"]) & ((heard <= np.minimum(HEARD, K / 8)) | (largest > LARGEST)))
    names = ("logit_spread", "logit_scale", "feature_norm", "code_norm", "code_dim")
    spread, scale, z, c, D = (lines.now(name) for name in names)
    if step is None or np.isnan(spread):
        return None
    said = [] if np.isnan(largest[-1]) else [f"the largest probability of a token is {largest[-1]:.2f}"]
    if not np.isnan(heard[-1] * K[-1]):
        said.append(f"{'so that it' if said else 'a token'} hears of {heard[-1]:.2g} of {K[-1]:,.0f} codes")
    said.append(f"as its logits spread by {spread:.3g}")
    given, remedy = "", "Shorter codes would lower it."
    if not np.isnan(z * c * D):
        given = (
            f"; logit_scale · |z| · |c| / sqrt(D) is {scale:.3g} · {z:.3g} · {c:.3g} / sqrt({D:.0f}) = "
            f"{scale * z * c / D**0.5:.3g}"
        )
        if (excess := scale * D**0.5) > 1.01:
            remedy = f"A logit_scale of 1/sqrt(D) would divide it by {excess:.3g}."
    return Finding(
        "saturated",
        step,
        spread,
        f"Assignments are saturated since step {step}: {', '.join(said)}{given}. {remedy}",
        f"assignments saturated (logits spread by {spread:.3g})",
    )


def _gap(lines: _Lines) -> Finding | None:
    gap, used, dead = (_smooth(lines[name]) for name in ("gap", "gap_used", "gap_dead"))
    if (step := lines.since(dead >= LEFT_BEHIND * used)) is not None:
        ratio = dead[-1] / used[-1]
        return Finding(
            "gap",
            step,
            float(ratio),
            f"Dead codes are left behind since step {step}: their gap to the features is {dead[-1]:.3g} times the "
            f"features' variance, "
            f"{ratio:.3g} times that of the codes in use ({used[-1]:.3g}). Codes that are learnt should begin as "
            f"features, or "
            "be restarted where they are dead.",
            f"dead codes left behind (gap {ratio:.3g} times that of used ones)",
        )
    if np.isnan(gap).all():
        return None
    smallest = int(np.nanargmin(gap))
    growth = gap[-1] / gap[smallest]
    if not growth >= WIDENED:
        return None
    step = lines.steps[smallest]
    return Finding(
        "gap",
        step,
        float(growth),
        f"The gap between features and codes grows since step {step}: {growth:.3g}-fold, from {gap[smallest]:.3g} to "
        f"{gap[-1]:.3g} times "
        "the features' variance.",
        f"gap grows ({growth:.3g}-fold)",
    )


def _never_used(lines: _Lines) -> Finding | None:
    never, K = lines["never_used"], lines.now("codebook_size")
    if not len(never) or np.isnan(never[-1]) or np.isnan(K):
        return None
    by_chance = K * np.exp(-np.nansum(lines["tokens"]) / K)
    if never[-1] - by_chance < NEVER_USED * K:
        return None
    step = lines.since(never <= never[-1])
    assert step is not None
    reach = lines.now("reach_effective")
    reached = "" if np.isnan(reach) else f"; the gradient reaches {reach:.3g} codes, in effect"
    return Finding(
        "never_used",
        step,
        float(never[-1]),
        f"{never[-1]:,.0f} of {K:,.0f} codes have never had a token, as many as at step {step}{reached}.",
        f"{never[-1]:,.0f} codes never used",
    )
