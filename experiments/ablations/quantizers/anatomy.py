"""Necessary and sufficient parts of a method, by the threshold that `ANATOMY` states beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.ablations import Ablation
from experiments.analysis.codebooks import Codebook, codebook_of
from experiments.analysis.verdicts import MIN_SEEDS


@dataclass(frozen=True)
class Part:
    """A part of a method: the arm that lacks it alone, and the arm that has it alone, each None where there is no such
    thing."""

    name: str
    removed: str | None
    alone: str | None


@dataclass(frozen=True)
class Anatomy:
    """Parts of a method.

    Stated before the numbers: a codebook whose perplexity is below `collapse` times K has collapsed, and so has one
    whose run did not stay finite. A part is necessary if `whole` without it collapses, and sufficient if `bare`, which
    collapses, does not once it has this part.
    """

    whole: str
    bare: str
    parts: tuple[Part, ...]
    collapse: float


ANATOMY = Anatomy(
    whole="ibq",
    bare="vq",
    collapse=0.1,
    parts=(
        Part("entropy penalty", removed="ibq_no_entropy", alone="vq_entropy"),
        Part("double term", removed="ibq_single", alone=None),
        Part("initialisation from N(0, 1)", removed="ibq_uniform", alone="vq_normal"),
        Part("0.25 on the codebook term", removed="ibq_commitment", alone=None),
        Part("search, logits and gradient of IBQ", removed=None, alone="ibq_bare"),
        Part("gradient of z_q to codes that were not selected", removed="ibq_features_path", alone=None),
        Part("soft path to the features", removed="ibq_codes_path", alone=None),
        Part("all codes in the softmax", removed="ibq_top_8", alone=None),
        Part("logits as large as they are", removed="ibq_scaled", alone=None),
        Part("features and codes of any length", removed="ibq_normalised", alone=None),
    ),
)


@dataclass(frozen=True)
class PartVerdict:
    """Verdict of the rows on one part; None where they cannot say it."""

    name: str
    removed: Codebook | None
    alone: Codebook | None
    necessary: bool | None
    sufficient: bool | None


def part_verdicts(rows: pd.DataFrame) -> list[PartVerdict]:
    """Necessary: the whole lives and collapses without the part. Sufficient: the bare method has collapsed and lives
    with the part."""
    whole, bare = (codebook_of(rows, arm, ANATOMY.collapse) for arm in (ANATOMY.whole, ANATOMY.bare))
    verdicts = []
    for part in ANATOMY.parts:
        removed, alone = (
            None if arm is None else codebook_of(rows, arm, ANATOMY.collapse) for arm in (part.removed, part.alone)
        )
        necessary = not removed.alive if whole.alive and removed and removed.alive is not None else None
        sufficient = alone.alive if bare.alive is False and alone and alone.alive is not None else None
        verdicts.append(PartVerdict(part.name, removed, alone, necessary, sufficient))
    return verdicts


def parts_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Every part: the arm without it and the arm with it alone, their perplexity over K, and the two verdicts."""
    lines = []
    for judged in part_verdicts(rows):
        line = {"part": judged.name}
        for heading, book, word, verdict in (
            ("without it", judged.removed, "necessary", judged.necessary),
            ("alone", judged.alone, "sufficient", judged.sufficient),
        ):
            line[heading] = f"{ablation.letter(book.arm)} {book.arm}" if book else "no such arm"
            line[f"perplexity / K %, {heading}"] = f"{100 * book.share:.1f}" if book and book.seeds else ""
            line[word] = {True: "yes", False: "no", None: "inconclusive" if book else ""}[verdict]
        lines.append(line)
    return pd.DataFrame(lines)


def sentences(rows: pd.DataFrame) -> list[str]:
    """The verdicts in words, beginning with the threshold and with whether whole and bare are what they should be."""
    whole, bare = (codebook_of(rows, arm, ANATOMY.collapse) for arm in (ANATOMY.whole, ANATOMY.bare))
    state = {True: "lives", False: "has collapsed", None: "is inconclusive"}
    seeds = min(whole.seeds, bare.seeds)
    caution = "" if seeds >= MIN_SEEDS else f" With {seeds} seed{'s' * (seeds != 1)} all of this is exploratory."
    said = [
        f"A codebook has collapsed if its perplexity is below {100 * ANATOMY.collapse:g}% of K or its run did not stay "
        f"finite: "
        f"{_named(whole)} {state[whole.alive]}, {_named(bare)} {state[bare.alive]}.{caution}"
    ]
    verdicts = part_verdicts(rows)
    removals = [(v.necessary, f"{v.name} ({_named(v.removed)})") for v in verdicts if v.removed]
    additions = [(v.sufficient, f"{v.name} ({_named(v.alone)})") for v in verdicts if v.alone]
    for word, judged, meaning, base in (
        ("necessary", removals, f"without it {ANATOMY.whole} collapses", ANATOMY.whole),
        ("sufficient", additions, f"with it alone {ANATOMY.bare} lives", ANATOMY.bare),
    ):
        for answer, phrase in (
            (True, f"{word.capitalize()}, since {meaning}"),
            (False, f"Not {word}"),
            (None, f"Inconclusive whether {word}"),
        ):
            if parts := [part for verdict, part in judged if verdict is answer]:
                said.append(f"{phrase} (at the learning rate of {base}): {'; '.join(parts)}.")
    return said


def _named(book: Codebook) -> str:
    if not book.seeds:
        return f"{book.arm} without a result"
    lost = f"{book.diverged} of {book.seeds} seeds not finite"
    if book.diverged == book.seeds:
        return f"{book.arm}, {lost}"
    return f"{book.arm} at {100 * book.share:.1f}%" + (f", {lost}" if book.diverged else "")
