"""Which parts of a method are necessary and which sufficient, by the threshold that an ablation states beforehand
(`Anatomy`)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.ablations import Ablation, Anatomy, Border
from experiments.analysis.effects import MIN_SEEDS


@dataclass(frozen=True)
class Codebook:
    """The state of an arm's codebook over its finished seeds; `alive` is None where they disagree or there is none.

    A seed that did not stay finite counts as collapsed; `share` is the mean perplexity over K of the others.
    """

    arm: str
    share: float
    alive: bool | None
    seeds: int
    diverged: int


@dataclass(frozen=True)
class PartVerdict:
    """What the rows say of one part; None where they cannot say it."""

    name: str
    removed: Codebook | None
    alone: Codebook | None
    necessary: bool | None
    sufficient: bool | None


def codebook_of(anatomy: Anatomy | Border, rows: pd.DataFrame, arm: str) -> Codebook:
    mine = rows[rows["arm"] == arm]
    finished = mine[mine["status"] == "ok"]
    shares = [] if finished.empty else finished["perplexity_share"].astype(float).tolist()
    diverged = int((mine["status"] == "nan").sum())
    alive = {share >= anatomy.collapse for share in shares} | ({False} if diverged else set())
    mean = sum(shares) / len(shares) if shares else float("nan")
    return Codebook(arm, mean, alive.pop() if len(alive) == 1 else None, len(shares) + diverged, diverged)


def part_verdicts(anatomy: Anatomy, rows: pd.DataFrame) -> list[PartVerdict]:
    """Necessary: the whole lives and collapses without the part. Sufficient: the bare method has collapsed and lives
    with the part."""
    whole, bare = (codebook_of(anatomy, rows, arm) for arm in (anatomy.whole, anatomy.bare))
    verdicts = []
    for part in anatomy.parts:
        removed, alone = (
            None if arm is None else codebook_of(anatomy, rows, arm) for arm in (part.removed, part.alone)
        )
        necessary = not removed.alive if whole.alive and removed and removed.alive is not None else None
        sufficient = alone.alive if bare.alive is False and alone and alone.alive is not None else None
        verdicts.append(PartVerdict(part.name, removed, alone, necessary, sufficient))
    return verdicts


def parts_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Every part: the arm without it and the arm with it alone, their perplexity over K, and the two verdicts."""
    if ablation.anatomy is None:
        return pd.DataFrame()
    lines = []
    for judged in part_verdicts(ablation.anatomy, rows):
        line = {"part": judged.name}
        for heading, book, word, verdict in (
            ("without it", judged.removed, "necessary", judged.necessary),
            ("alone", judged.alone, "sufficient", judged.sufficient),
        ):
            line[heading] = f"{ablation.letter(book.arm)} {book.arm}" if book else "no such arm"
            line[f"perplexity / K %, {heading}"] = f"{100 * book.share:.1f}" if book and book.seeds else ""
            line[word] = {True: "yes", False: "no", None: "undecided" if book else ""}[verdict]
        lines.append(line)
    return pd.DataFrame(lines)


def sentences(ablation: Ablation, rows: pd.DataFrame) -> list[str]:
    """The verdicts in words, beginning with the threshold and with whether whole and bare are what they should be."""
    anatomy = ablation.anatomy
    if anatomy is None:
        return []
    whole, bare = (codebook_of(anatomy, rows, arm) for arm in (anatomy.whole, anatomy.bare))
    state = {True: "lives", False: "has collapsed", None: "is undecided"}
    seeds = min(whole.seeds, bare.seeds)
    caution = "" if seeds >= MIN_SEEDS else f" With {seeds} seed{'s' * (seeds != 1)} all of this is at most consistent."
    said = [
        f"A codebook has collapsed if its perplexity is below {100 * anatomy.collapse:g}% of K or its run did not stay "
        f"finite: "
        f"{_named(whole)} {state[whole.alive]}, {_named(bare)} {state[bare.alive]}.{caution}"
    ]
    verdicts = part_verdicts(anatomy, rows)
    removals = [(v.necessary, f"{v.name} ({_named(v.removed)})") for v in verdicts if v.removed]
    additions = [(v.sufficient, f"{v.name} ({_named(v.alone)})") for v in verdicts if v.alone]
    for word, judged, meaning, base in (
        ("necessary", removals, f"without it {anatomy.whole} collapses", anatomy.whole),
        ("sufficient", additions, f"with it alone {anatomy.bare} lives", anatomy.bare),
    ):
        for answer, phrase in (
            (True, f"{word.capitalize()}, since {meaning}"),
            (False, f"Not {word}"),
            (None, f"Undecided whether {word}"),
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
