"""Tables of an ablation as data, and as Markdown, CSV and LaTeX (booktabs)."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from experiments.ablations import Ablation, PaperRow
from experiments.ablations.collapse_atlas.collapse_map import remedies_table
from experiments.ablations.grid import BASE, GRID_COLUMNS, strips, varied
from experiments.ablations.quantizers import tuning
from experiments.ablations.quantizers.anatomy import parts_table
from experiments.analysis.effects import OUTCOMES, RATE_AND_DISTORTION, entry, main_effects, verdict
from experiments.rows import of_arms

NOT_REPORTED, NOT_MEASURED = "not reported", "not measured"


class Column(NamedTuple):
    """A number of finished rows in the table of arms: its heading, digits, and the value of each row."""

    label: str
    digits: int
    value: Callable[[pd.DataFrame], pd.Series]


COLUMNS = {
    "perplexity": Column("perplexity", 0, entry("perplexity")),
    "usage": Column("usage %", 1, entry("usage", 100)),
    "dead_codes": Column("dead codes", 0, entry("dead_codes")),
    "share": Column("perplexity / K %", 1, entry("perplexity_share", 100)),
    "bits": Column("bits/token", 2, entry("bits")),
    "l1": Column("L1", 4, entry("l1")),
    "psnr_db": Column("PSNR dB", 2, entry("psnr_db")),
    "ssim": Column("SSIM", 3, entry("ssim")),
    "quantization_error": Column("quant. error / var z", 2, entry("quantization_error")),
    "train_seconds": Column("train s", 0, entry("train_seconds")),
    "step_ms": Column(
        "ms a step", 0, lambda rows: 1000 * rows["train_seconds"].astype(float) / rows["config.steps"].astype(float)
    ),
    "parameters": Column("parameters, thousands", 0, entry("parameters", 1e-3)),
    "peak_memory": Column("peak memory GiB", 2, entry("peak_memory_gib")),
    "learning_rate": Column("learning rate / 1e-4", 1, entry("config.optim.lr", 1e4)),
    "codebook_size": Column("K", 0, entry("codebook_size")),
    "code_dim": Column("D", 0, entry("code_dim")),
    "fid": Column("FID[fashion-cnn]", 2, entry("fid[fashion-cnn]")),
    "fid_inception": Column("FID (Inception)", 2, entry("inception.fid")),
    "gap": Column("gap", 2, entry("gap")),
    "logit_spread": Column("logit spread", 2, entry("last.logit_spread")),
    "max_probability": Column("largest probability", 3, entry("last.max_probability")),
    "depth": Column("blocks", 0, entry("depth")),
    "cross_entropy": Column("nats/token", 3, entry("cross_entropy")),
    "bits_per_image": Column("bits an image", 0, entry("bits_per_image")),
    "uniform_bits_per_image": Column("bits of uniform tokens", 0, entry("uniform_bits_per_image")),
    "tokenizer_perplexity": Column("tokenizer's perplexity", 0, entry("tokenizer.perplexity")),
    "tokenizer_l1": Column("tokenizer's L1", 4, entry("tokenizer.l1")),
    "tokenizer_fid": Column("tokenizer's FID[fashion-cnn]", 2, entry("tokenizer.fid[fashion-cnn]")),
    "guidance": Column("guidance", 1, entry("guidance")),
    "is": Column("IS[fashion-cnn]", 2, entry("is[fashion-cnn]")),
    "precision": Column("precision[fashion-cnn]", 3, entry("precision[fashion-cnn]")),
    "recall": Column("recall[fashion-cnn]", 3, entry("recall[fashion-cnn]")),
    "label_agreement": Column("label agreement[fashion-cnn] %", 1, entry("label_agreement[fashion-cnn]", 100)),
    "samples_per_s": Column("images/s", 1, entry("sample_images_per_s")),
}
OPTIONAL = ("fid_inception",)
"""Columns that the table of arms leaves out where no row has them, as without pretrained weights."""

PAPER_COLUMNS = {"rFID": ".2f", "usage %": "g", "gFID": ".2f", "IS": ".2f"}
"""How the numbers of the paper's rows are written."""


