"""A map of collapse in words and tables: where the border passes, what lies on either side, which remedies work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd

from experiments.ablations import Ablation, Arm
from experiments.ablations.collapse_atlas.arms import RATES
from experiments.ablations.collapse_atlas.bisection import COLLAPSE
from experiments.ablations.collapse_atlas.remedies import TRIED
from experiments.analysis.codebooks import Codebook, codebook_of
from ibq.evaluation.diagnosis import LARGEST
from ibq.metrics import METRICS

PAPER_SIZE, PAPER_DIMENSION, PAPER_RATE = 16384, "256", 1e-4
"""Setting in which the paper trains IBQ."""
STATES = {True: "lives", False: "collapsed", None: "inconclusive"}


class Line(NamedTuple):
    """Arms that differ in one factor alone, in the order of its levels."""

    factor: str
    arms: tuple[Arm, ...]


def left_out(ablation: Ablation, rows: pd.DataFrame) -> dict[str, bool]:
    """Arms that these rows do not have; True where neighbours agree, so that the map knows their state, False where
    there was no room. As seed 0 has it, which decided (`experiments.ablations.collapse_atlas.bisection`)."""
    present, rows = set(rows["arm"]), rows[rows["seed"] == 0]
    absent: dict[str, bool] = {}
    for arm in ablation.arms:
        if arm.name not in present:
            states = {known_state(ablation, rows, name, absent) for name in arm.between or ()}
            absent[arm.name] = len(states) == 1 and None not in states
    return absent


def known_state(ablation: Ablation, rows: pd.DataFrame, arm: str, absent: Mapping[str, bool]) -> bool | None:
    """State of an arm's codebook, True where it lives: by its rows, or, where it was left out between neighbours that
    agree, by theirs; None: not known."""
    if arm in absent:
        between = ablation.arm(arm).between
        return known_state(ablation, rows, between[0], absent) if absent[arm] and between else None
    return codebook_of(rows, arm, COLLAPSE).alive


def usual(ablation: Ablation, *others: str) -> dict[str, str]:
    """The level of each factor beside `others` that most arms have."""
    names = [factor.name for factor in ablation.factors if factor.name not in others]
    return {name: pd.Series([arm.levels[name] for arm in ablation.arms]).mode()[0] for name in names}


def on_map(ablation: Ablation, method: str) -> dict[tuple[str, str], Arm]:
    """The arms of one method's map of rate and D, by these two."""
    base = usual(ablation, "method", "rate", "D") | {"method": method}
    return {(arm.levels["rate"], arm.levels["D"]): arm for arm in ablation.arms if base.items() <= arm.levels.items()}


def lines(ablation: Ablation, factor: str) -> list[Line]:
    """The lines of arms along a factor that have at least two of its levels."""
    sets: dict[tuple[str, ...], list[Arm]] = {}
    for arm in ablation.arms:
        sets.setdefault(tuple(level for name, level in arm.levels.items() if name != factor), []).append(arm)
    order = ablation.factor(factor).levels
    ordered = [sorted(arms, key=lambda arm: order.index(arm.levels[factor])) for arms in sets.values() if len(arms) > 1]
    return [Line(factor, tuple(arms)) for arms in ordered]


def rates_of(ablation: Ablation, rows: pd.DataFrame) -> dict[str, float]:
    """The learning rate of each level; where no row has it, by the level's multiple of one that some row has."""
    known = {str(level): float(mine["config.optim.lr"].iloc[0]) for level, mine in rows.groupby("factor.rate")}
    factors = dict(RATES.values())
    level, rate = next(iter(known.items()))
    return {each: known.get(each, rate * factor / factors[level]) for each, factor in factors.items()}


def paper_in_words(ablation: Ablation, rows: pd.DataFrame) -> str:
    """The paper's setting, and where it lies from the nearest cell of the map."""
    rates = sorted(rates_of(ablation, rows).values())
    where = (
        f"below the lowest rate ({rates[0]:g})" if rates[0] > PAPER_RATE else f"above the highest rate ({rates[-1]:g})"
    )
    where = "among its rates" if rates[0] <= PAPER_RATE <= rates[-1] else where
    K = int(rows[rows["factor.K"] == "×1"]["codebook_size"].iloc[0])
    codes = "as many codes" if K == PAPER_SIZE else f"{PAPER_SIZE / K:g} times the codes"
    return (
        f"the paper's setting (K = {PAPER_SIZE:,}, D = {PAPER_DIMENSION}, rate {PAPER_RATE:g}): {where}, with {codes}"
    )


