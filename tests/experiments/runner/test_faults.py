"""A quick round of every kind of kill; `make faults` runs a hundred."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.runner.sweep import train_study
from experiments.study import Study

sys.path.insert(0, str(Path(__file__).parents[2]))

from faults import TARGETS, Bench, faults, results_of


@pytest.mark.processes
def test_a_round_of_every_kill_loses_nothing_and_leaves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "quiet"))
    study = Study("smoke", ("double_quant_loss",))  # the smallest: every sweep that ends executes its notebook
    train_study(study, device="cpu", say=lambda _: None)
    expected = results_of([cell.run for cell in study.cells])
    counts, trouble = faults(len(TARGETS), 0, tmp_path, expected, study.cells[0].config.steps, *study.ablation_names)
    assert trouble == []
    assert counts["studies compared"] >= 1
    assert sum(counts[target] for target in TARGETS) >= 2


@pytest.mark.processes
def test_trainers_die_with_their_driver_though_their_runs_would_go_on_for_hours(tmp_path: Path) -> None:
    bench = Bench(tmp_path, steps=10_000_000, ablation="double_quant_loss")
    bench.round("driver", 0.0, early=False)
    assert bench.trouble == []
    assert bench.rounds == {"driver": 1}