def arms_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Every arm: letter, levels, seeds, and each column's mean over seeds (± sample standard deviation where there are
    several)."""
    shown = [name for name in ablation.columns if name not in OPTIONAL or COLUMNS[name].value(rows).notna().any()]
    columns = [COLUMNS[name] for name in shown]
    lines = []
    for arm in ablation.arms:
        mine = rows[rows["arm"] == arm.name]
        if mine.empty:  # larger than the preset's largest codebook
            continue
        finished = mine[mine["status"] == "ok"]
        line: dict[str, object] = {"": ablation.letter(arm.name), "arm": arm.name, **arm.levels}
        if finished.empty:
            line |= {"seeds": "0"} | {column.label: _state(mine) for column in columns}
        else:
            lost = mine[mine["status"] != "ok"]
            line["seeds"] = str(len(finished)) + ("" if lost.empty else f" of {len(mine)} ({_state(lost)})")
            line |= {column.label: mean_and_spread(column.value(finished), column.digits) for column in columns}
        lines.append(line)
    return pd.DataFrame(lines)


def _state(rows: pd.DataFrame) -> str:
    return "/".join(sorted(set(rows["status"]))) or "not in this study"


def mean_and_spread(values: pd.Series, digits: int) -> str:
    """'12.3 ± 0.4' (sample standard deviation), '12.3' where all values are the same one, or that none was measured."""
    if values.isna().all():
        return NOT_MEASURED
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} ± {values.std(ddof=1):.{digits}f}" if values.nunique() > 1 else mean


def effects_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Main effect of each change of a factor: mean over matched pairs, and the range of the pairs."""
    table = main_effects(ablation, rows)
    lines = []
    for effect in table.to_dict("records"):
        line = {"change": effect["change"], "matched pairs": effect["pairs"]}
        for outcome in RATE_AND_DISTORTION:
            label, _, digits, *_ = OUTCOMES[outcome]
            mean, least, greatest = (effect[f"{outcome}_{part}"] for part in ("mean", "min", "max"))
            spread = "one pair" if effect["pairs"] == 1 else f"{least:+.{digits}f} to {greatest:+.{digits}f}"
            line |= {label: f"{mean:+.{digits}f}", f"{label}, range": spread}
        lines.append(line)
    return pd.DataFrame(lines)


