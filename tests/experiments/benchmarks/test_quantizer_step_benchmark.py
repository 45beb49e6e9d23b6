"""The benchmark of quantizers' steps: real steps in processes of their own, kept cells, and a report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from experiments.benchmarks import cells, quantizer_step, quantizer_step_cell
from experiments.cli import app

CELL = {"device": "cpu", "arm": "ibq", "K": 64, "N": 64}


def test_steps_are_measured_kept_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    rows = quantizer_step.run("cpu", small=True, say=lambda _: None)
    assert list(rows["arm"]) == ["vq", "fsq", "ibq"]
    assert list(rows["status"]) == ["ok"] * 3
    assert (rows[["seconds", "vq_seconds", "times_vq", "peak_gib"]] > 0).all(axis=None)
    monkeypatch.setattr(cells.subprocess, "run", lambda *_, **__: pytest.fail("a finished cell was measured again"))
    assert CliRunner().invoke(app, ["bench", "quantizer-step", "--device", "cpu", "--small"]).exit_code == 0
    report = tmp_path / "reports" / "benchmarks" / "quantizer-step"
    assert {path.name for path in report.iterdir()} >= {"rows.csv", "table.md", "table.tex", "figure.png", "figure.pdf"}


def test_a_step_moves_the_codes_and_only_by_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantizer = quantizer_step_cell._quantizer(CELL, "ibq")
    before_KD = quantizer.codebook.detach().clone()
    quantizer_step_cell._step(quantizer, CELL, torch.device("cpu"))(0)
    moved_KD = (quantizer.codebook.detach() - before_KD).abs()
    assert 0 < moved_KD.max() <= 1.01e-3  # the learning rate


def test_a_cell_that_does_not_fit_says_so() -> None:
    ok = CELL | {"method": "VQ", "status": "ok", "seconds": 0.1, "times_vq": 1.0, "peak_gib": 0.5}
    rows = pd.DataFrame([ok | {"arm": "vq"}, CELL | {"method": "IBQ", "status": "does not fit"}])
    shown = quantizer_step.table(rows)
    assert list(shown["ms, K = 64"]) == ["100", "does not fit"]
    assert list(shown["memory / VQ's, K = 64"]) == ["1.00", ""]
    assert len(quantizer_step.figure(rows).axes[0].patches) == 2
