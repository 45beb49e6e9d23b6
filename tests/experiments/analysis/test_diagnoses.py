"""Diagnoses from the histories of a study's tokenizers: in rows, in the words of sweep and status, on the pages."""

from __future__ import annotations

import json
from html import unescape
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments import rows
from experiments.analysis import diagnoses
from experiments.cells import Cell
from experiments.cli import app
from experiments.report import pages
from experiments.runner import runs
from experiments.status import result_of
from experiments.study import Study
from ibq.evaluation.diagnosis import NOTHING_SEEN
from ibq.run_directory import write_json, write_text

pytestmark = pytest.mark.usefixtures("toy")
runner = CliRunner()


def tokenizer_of(study: Study, arm: str) -> Cell:
    return next(cell for cell in study.cells if cell.tokenizer_of == arm)


def write_history(cell: Cell, lines: list[dict[str, Any]]) -> None:
    write_text(cell.run.history, "".join(json.dumps(line) + "\n" for line in lines))


def forget_diagnosis(cell: Cell, *, collapsed: bool) -> None:
    """Take the diagnosis from its row; and let its history be one of a collapse."""
    row = cell.run.read_row()
    write_json(cell.run.row, {name: value for name, value in row.items() if name != diagnoses.NAME})
    if collapsed:
        last = cell.run.read_history()[-1] | {"perplexity": 1.5}
        write_history(cell, [last | {"step": step} for step in range(10, 210, 10)])


def test_rows_of_the_study_have_it_and_transformers_have_not(copied: Study) -> None:
    frame = rows.load(copied).set_index("arm")
    assert frame.loc["tokenizer of vq", "diagnosis"] == NOTHING_SEEN
    assert frame.loc["ibq", "tokenizer.diagnosis"] == NOTHING_SEEN
    assert frame.loc[["vq", "ibq", "ibq_deep"], "diagnosis"].isna().all()


def test_it_is_added_to_runs_without_it_and_nothing_is_trained(copied: Study) -> None:
    vq, ibq = tokenizer_of(copied, "vq"), tokenizer_of(copied, "ibq")
    forget_diagnosis(vq, collapsed=True)
    forget_diagnosis(ibq, collapsed=False)
    before = [cell.run.row.read_bytes() for cell in copied.cells]
    result = runner.invoke(app, ["evaluate", "toy", "--preset", "smoke", "--metric", "diagnosis"])
    assert result.exit_code == 0, result.output
    assert f"[1/2] diagnosis {vq.name}: collapsed since step 10" in result.output
    assert f"[2/2] diagnosis {ibq.name}: nothing seen" in result.output
    assert "2 runs evaluated with diagnosis" in result.output
    frame = rows.load(copied).set_index("arm")
    assert frame.loc["tokenizer of ibq", "diagnosis"] == NOTHING_SEEN
    assert frame.loc["tokenizer of vq", "diagnosis"].startswith("collapsed since step 10")
    assert frame.loc["tokenizer of vq", "diagnosis_sentences"].startswith(
        "The codebook has collapsed since step 10: perplexity 1.5 of 32 "
    )
    assert not [column for column in frame if column.startswith("diagnosis.")]
    assert [cell.run.row.read_bytes() for cell in copied.cells] == before
    assert runs.evaluate_finished(copied, "diagnosis", lambda _: None) == 0


def test_sweep_and_status_name_the_cause(copied: Study) -> None:
    seen = "collapsed since step 40: 937 codes never used"
    row = {"status": "ok", "perplexity": 12.0, "codebook_size": 1024, "l1": 0.12, "train_seconds": 38.0}
    assert result_of(row | {"diagnosis": seen}) == f"perplexity 12 of 1024, L1 0.1200, 38 s; {seen}"
    assert result_of(row | {"diagnosis": NOTHING_SEEN}) == result_of(row) == "perplexity 12 of 1024, L1 0.1200, 38 s"
    spans = row | {"dimension_used": 3.14, "code_dim": 64}
    assert result_of(spans) == "perplexity 12 of 1024, 3.1 of 64 dimensions, L1 0.1200, 38 s"
    assert (
        result_of({"status": "nan", "reason": "step 7: lost", "train_seconds": 3.0, "diagnosis": seen})
        == f"step 7: lost; {seen}"
    )

    cell = tokenizer_of(copied, "vq")

    def detail() -> str:
        return next(str(line["detail"]) for line in rows.status_lines(copied) if line["run"] == cell.run.path.name)

    assert "collapsed" not in detail()
    write_json(cell.run.row, cell.run.read_row() | {"diagnosis": seen})
    assert detail().endswith(f" s; {seen}")
    write_json(cell.run.row, cell.run.read_row() | {"status": "nan", "reason": "step 7: lost"})
    assert detail() == f"step 7: lost; {seen}"
    forget_diagnosis(cell, collapsed=True)
    runs.evaluate_finished(copied, "diagnosis", lambda _: None)
    assert detail().startswith("step 7: lost; collapsed since step 10")


def test_status_says_it_of_a_run_that_has_not_finished(copied: Study) -> None:
    cell = tokenizer_of(copied, "vq")
    forget_diagnosis(cell, collapsed=True)
    cell.run.row.unlink()
    details = [
        str(line["detail"]) for line in rows.status_lines(Study("smoke", ("toy",))) if line["run"] == cell.run.path.name
    ]
    assert "steps/s; collapsed since step 10" in details[0]


def test_a_page_shows_what_is_wrong_and_nothing_where_nothing_is(copied: Study) -> None:
    page = pages.write(copied).parent / "toy.html"
    assert 'id="diagnoses"' not in page.read_text()
    assert not list((page.parent / "tables").glob("*diagnoses*"))
    forget_diagnosis(tokenizer_of(copied, "vq"), collapsed=True)
    pages.write(copied)
    text = unescape(page.read_text())
    assert 'id="diagnoses"' in text
    assert "<td>tokenizer of vq</td>\n      <td>0</td>\n      <td>collapsed since step 10" in text
    assert (
        "<b>tokenizer of vq, seed 0</b>: The codebook has collapsed since step 10: perplexity 1.5 of 32 codes, where "
        "as many " in text
    )
    assert '<a href="tables/toy_diagnoses.csv">CSV</a>' in text
    assert "collapsed since step 10" in (page.parent / "tables" / "toy_diagnoses.md").read_text()
