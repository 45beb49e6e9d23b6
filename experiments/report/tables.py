"""Tables of an ablation as data, and as Markdown and CSV; as LaTeX in `latex`."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd

from experiments.ablations import Ablation, PaperRow
from experiments.ablations.collapse_atlas.collapse_map import remedies_table
from experiments.ablations.grid import BASE, GRID_COLUMNS, strips, varied
from experiments.ablations.quantizers import tuning
from experiments.ablations.quantizers.anatomy import parts_table
from experiments.analysis.claims import CHANGE
from experiments.analysis.effects import RATE_AND_DISTORTION, main_effects
from experiments.analysis.metrics import in_words, measured
from experiments.analysis.verdicts import verdicts
from experiments.report.latex import latex, one_line
from experiments.rows import of_arms
from ibq.metrics import METRICS

NOT_REPORTED = "not reported"
PAPER_COLUMNS = {"rFID": ".2f", "usage %": "g", "gFID": ".2f", "IS": ".2f"}
"""Formats of the numbers of the paper's rows."""


def arms_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Every arm: letter, levels, seeds, and each column's mean over seeds (± sample standard deviation where there are
    several)."""
    columns = [name for name in ablation.columns if not METRICS[name].optional or measured(rows, name)]
    lines = []
    for arm in ablation.arms:
        mine = rows[rows["arm"] == arm.name]
        if mine.empty:  # larger than the preset's largest codebook
            continue
        finished = mine[mine["status"] == "ok"]
        line: dict[str, object] = {"": ablation.letter(arm.name), "arm": arm.name, **arm.levels}
        if finished.empty:
            line |= {"seeds": "0"} | {METRICS[name].heading: _state(mine) for name in columns}
        else:
            lost = mine[mine["status"] != "ok"]
            line["seeds"] = str(len(finished)) + ("" if lost.empty else f" of {len(mine)} ({_state(lost)})")
            line |= {METRICS[name].heading: in_words(finished, name) for name in columns}
        lines.append(line)
    return pd.DataFrame(lines)


def _state(rows: pd.DataFrame) -> str:
    return "/".join(sorted(set(rows["status"]))) or "not in this study"


def effects_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Main effect of each change of a factor: mean over matched pairs, and the range of the pairs."""
    table = main_effects(ablation, rows)
    lines = []
    for effect in table.to_dict("records"):
        line = {"change": effect["change"], "matched pairs": effect["pairs"]}
        for outcome in RATE_AND_DISTORTION:
            label, digits = METRICS[outcome].change, METRICS[outcome].change_digits
            mean, least, greatest = (effect[f"{outcome}_{part}"] for part in ("mean", "min", "max"))
            spread = "one pair" if effect["pairs"] == 1 else f"{least:+.{digits}f} to {greatest:+.{digits}f}"
            line |= {label: f"{mean:+.{digits}f}", f"{label}, range": spread}
        lines.append(line)
    return pd.DataFrame(lines)


def verdicts_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Each claim with its threshold, the change that came out with its interval, and the verdict."""
    lines = []
    for judged in verdicts(ablation, rows):
        contrast = judged.contrast
        lines.append(
            {
                "claim": contrast.claim,
                "arms": f"{ablation.letter(contrast.without)}→{ablation.letter(contrast.with_)}",
                "claimed": judged.claimed,
                CHANGE: judged.change or "nothing yet",
                "seeds": str(len(judged.seeds)),
                "Holm's p": judged.correction,
                "verdict": judged.text,
            }
        )
    return pd.DataFrame(lines)


def paper_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows as reported, each beside the arm that comes closest; other data, size and metrics, so only
    directions compare."""
    lines = []
    for row in ablation.paper_rows:
        line = {"paper": row.method} | {f"{name} (paper)": _reported(row, name) for name in ablation.paper_columns}
        mine = rows[rows["arm"] == row.arm]
        finished = mine[mine["status"] == "ok"]
        if row.arm is None:
            line["closest arm"] = "none"
        else:
            line["closest arm"] = f"{ablation.letter(row.arm)} {row.arm}"
            first = METRICS[ablation.beside_paper[0]].heading
            line |= {first: _state(mine)} if finished.empty else {"seeds": str(len(finished))}
        if not finished.empty:
            line |= {METRICS[name].heading: in_words(finished, name) for name in ablation.beside_paper}
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _reported(row: PaperRow, column: str) -> str:
    return f"{row.reported[column]:{PAPER_COLUMNS[column]}}" if column in row.reported else NOT_REPORTED


