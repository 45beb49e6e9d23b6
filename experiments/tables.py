"""Tables of an ablation as data, and as Markdown, CSV and LaTeX (booktabs)."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from experiments.ablations import Ablation
from experiments.effects import OUTCOMES, main_effects, verdict

NOT_REPORTED = "not reported"
METRICS = {
    "perplexity": ("perplexity", 0),
    "usage": ("usage %", 1),
    "dead_codes": ("dead codes", 0),
    "bits": ("bits/token", 2),
    "l1": ("L1", 4),
    "psnr_db": ("PSNR dB", 2),
    "ssim": ("SSIM", 3),
    "quantization_error": ("quant. error / var z", 2),
    "train_seconds": ("train s", 0),
}


def arms_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Every arm: letter, levels, seeds, and each metric's mean over seeds (± sample standard deviation where there are several)."""
    lines = []
    for arm in ablation.arms:
        mine = rows[rows["arm"] == arm.name]
        finished = mine[mine["status"] == "ok"]
        line: dict[str, object] = {"": ablation.letter(arm.name), "arm": arm.name, **arm.levels}
        if finished.empty:
            line |= {"seeds": 0} | {label: _state(mine) for label, _ in METRICS.values()}
        else:
            line["seeds"] = len(finished)
            for metric, (label, digits) in METRICS.items():
                values = finished[metric].astype(float) * (100 if metric == "usage" else 1)
                line[label] = mean_and_spread(values, digits)
        lines.append(line)
    return pd.DataFrame(lines)


def _state(rows: pd.DataFrame) -> str:
    return "/".join(sorted(set(rows["status"]))) or "pending"


def mean_and_spread(values: pd.Series, digits: int) -> str:
    """'12.3 ± 0.4' (sample standard deviation), or '12.3' for a single value."""
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else mean


def effects_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Main effect of each change of a factor: mean over matched pairs, and the range of the pairs."""
    table = main_effects(ablation, rows)
    lines = []
    for effect in table.to_dict("records"):
        line = {"change": effect["change"], "matched pairs": effect["pairs"]}
        for outcome, label in OUTCOMES.items():
            digits = 2 if outcome == "bits" else 4
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
        digits = 2 if contrast.outcome == "bits" else 4
        lines.append(
            {
                "claim": contrast.claim,
                "arms": f"{ablation.letter(contrast.without)}→{ablation.letter(contrast.with_)}",
                "required in every seed": f"{OUTCOMES[contrast.outcome]} {'≥' if contrast.effect > 0 else '≤'} {contrast.effect:+g}",
                "seen, seed by seed": ", ".join(f"{d:+.{digits}f}" for d in judged.differences) or "nothing yet",
                "verdict": judged.word,
            }
        )
    return pd.DataFrame(lines)


def paper_table(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows as reported, each beside the arm that comes closest; other data, size and metrics, so only directions compare."""
    lines = []
    for row in ablation.paper_rows:
        rfid = NOT_REPORTED if row.rfid is None else f"{row.rfid:.2f}"
        usage = NOT_REPORTED if row.usage_pct is None else f"{row.usage_pct:g}"
        line = {"paper": row.method, "rFID (paper)": rfid, "usage % (paper)": usage}
        finished = rows[(rows["arm"] == row.arm) & (rows["status"] == "ok")]
        if row.arm is None:
            ours = {"closest arm": "none"}
        elif finished.empty:
            ours = {"closest arm": f"{ablation.letter(row.arm)} {row.arm}", "usage %": _state(rows[rows["arm"] == row.arm])}
        else:
            ours = {
                "closest arm": f"{ablation.letter(row.arm)} {row.arm}",
                "seeds": str(len(finished)),
                "usage %": mean_and_spread(finished["usage"].astype(float) * 100, 1),
                "perplexity / K %": mean_and_spread(finished["perplexity_share"].astype(float) * 100, 1),
                "L1": mean_and_spread(finished["l1"].astype(float), 4),
            }
        lines.append(line | ours)
    return pd.DataFrame(lines).fillna("")


TABLES = {
    "arms": (arms_table, "All arms: what they differ in, and what came out on the test split (the protocol stands below)."),
    "main_effects": (effects_table, "Main effects: mean over pairs of arms that differ in nothing else, with the range of the pairs."),
    "verdicts": (verdicts_table, "Claims, the effect required before the numbers were seen, and what the rows say."),
    "paper": (
        paper_table,
        "The paper's rows, each beside the arm that comes closest. Data, size and metrics differ, so only directions can be compared; "
        "rFID is not measured here.",
    ),
}


def write(table: pd.DataFrame, folder: Path, name: str, caption: str) -> None:
    """Write one table as .md, .csv and .tex."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown(table) + "\n")
    (folder / f"{name}.csv").write_text(table.to_csv(index=False))
    (folder / f"{name}.tex").write_text(latex(table, name, caption))


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True)


def latex(table: pd.DataFrame, name: str, caption: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""
    escaped = table.map(_escape).rename(columns=_escape)
    return escaped.to_latex(index=False, caption=_escape(caption), label=f"tab:{name}", position="t")


_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {"±": r"$\pm$", "Δ": r"$\Delta$", "→": r"$\to$", "≥": r"$\geq$", "≤": r"$\leq$", "<": r"$<$", ">": r"$>$", "|": r"$|$"}


def _escape(value: object) -> str:
    text = "" if isinstance(value, float) and math.isnan(value) else str(value)
    return "".join(_SPECIAL.get(c, c) for c in " ".join(text.split()))
