"""A quick round of every kind of kill; `make faults` runs a hundred."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.study import Study

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import TARGETS, faults, results_of


@pytest.mark.usefixtures("trained")
def test_a_round_of_every_kill_loses_nothing_and_leaves_nobody(tmp_path: Path) -> None:
    study = Study("smoke", ("vq_vs_ibq",))
    expected = results_of([cell.run for cell in study.cells])
    counts, trouble = faults(len(TARGETS), seed=0, folder=tmp_path, expected=expected, steps=study.cells[0].config.steps)
    assert trouble == []
    assert counts["studies compared"] >= 1
    assert sum(counts[target] for target in TARGETS) >= 2