def search_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """The search of every arm that has one: what decided at each value tried, the value that it chose, and who takes it
    over."""
    lines = []
    for arm, mine in searches(rows):
        line: dict[str, object] = {"": ablation.letter(arm), "arm": arm}
        for row in mine.to_dict("records"):
            line[f"{row['search.value']:g}"] = f"{row['search.loss']:.4f}" if row["status"] == "ok" else row["status"]
        chosen = chosen_value(mine)
        followers = ", ".join(ablation.letter(other.name) for other in ablation.arms if other.tuned_as == arm)
        lines.append(line | {"chosen": "not yet" if chosen is None else f"{chosen:g}", "also for": followers})
    return pd.DataFrame(lines)


def searches(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each arm's search by ascending value; none where nothing was searched."""
    if "search.arm" not in rows:
        return []
    of_searches = rows[rows["search.arm"].notna()].sort_values("search.value", kind="stable")
    return [(str(arm), of_searches[of_searches["search.arm"] == arm]) for arm in rows["search.arm"].dropna().unique()]


def chosen_value(search: pd.DataFrame) -> float | None:
    """The value that one arm's search chose, None while it goes on."""
    if "search.loss" not in search:
        return None
    losses = zip(search["search.value"], search["search.loss"], strict=True)
    return tuning.best({value: None if math.isnan(loss) else loss for value, loss in losses})


def grid_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """A grid of two fields or more: for every outcome, base and value of the fields beyond, the first field down and
    the second across."""
    down, *more = varied(ablation)
    if not more:
        return pd.DataFrame()
    across, *others = more
    outcomes = [name for name in GRID_COLUMNS if name != "fid" or measured(rows, name)]
    arms = arms_table(replace(ablation, columns=tuple(outcomes)), rows).set_index(
        [BASE, *(field.name for field in varied(ablation))]
    )
    lines = []
    for name, (base, *rest), level in product(outcomes, strips(ablation), down.levels):
        line = {"outcome": METRICS[name].heading, BASE: base} | {
            field.name: at for field, at in zip(others, rest, strict=True)
        }
        line |= {down.name: level}
        for column in across.levels:
            line[f"{across.name}={column}"] = arms.loc[(base, level, column, *rest), METRICS[name].heading]
        lines.append(line)
    return pd.DataFrame(lines)


TABLES = {
    "arms": (
        arms_table,
        "All arms: what they differ in, and what came out on the test split (the protocol stands below).",
    ),
    "main_effects": (
        effects_table,
        "Main effects: mean over pairs of arms that differ in nothing else, with the range of the pairs.",
    ),
    "verdicts": (
        verdicts_table,
        "Claims, and verdicts read off 95% intervals of the mean paired difference over seeds; p is against the "
        "threshold, by Holm's method over the claims of this table. A claim that was not registered before its runs "
        "began is exploratory.",
    ),
    "paper": (
        paper_table,
        "The paper's rows, each beside the arm that comes closest. Data, size and metrics differ, so only directions "
        "can be compared; rFID and gFID are not measured here.",
    ),
    "search": (search_table, f"The search before the comparison, the same for every arm. Rule: {tuning.RULE}."),
    "grid": (grid_table, "The grid outcome by outcome: mean over seeds, or the state of an arm that has no result."),
    "remedies": (
        remedies_table,
        "What mends a collapsed codebook: every remedy beside the case that it is for. Logit spread and largest "
        "probability are of the "
        "softmax at temperature 1 over a token's logits, when training was first and last logged.",
    ),
    "parts": (parts_table, "Is a part necessary, is it sufficient? The threshold was stated beforehand."),
}


def build(name: str, ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """One table by name, from the rows of this ablation; empty while it has nothing to say."""
    return TABLES[name][0](ablation, of_arms(rows[rows["ablation"] == ablation.name]))


def write(table: pd.DataFrame, folder: Path, name: str, caption: str) -> None:
    """Write one table as .md, .csv and .tex."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown(table) + "\n", encoding="utf-8")
    (folder / f"{name}.csv").write_text(table.to_csv(index=False), encoding="utf-8")
    (folder / f"{name}.tex").write_text(latex(table, name, caption), encoding="utf-8")


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown, in which no cell is markup."""
    escaped = table.map(_escape_markdown).rename(columns=_escape_markdown)
    return str(escaped.to_markdown(index=False, disable_numparse=True))


def _escape_markdown(value: object) -> str:
    return one_line(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")
