"""The finding of an ablation in words, computed from its rows: what carries the difference, and what fails."""

from __future__ import annotations

import pandas as pd

from experiments.ablations import Ablation
from experiments.ablations.collapse_atlas import collapse_map
from experiments.ablations.grid import BASE, numbers, varied
from experiments.ablations.quantizers import anatomy
from experiments.analysis import transformers
from experiments.analysis.effects import main_effects
from experiments.analysis.metrics import values
from experiments.analysis.verdicts import verdicts
from experiments.report.tables import chosen_value, searches
from experiments.rows import of_arms
from ibq.metrics import METRICS


def findings(ablation: Ablation, rows: pd.DataFrame) -> list[str]:
    """Sentences for the report and the notebook; with missing rows it says so first."""
    rows = of_arms(rows[rows["ablation"] == ablation.name])
    sentences = []
    lost_search = rows["status"].eq("nan") & (
        rows["search.arm"].notna() if "search.arm" in rows else False
    )  # a result of a search
    known = rows[~lost_search & rows["status"].ne("waiting")]
    counts = known["status"][known["status"] != "ok"].value_counts()
    if len(counts):
        states = ", ".join(f"{n} {state}" for state, n in counts.items())
        sentences.append(
            f"{counts.sum()} of {len(known)} runs have no result ({states}); what follows rests on the others."
        )
    waiting = rows[rows["status"] == "waiting"]
    untokenized = int(waiting["stage"].eq("transformer").sum()) if "stage" in waiting else 0
    if unplanned := len(waiting) - untokenized:
        sentences.append(ablation.adaptive.waiting(unplanned))
    if untokenized:
        sentences.append(
            "1 transformer waits for its tokenizer."
            if untokenized == 1
            else f"{untokenized} transformers wait for their tokenizers."
        )
    sentences += [f"{judged.contrast.claim} {judged.sentence}" for judged in verdicts(ablation, rows)]
    if "main_effects" in ablation.tables and not (table := main_effects(ablation, rows)).empty:
        sentences += _of_effects(table)
    if "grid" in ablation.tables:
        sentences += _of_grid(ablation, rows)
    if "search" in ablation.tables:
        sentences += _of_searches(rows)
    if "parts" in ablation.tables:
        sentences += anatomy.sentences(rows)
    if "remedies" in ablation.tables:
        sentences += collapse_map.sentences(ablation, rows)
    return sentences + transformers.sentences(ablation, rows)


def _of_grid(ablation: Ablation, rows: pd.DataFrame) -> list[str]:
    """The best and the worst point of the grid for each base, by the means over seeds, and a best one at an edge."""
    finished, sentences = rows[rows["status"] == "ok"], []
    for base in ablation.factors[0].levels:
        mine = finished[finished[f"factor.{BASE}"] == base]
        if mine["arm"].nunique() < 2:
            continue
        shares, errors = (
            values(mine, name).groupby(mine["arm"]).mean().sort_values(kind="stable") for name in ("share", "l1")
        )
        at = {arm: arm.removeprefix(base).strip() for arm in shares.index}
        (fewest, most), (best, worst) = ((means.index[0], means.index[-1]) for means in (shares, errors))
        sentences.append(
            f"{base}: perplexity / K is highest ({shares[most]:.1f}%) at {at[most]} and lowest ({shares[fewest]:.1f}%) "
            f"at {at[fewest]}; "
            f"L1 is lowest ({errors[best]:.4f}) at {at[best]} and highest ({errors[worst]:.4f}) at {at[worst]}."
        )
        inner = [field for field in varied(ablation) if len(field.levels) > 2 and numbers(field.levels)]
        edges = [
            field.name
            for field in inner
            if ablation.arm(best).levels[field.name] in (field.levels[0], field.levels[-1])
        ]
        if edges:
            sentences[-1] += (
                f" The lowest L1 lies at the edge of the grid in {' and '.join(edges)}, so perhaps not the best there "
                f"is."
            )
    if sentences:
        sentences.append(
            f"Nothing was claimed beforehand, so nothing here is a verdict; seeds an arm: {finished['seed'].nunique()}."
        )
    return sentences


def _of_searches(rows: pd.DataFrame) -> list[str]:
    """Choices of the searches, and where a choice at the edge of the grid says that the best value may lie beyond."""
    chosen = {arm: value for arm, search in searches(rows) if (value := chosen_value(search)) is not None}
    if not chosen:
        return []
    by_value = {value: [arm for arm in chosen if chosen[arm] == value] for value in sorted(set(chosen.values()))}
    said = "; ".join(f"{value:g} for {', '.join(arms)}" for value, arms in by_value.items())
    grid = rows["search.value"].dropna()
    edges = [arm for arm, value in chosen.items() if value in (grid.min(), grid.max())]
    return [
        f"The search chose {said}."
        + (f" At the edge of the grid, so perhaps not the best there is: {', '.join(edges)}." if edges else "")
    ]


def _of_effects(table: pd.DataFrame) -> list[str]:
    by_size = table.reindex(table["bits_mean"].abs().sort_values(ascending=False).index)
    ranking = "; ".join(
        f"{e['change']} {e['bits_mean']:+.2f} ({_range(e, 'bits', 2)})" for e in by_size.to_dict("records")
    )
    sentences = [f"Changes by the size of their mean effect on {METRICS['bits'].label} (range over pairs): {ranking}."]
    flips = [e["change"] for e in table.to_dict("records") if e["bits_min"] < -0.25 and e["bits_max"] > 0.25]
    if flips:
        sentences.append(
            f"These change their sign with the surroundings, so read the pairs and not the mean: {'; '.join(flips)}."
        )
    worse = [e for e in table.to_dict("records") if e["bits_mean"] > 0.25 and e["l1_mean"] > 0.001]
    if worse:
        named = "; ".join(f"{e['change']} ({e['bits_mean']:+.2f} bits, {e['l1_mean']:+.4f} L1)" for e in worse)
        sentences.append(f"More codes in use did not mean a lower error for: {named}.")
    quality = table.loc[table["l1_mean"].idxmin()]
    if quality["l1_mean"] < -0.001:
        sentences.append(
            f"What lowered the error most was {quality['change']}: {quality['l1_mean']:+.4f} L1 "
            f"({_range(dict(quality), 'l1', 4)})."
        )
    return sentences


def _range(effect: dict, outcome: str, digits: int) -> str:
    if effect["pairs"] == 1:
        return "one pair"
    return f"{effect[f'{outcome}_min']:+.{digits}f} to {effect[f'{outcome}_max']:+.{digits}f}"
