from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import figures, manage, rows
from experiments.cli import app
from experiments.study import Study
from experiments.sweep import train_study

runner = CliRunner()


@pytest.mark.parametrize("command", ["list", "plan --preset smoke", "status --preset smoke", "report --preset smoke"])
@pytest.mark.usefixtures("trained")
def test_commands_work(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda *_: None)  # drawn in test_report
    result = runner.invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "vq_vs_ibq" in result.output or "report:" in result.output


@pytest.mark.usefixtures("trained")
def test_plan_counts_what_is_left() -> None:
    assert "13 runs, 13 finished; 0 steps left" in runner.invoke(app, ["plan", "vq_vs_ibq", "--preset", "smoke"]).output
    assert "13 runs, 0 finished; 65 steps left" in runner.invoke(app, ["plan", "vq_vs_ibq", "--preset", "smoke", "--set", "steps=5"]).output


@pytest.mark.usefixtures("trained")
def test_status_tells_every_arm() -> None:
    output = runner.invoke(app, ["status", "--preset", "smoke"]).output
    assert output.count(" ok ") == len(Study("smoke").cells)


@pytest.mark.usefixtures("trained")
def test_evaluate_adds_columns_to_old_rows_without_training() -> None:
    study = Study("smoke")
    before = [cell.run.row.stat().st_mtime_ns for cell in study.cells]
    assert runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", "train_split"]).exit_code == 0
    assert "0 runs evaluated" in runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", "train_split"]).output
    frame = rows.load(study)
    assert (frame["train_split.protocol.split"] == "train").all()
    assert (frame["train_split.l1"] > 0).all()
    assert [cell.run.row.stat().st_mtime_ns for cell in study.cells] == before


def test_compare_names_what_differs_and_nothing_else(trained: tuple) -> None:
    study: Study = trained[0]
    one, other = (study.cells[i].run for i in (2, 7))  # differ in the entropy penalty alone
    names = [line[0] for line in manage.compare(one, other)]
    assert "quantizer.entropy_weight" in names
    assert not {"quantizer.method", "quantizer.codebook_init", "steps", "parameters"} & set(names)
    output = runner.invoke(app, ["compare", one.path.name, other.path.name, "--preset", "smoke"]).output
    assert one.path.name in output


def test_rerun_gives_the_same_row_and_forget_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("smoke")
    study = study.only(study.cells[:1])
    train_study(study, device="cpu", say=lambda _: None)
    name = study.cells[0].run.path.name
    result = runner.invoke(app, ["rerun", name[:12], "--preset", "smoke"])
    assert result.exit_code == 0, result.output
    changed = result.output.strip().rpartition(": ")[2]
    assert set(changed.split(", ")) <= {"none", "train_seconds", "peak_memory_gib"}
    assert runner.invoke(app, ["forget", name, "--preset", "smoke"]).exit_code == 0
    assert list(tmp_path.iterdir()) == []
