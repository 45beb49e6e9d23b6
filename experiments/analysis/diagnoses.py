"""Diagnoses of a study's tokenizers (`ibq.evaluation.diagnosis`), for rows and for the report's pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.ablations import Ablation
from experiments.study import Cell, Study, unique_runs
from ibq.config import TrainConfig
from ibq.evaluation.diagnosis import NOTHING_SEEN, Finding, diagnose, summary
from ibq.run_directory import write_json

NAME = "diagnosis"
"""Of the evaluation, of its file under eval/, and of the column."""


def findings_of(cell: Cell) -> list[Finding]:
    """Findings in the history of a tokenizer's run, finished or not; nothing for a transformer."""
    return diagnose(cell.run.read_history()) if isinstance(cell.config, TrainConfig) else []


def evaluate(study: Study, say: Callable[[str], None] = print) -> int:
    """Add eval/diagnosis.json to every finished tokenizer of a study whose row has no diagnosis; returns how many were
    added.

    The file has the phrase that a row has, as `diagnosis`, and its sentences, as `diagnosis_sentences`.
    """
    todo = [
        cell for cell in unique_runs(study.cells) if cell.run.finished and not cell.tokenizer and not _is_known(cell)
    ]
    for i, cell in enumerate(todo, 1):
        found = findings_of(cell)
        sentences = " ".join(finding.sentence for finding in found)
        write_json(cell.run.path / "eval" / f"{NAME}.json", {NAME: summary(found), f"{NAME}_sentences": sentences})
        say(f"[{i}/{len(todo)}] {NAME} {cell.name}: {summary(found)}")
    return len(todo)


def _is_known(cell: Cell) -> bool:
    return NAME in cell.run.read_row() or (cell.run.path / "eval" / f"{NAME}.json").is_file()


def seen_in(study: Study, ablation: Ablation) -> list[tuple[Cell, list[Finding]]]:
    """The runs of an ablation, finished or not, in which something is seen, and what; those of searches are left
    out."""
    cells = [cell for cell in study.cells if cell.ablation.name == ablation.name and not cell.search]
    return [(cell, found) for cell in cells if (found := findings_of(cell))]


def phrase(row: dict[str, Any]) -> str:
    """A row's diagnosis as an addition to a line about the run; empty where nothing was seen, or nobody looked."""
    seen = row.get(NAME, NOTHING_SEEN)
    return "" if seen == NOTHING_SEEN else f"; {seen}"