def verdicts_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Each claim with the effect that was required beforehand, what came out in each seed, and the verdict."""
    lines = []
    for contrast in ablation.contrasts:
        judged = verdict(contrast, rows)
        lines.append(
            {
                "claim": contrast.claim,
                "arms": f"{ablation.letter(contrast.without)}→{ablation.letter(contrast.with_)}",
                "required in every seed": judged.required,
                "seen, seed by seed": ", ".join(judged.seen) or "nothing yet",
                "verdict": judged.word + (f": {judged.reason}" if judged.reason else ""),
            }
        )
    return pd.DataFrame(lines)


def paper_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows as reported, each beside the arm that comes closest; other data, size and metrics, so only
    directions compare."""
    columns = [COLUMNS[name] for name in ablation.beside_paper]
    lines = []
    for row in ablation.paper_rows:
        line = {"paper": row.method} | {f"{name} (paper)": _reported(row, name) for name in ablation.paper_columns}
        mine = rows[rows["arm"] == row.arm]
        finished = mine[mine["status"] == "ok"]
        if row.arm is None:
            line["closest arm"] = "none"
        else:
            line["closest arm"] = f"{ablation.letter(row.arm)} {row.arm}"
            line |= {columns[0].label: _state(mine)} if finished.empty else {"seeds": str(len(finished))}
        if not finished.empty:
            line |= {column.label: mean_and_spread(column.value(finished), column.digits) for column in columns}
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
    outcomes = [name for name in GRID_COLUMNS if name != "fid" or COLUMNS[name].value(rows).notna().any()]
    arms = arms_table(replace(ablation, columns=tuple(outcomes)), rows).set_index(
        [BASE, *(field.name for field in varied(ablation))]
    )
    lines = []
    for name, (base, *rest), level in product(outcomes, strips(ablation), down.levels):
        line = {"outcome": COLUMNS[name].label, BASE: base} | {
            field.name: at for field, at in zip(others, rest, strict=True)
        }
        line |= {down.name: level}
        for column in across.levels:
            line[f"{across.name}={column}"] = arms.loc[(base, level, column, *rest), COLUMNS[name].label]
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
    "verdicts": (verdicts_table, "Claims, the effect required before the numbers were seen, and what the rows say."),
    "paper": (
        paper_table,
        "The paper's rows, each beside the arm that comes closest. Data, size and metrics differ, so only directions "
        "can be compared; "
        "rFID and gFID are not measured here.",
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
    (folder / f"{name}.md").write_text(markdown(table) + "\n")
    (folder / f"{name}.csv").write_text(table.to_csv(index=False))
    (folder / f"{name}.tex").write_text(latex(table, name, caption))


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown, in which no cell is markup."""
    escaped = table.map(_escape_markdown).rename(columns=_escape_markdown)
    return str(escaped.to_markdown(index=False, disable_numparse=True))


def _escape_markdown(value: object) -> str:
    return _text(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")


def _text(value: object) -> str:
    """A cell as one line; empty where there is nothing."""
    return "" if isinstance(value, float) and math.isnan(value) else " ".join(str(value).split())


LINE, LONG, SHORT = 75, 32, 20
"""Characters of a line of LaTeX, and of a column that breaks its lines: a short one does where the table is wider than
the line."""
PAGE = 40
"""Lines of a table that fit a page with its caption."""


def latex(table: pd.DataFrame, name: str, caption: str) -> str:
    """A booktabs table that is never wider than the line: long texts are wrapped, and what is still too wide is shrunk.
    One that is longer than a page comes in parts.

    Needs \\usepackage{array,booktabs,graphicx} and no more than pdfLaTeX's own fonts.
    """
    texts = table.map(_text)
    cells = [[str(label), *texts.iloc[:, i]] for i, label in enumerate(table.columns)]
    limit = LONG if sum(max(map(len, column)) + 2 for column in cells) <= LINE else SHORT
    widths = [_wrapped_width(column, limit) for column in cells]
    columns = "".join(_column_type(column, width) for column, width in zip(cells, widths, strict=True))
    escaped = texts.map(_escape).rename(columns=_escape)
    parts = _pages(
        [
            max(_lines(column[1 + i], width) for column, width in zip(cells, widths, strict=True))
            for i in range(len(texts))
        ]
    )
    floats = []
    for number, rows in enumerate(parts, 1):
        tabular = escaped.iloc[rows].to_latex(index=False, column_format=columns).rstrip()
        label, of_parts = (name, "") if len(parts) == 1 else (f"{name}_{number}", f" Part {number} of {len(parts)}.")
        floats.append(
            f"\\begin{{table}}[t]\n\\centering\n\\caption{{{_escape(caption + of_parts)}}}\n\\label{{tab:{label}}}\n"
            f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{tabular}}}\n\\end{{table}}\n"
        )
    return "% \\usepackage{array,booktabs,graphicx}\n" + "\\clearpage\n".join(floats)


def _wrapped_width(texts: list[str], limit: int) -> float | None:
    """Width in em of a column that wraps: one with a text beyond `limit` characters, but never so narrow that a word
    would break."""
    longest, word = max(map(len, texts)), max(len(word) for text in texts for word in ["", *text.split()])
    return None if longest <= limit or word == longest else max(min(12, 4 + longest / 16), 0.6 * word)


def _column_type(texts: list[str], width: float | None) -> str:
    """Numbers to the right, texts to the left, wrapped where there is a width."""
    number = all(re.fullmatch(r"[-+−]?[\d.,]*( ± [\d.]+)?", text) for text in texts[1:])
    if width is None:
        return "r" if number else "l"
    return f">{{\\{'raggedleft' if number else 'raggedright'}\\arraybackslash}}p{{{width:.1f}em}}"


def _lines(text: str, width: float | None) -> int:
    """About how many lines a cell takes, at two characters an em."""
    return 1 if width is None else max(1, math.ceil(len(text) / (1.8 * width)))


def _pages(lines: list[int]) -> list[slice]:
    """Consecutive rows that fit a page each, by the lines of every row; a table without rows is one part."""
    starts, filled = [0], 0
    for row, needed in enumerate(lines):
        if filled and filled + needed > PAGE:
            starts.append(row)
            filled = 0
        filled += needed
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_SPECIAL |= {c: f"{{{c}}}" for c in '[]*`"'}  # after a line break, or doubled, these mean something
_SPECIAL |= {"–": "--", "—": "---", "…": r"\ldots{}", "“": "``", "”": "''", "‘": "`", "’": "'"}
_MATHEMATICS = {
    "±": r"\pm",
    "→": r"\to",
    "←": r"\leftarrow",
    "≥": r"\geq",
    "≤": r"\leq",
    "≈": r"\approx",
    "≠": r"\neq",
    "×": r"\times",
}
_MATHEMATICS |= {
    "−": "-",
    "·": r"\cdot",
    "∞": r"\infty",
    "²": "^2",
    "³": "^3",
    "<": "<",
    ">": ">",
    "|": "|",
    "°": r"^\circ",
    "µ": r"\mu",
}
_GREEK = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "eta",
    "theta",
    "kappa",
    "lambda",
    "mu",
    "pi",
    "rho",
    "sigma",
    "tau",
    "phi",
    "omega",
)
_MATHEMATICS |= {c: f"\\{name}" for c, name in zip("αβγδεηθκλμπρστφω", _GREEK, strict=True)}
_MATHEMATICS |= {"Δ": r"\Delta", "Σ": r"\Sigma"}
_SPECIAL |= {c: f"${command}$" for c, command in _MATHEMATICS.items()}


def _escape(value: object) -> str:
    """A cell as LaTeX that compiles whatever it holds; a character that pdfLaTeX's fonts lack becomes its plain form,
    or its code point."""
    signed = re.sub(r"(?<![\w.)\]])-(?=[\d.])", "−", _text(value))
    return "".join(_character(c) for c in signed)


def _character(c: str) -> str:
    if c in _SPECIAL:
        return _SPECIAL[c]
    if c.isascii() or ("À" <= c <= "ÿ" and c not in "ÐðÞþ"):
        return c if c.isprintable() else ""
    plain = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
    return "".join(_SPECIAL.get(each, each) for each in plain) or f"U+{ord(c):04X}"
