"""Every claim there is and what the rows of a study say of it: those of the paper, tested or not, and this study's own
questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pandas as pd

from experiments.ablations import ABLATIONS, Ablation
from experiments.analysis.verdicts import INCONCLUSIVE, WORDS, Verdict, verdict_text, verdicts
from experiments.study import Study

SIZES = {
    "codebook_size": ("K = ", ""),
    "code_dim": ("D = ", ""),
    "config.tokenizer.steps": ("tokenizers of ", " steps"),
    "config.model.depth": ("depth ", ""),
    "config.steps": ("", " steps"),
}
"""Words of a scale around the values of rows, by their columns, where they have them."""
CHANGE = "mean change (95%)"
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Claim:
    """A claim and its verdict, in words that stand in a table.

    Args:
        sentence: what is claimed.
        paper: where the paper makes it and what it reports there; empty: this study's own question.
        word: one of WORDS, corrected for the family of claims.
        uncorrected: the word of the interval alone.
        reason: why it is inconclusive; empty otherwise.
        exploratory: why it was not stated beforehand, or that its seeds are too few; empty: neither.
        claimed: the threshold that was stated; empty where nothing here tests the claim.
        change: the mean difference with its interval; empty while no pair of runs is finished.
        holm: Holm's p; empty where there is no test.
        seeds: those that both arms have finished.
        scale: preset, data, codes, dimension and steps of the compared runs.
        ablation: what tests it, None where nothing does.
        arms: the letters of the compared arms.
    """

    sentence: str
    paper: str
    word: str = INCONCLUSIVE
    uncorrected: str = INCONCLUSIVE
    reason: str = ""
    exploratory: str = ""
    claimed: str = ""
    change: str = ""
    holm: str = ""
    seeds: tuple[int, ...] = ()
    scale: str = ""
    ablation: Ablation | None = None
    arms: str = ""


UNTESTED = (
    Claim(
        "The tokenizers reach an rFID of 2.24 with 1,024 codes, down to 1.00 with 262,144.",
        "Table 1: ImageNet 256×256, 50,000 validation images, D = 256",
        reason="needs ImageNet and Inception's weights",
    ),
    Claim(
        "Index backpropagation carries a gradient to all codes, where VQ reaches the selected ones.",
        "figure of gradient flow",
        reason="seen in the figures of gradient reach, but no threshold was stated beforehand",
    ),
    Claim(
        "IBQ's transformers compare well with DiT, LlamaGen, VAR and MAR.",
        "Table 7: gFID of IBQ 2.88 (B), 2.45 (L), 2.14 (XL), 2.05 (XXL); of the others no number is known here",
        reason="needs ImageNet, Inception's weights and those models",
    ),
)
"""Claims of the paper that nothing here can test yet."""


def claims(study: Study, rows: pd.DataFrame) -> list[Claim]:
    """Every claim of every ablation, with or without rows, in the order of the ablations; then the paper's claims that
    nothing tests.

    An ablation on request counts where it has rows. A grid, which claims nothing and has rows of its own, has none.
    """
    if study.grid:
        return []
    trained = set(rows[rows["status"] == "ok"]["ablation"])
    wanted = [ablation for name, ablation in ABLATIONS.items() if name in trained or not ablation.on_request]
    judged = [claim for ablation in wanted for claim in claims_of(study, ablation, rows)]
    return [*judged, *UNTESTED]


def claims_of(study: Study, ablation: Ablation, rows: pd.DataFrame) -> list[Claim]:
    """The claims of one ablation, judged by its rows alone."""
    mine = rows[rows["ablation"] == ablation.name]
    return [_judged(study, ablation, verdict, mine) for verdict in verdicts(ablation, mine)]


def _judged(study: Study, ablation: Ablation, judged: Verdict, rows: pd.DataFrame) -> Claim:
    contrast = judged.contrast
    return Claim(
        sentence=contrast.claim,
        paper=contrast.paper,
        word=judged.word,
        uncorrected=judged.uncorrected,
        reason=judged.reason,
        exploratory=judged.exploratory,
        claimed=judged.claimed,
        change=judged.change,
        holm=judged.correction,
        seeds=judged.seeds,
        scale=scale(
            study, rows[rows["arm"].isin([contrast.without, contrast.with_]) & rows["seed"].isin(judged.seeds)]
        ),
        ablation=ablation,
        arms=f"{ablation.letter(contrast.without)}→{ablation.letter(contrast.with_)}",
    )


def scale(study: Study, rows: pd.DataFrame) -> str:
    """At which scale rows were made, e.g. "quick: fashion-mnist 32×32, K = 1,024, D = 64, 300 steps"; empty without a
    finished row. Of transformers the steps are theirs, with their depth and the steps of their tokenizers before
    them."""
    finished = rows[rows["status"] == "ok"]
    if finished.empty:
        return ""
    known = finished.dropna(axis=1)
    sizes = {name: " and ".join(f"{int(n):,}" for n in sorted(known[name].unique())) for name in SIZES if name in known}
    data = [
        f"{name} {int(size)}×{int(size)}"
        for name, size in _pairs(finished, "config.data.name", "config.data.resolution")
    ]
    parts = [f"{before}{sizes[name]}{after}" for name, (before, after) in SIZES.items() if name in sizes]
    return f"{study.preset_name}: {', '.join([*data, *parts])}"


def _pairs(rows: pd.DataFrame, one: str, other: str) -> list[tuple]:
    return list(rows[[one, other]].drop_duplicates().itertuples(index=False, name=None))


def table(of: list[Claim]) -> pd.DataFrame:
    """Claims as data: what is claimed, where in the paper if it is there, threshold, change and verdict, at which
    scale."""
    lines = []
    for claim in of:
        lines.append(
            {
                "claim": claim.sentence,
                "in the paper": claim.paper,
                "claimed": claim.claimed or "–",
                CHANGE: claim.change or ("nothing yet" if claim.ablation else "–"),
                "seeds": ", ".join(map(str, claim.seeds)),
                "Holm's p": claim.holm,
                "verdict": verdict_text(claim.word, claim.uncorrected, claim.reason, claim.exploratory),
                "scale": claim.scale or "–",
                "ablation": f"{claim.ablation.name} {claim.arms}" if claim.ablation else "none",
            }
        )
    table = pd.DataFrame(lines)
    return table if any(claim.paper for claim in of) else table.drop(columns="in the paper", errors="ignore")


def count(of: list[Claim]) -> str:
    """Number of claims of each verdict, in words, e.g. "four claims: one supported, none smaller than claimed, none
    contradicted, three inconclusive"."""
    counts = Counter(claim.word for claim in of)
    parts = ", ".join(f"{_number(counts[word])} {word}" for word in WORDS)
    exploratory = sum(bool(claim.exploratory) for claim in of)
    of_these = f"; {_number(exploratory)} of them exploratory" if exploratory else ""
    return f"{_number(len(of))} {'claim' if len(of) == 1 else 'claims'}: {parts}{of_these}"


def _number(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else str(n)
