from __future__ import annotations

import pandas as pd
import pytest

from experiments import rows
from experiments.ablations import ABLATIONS
from experiments.analysis import metrics
from experiments.report import latex, tables
from ibq.metrics import METRICS


def test_latex_is_booktabs_and_nothing_escapes() -> None:
    nasty = pd.DataFrame([{"a_b": "50% & $x$ {y} #1 \\input{z}", "Δ": "±1 → 2"}])
    text = tables.latex(nasty, "t", "50% of_it")
    assert "\\toprule" in text
    assert "50\\% \\& \\$x\\$ \\{y\\} \\#1 \\textbackslash{}input\\{z\\}" in text
    assert "a\\_b" in text
    assert "$\\Delta$" in text
    assert "50\\% of\\_it" in text


def test_signs_beyond_ascii_become_commands_of_latex_and_only_foreign_letters_their_code_point() -> None:
    assert latex.escape("logits over √D ≥ -0.5, Ω") == "logits over $\\surd$D $\\geq$ $-$0.5, $\\Omega$"
    assert latex.escape("中") == "U+4E2D"
    assert latex.escape("[0.5]") == "{[}0.5{]}"


@pytest.mark.parametrize(("values", "text"), [([1.0], "1.00"), ([1.0, 3.0], "2.00 ± 1.41")])
def test_mean_and_sample_spread(values: list[float], text: str) -> None:
    assert metrics.in_words(pd.DataFrame({"psnr_db": values}), "psnr_db") == text


def test_arms_table_has_every_arm_and_the_rows_numbers(trained: tuple) -> None:
    study = trained[0]
    ablation = ABLATIONS["vq_vs_ibq"]
    frame = rows.load(study)
    table = tables.build("arms", ablation, frame)
    assert list(table["arm"]) == [arm.name for arm in ablation.arms]
    assert list(table[""])[:3] == ["A", "B", "C"]
    first = frame[frame["arm"] == "vq_published"].iloc[0]
    assert table.loc[0, "L1"] == f"{first['l1']:.4f}"
    assert table.loc[0, "usage %"] == f"{100 * first['usage']:.1f}"
    for name in ("dimension_used", "dimension_features"):
        assert table.loc[0, METRICS[name].heading] == f"{first[name]:.1f}"


def test_paper_rows_are_the_papers_and_what_it_does_not_report_is_said(trained: tuple) -> None:
    table = tables.build("paper", ABLATIONS["vq_vs_ibq"], rows.load(trained[0]))
    assert list(table["rFID (paper)"]) == ["3.98", "1.67", "not reported", "1.37"]
    assert list(table["usage % (paper)"]) == ["5.3", "98", "not reported", "not reported"]
    assert list(table["closest arm"]) == ["A vq_published", "G ibq_single", "B ibq_published", "none"]
    assert list(table["seeds"]) == ["1", "1", "1", ""]


def test_a_failed_arm_shows_its_state_never_a_number() -> None:
    ablation = ABLATIONS["vq_vs_ibq"]
    frame = pd.DataFrame(
        [{"arm": arm.name, "seed": 0, "status": "nan" if i else "failed"} for i, arm in enumerate(ablation.arms)]
    )
    table = tables.arms_table(ablation, frame)
    assert table.loc[0, "L1"] == "failed"
    assert set(table["perplexity"]) == {"failed", "nan"}
    assert set(table["seeds"]) == {"0"}


def test_a_table_longer_than_a_page_comes_in_parts_that_hold_every_row() -> None:
    table = pd.DataFrame({"claim": [f"row{i:03d} " + "of many words " * 8 for i in range(60)], "n": range(60)})
    text = tables.latex(table, "t", "c")
    parts = text.split("\\begin{table}")[1:]
    assert len(parts) > 2
    assert [i for part in parts for i in range(60) if f"row{i:03d}" in part] == list(range(60))
    assert "\\label{tab:t_1}" in parts[0]
    assert f"Part 2 of {len(parts)}." in parts[1]
    assert tables.latex(table.iloc[:2], "t", "c").count("\\begin{table}") == 1