def remedies_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Every remedy beside what it is for: the codebook, reconstruction, how decisive assignments were first and last,
    and the diagnosis."""
    table = []
    for remedy in TRIED:
        mine = rows[rows["arm"] == remedy.arm]
        done = mine[mine["status"] == "ok"]
        book = codebook_of(rows, remedy.arm, COLLAPSE)
        line = {"of": remedy.case, "what was done": remedy.what, "arm": f"{ablation.letter(remedy.arm)} {remedy.arm}"}
        if not book.seeds:
            line["codebook"] = "/".join(sorted(set(mine["status"]))) or "not in this study"
            table.append(line)
            continue
        line["codebook"] = STATES[book.alive]
        for metric in (METRICS[name] for name in ("share", "usage", "l1", "fid")):
            line[metric.heading] = _mean(done, metric.column, metric.digits, metric.scale)
        for metric in (METRICS[name] for name in ("logit_spread", "max_probability")):
            first = metric.column.replace("last.", "first.")
            ends = (_mean(done, column, metric.digits) for column in (first, metric.column))
            line[f"{metric.label}, first → last"] = " → ".join(ends)
        if "diagnosis" in done and done["diagnosis"].notna().any():
            line["diagnosis"] = "; ".join(map(str, done["diagnosis"].dropna().unique()))
        table.append(line)
    return pd.DataFrame(table).fillna("")


def sentences(ablation: Ablation, rows: pd.DataFrame) -> list[str]:
    """Sentences on the map: how much has collapsed, where the border of each method passes, what quality says, what
    happens along the other axes, and which remedies work."""
    books = {name: codebook_of(rows, name, COLLAPSE) for name in rows["arm"].unique()}
    finished = {name: book for name, book in books.items() if book.seeds}
    if not finished:
        return []
    said = [_of_all(ablation, rows, finished), _sentence(paper_in_words(ablation, rows))]
    said += [sentence for method in ablation.factors[0].levels if (sentence := _of_method(ablation, finished, method))]
    said += _of_quality(rows, finished)
    for factor in ("K", "tokens a mean", "initial length"):
        said += [_of_line(line, finished) for line in lines(ablation, factor) if _known(line.arms, finished) > 1]
    return said + _of_saturation(rows, finished) + _of_remedies(rows, finished)


def _of_all(ablation: Ablation, rows: pd.DataFrame, finished: Mapping[str, Codebook]) -> str:
    collapsed = sum(book.alive is False for book in finished.values())
    absent = left_out(ablation, rows)
    agreeing, beyond = sum(absent.values()), sum(not agrees for agrees in absent.values())
    sentence = (
        f"A codebook has collapsed if its perplexity is below {100 * COLLAPSE:g}% of K or its run "
        f"did not stay finite: "
        f"{collapsed} of {len(finished)} cells have."
    )
    if agreeing:
        cells = (
            "1 cell between agreeing neighbours was"
            if agreeing == 1
            else f"{agreeing} cells between agreeing neighbours were"
        )
        sentence += f" {cells} left out."
    return sentence + (f" For {beyond} more there was no room." if beyond else "")


def _of_method(ablation: Ablation, finished: Mapping[str, Codebook], method: str) -> str:
    """Places where one method lives and where it has collapsed, over rate and D."""
    points = {place: finished[arm.name] for place, arm in on_map(ablation, method).items() if arm.name in finished}
    if not points:
        return ""
    alive = {place: book for place, book in points.items() if book.alive}
    dead = {place: book for place, book in points.items() if book.alive is False}
    for word, side in (("has collapsed", dead), ("lives", alive)):
        if len(side) == len(points):
            return (
                f"{method}: {word} at every point of rate and D that was trained ({len(points)}; perplexity "
                f"{_range(points)} of K)."
            )
    unclear = {place: book for place, book in points.items() if book.alive is None}
    sides = (("has collapsed", dead), ("lives", alive), ("seeds disagree", unclear))
    return f"{method}: {'; '.join(f'{word} at {_places(side)}' for word, side in sides if side)}."


def _of_quality(rows: pd.DataFrame, finished: Mapping[str, Codebook]) -> list[str]:
    """The best on either side of the border, in both measures of quality."""
    done, said = rows[(rows["status"] == "ok") & rows["arm"].isin(list(finished))], []
    for name in ("l1", "fid"):
        column, label, digits = METRICS[name].column, METRICS[name].label, METRICS[name].digits
        if column not in done or done[column].isna().all():
            continue
        means = done.groupby("arm")[column].mean().dropna().sort_values(kind="stable")
        sides = [[name for name in means.index if finished[name].alive is side] for side in (True, False)]
        best = [f"{means[names[0]]:.{digits}f} ({names[0]})" for names in sides if names]
        if len(best) == 2:
            worse = sum(means[name] > means[sides[1][0]] for name in sides[0])
            said.append(
                f"{label} is lowest at {best[0]} among live codebooks and at {best[1]} among collapsed ones; {worse} "
                f"of {len(sides[0])} "
                f"live ones are worse than that."
            )
    return said


def _of_line(line: Line, finished: Mapping[str, Codebook]) -> str:
    """A line along one factor: perplexity over K at each level, and whether the border crosses it."""
    known = [arm for arm in line.arms if arm.name in finished]
    levels = known[0].levels
    along = ", ".join(f"{_percent(finished[arm.name])} at {arm.levels[line.factor]}" for arm in known)
    states = {finished[arm.name].alive for arm in known}
    crossing = "all live" if states == {True} else "all have collapsed" if states == {False} else "the border crosses"
    where = f"rate {levels['rate']}, D = {levels['D']}"
    where += f", {levels['remedy']}" if levels["remedy"] != "none" and line.factor != "remedy" else ""
    return f"Over {line.factor}, {levels['method']} ({where}) has a perplexity over K of {along}: {crossing}."


def _of_saturation(rows: pd.DataFrame, finished: Mapping[str, Codebook]) -> list[str]:
    """Numbers of IBQ's cells that have collapsed on either side of what `diagnose` calls saturated, when training was
    first logged."""
    if "first.max_probability" not in rows:
        return []
    first = rows[rows["method"] == "ibq"].groupby("arm")["first.max_probability"].mean().dropna()
    sides = [[name for name in first.index if bool(first[name] > LARGEST) is decisive] for decisive in (True, False)]
    counts = [f"{sum(finished[name].alive is False for name in names)} of {len(names)}" for names in sides]
    return [
        f"Of IBQ's cells, {counts[0]} whose largest probability was above {LARGEST:g} when training was first logged "
        f"have collapsed, and "
        f"{counts[1]} of the others."
    ]


def _of_remedies(rows: pd.DataFrame, finished: Mapping[str, Codebook]) -> list[str]:
    """Of each case how decisive assignments were, and which remedies bring the codebook back."""
    said = []
    for case in dict.fromkeys(remedy.case for remedy in TRIED):
        mine = [remedy for remedy in TRIED if remedy.case == case and remedy.arm in finished]
        tried = [remedy for remedy in mine if not remedy.reference]
        for reference in [remedy for remedy in mine if remedy.reference]:
            first, last = (
                _mean(rows[rows["arm"] == reference.arm], f"{end}.max_probability", 2) for end in ("first", "last")
            )
            said.append(
                f"{case}, {reference.what}: {STATES[finished[reference.arm].alive]} at "
                f"{_percent(finished[reference.arm])}; the largest "
                f"probability of an assignment was {first} when first logged and {last} at the end."
            )
        for state, word in ((True, "bring it back"), (False, "do not")):
            if names := [
                f"{remedy.what} ({_percent(finished[remedy.arm])})"
                for remedy in tried
                if finished[remedy.arm].alive is state
            ]:
                said.append(f"{case}: of what was tried at D = 256, these {word}: {'; '.join(names)}.")
    return said


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _known(arms: Iterable[Arm], finished: Mapping[str, Codebook]) -> int:
    return sum(arm.name in finished for arm in arms)


def _places(points: Mapping[tuple[str, str], Codebook]) -> str:
    """Points by D, e.g. "D = 16 (×0.3 2.1%, ×3 0.4%)"."""
    by_D: dict[str, list[str]] = {}
    for (rate, D), book in sorted(
        points.items(), key=lambda point: (int(point[0][1]), dict(RATES.values())[point[0][0]])
    ):
        by_D.setdefault(D, []).append(f"{rate} {_percent(book)}")
    return ", ".join(f"D = {D} ({', '.join(rates)})" for D, rates in by_D.items())


def _range(points: Mapping[tuple[str, str], Codebook]) -> str:
    shares = [100 * book.share for book in points.values() if not math.isnan(book.share)]
    if not shares:
        return "not finite"
    return f"{min(shares):.1f}%" if len(shares) == 1 else f"{min(shares):.1f} to {max(shares):.1f}%"


def _percent(book: Codebook) -> str:
    return "not finite" if math.isnan(book.share) else f"{100 * book.share:.1f}%"


def _mean(rows: pd.DataFrame, column: str, digits: int, scale: float = 1.0) -> str:
    """The mean over seeds, or that it was not measured."""
    if column not in rows or rows[column].isna().all():
        return "not measured"
    return f"{scale * rows[column].astype(float).mean():.{digits}f}"
