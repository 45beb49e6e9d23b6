"""The two stages of a tuned ablation: what a search decides by, what waits for it, and that nothing is trained
twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import ablations, rows
from experiments.ablations import ABLATIONS, Ablation, Trial
from experiments.ablations.quantizers import tuning
from experiments.cells import Cell
from experiments.cli import app
from experiments.runner import runs
from experiments.runner.plan import expected_cost, plan_table
from experiments.runner.sweep import train_study
from experiments.study import Study, advance
from ibq.config import TrainConfig
from ibq.run_directory import RunDirectory, append_line, write_json


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ablation:
    """Two arms of the comparison, of which the second takes over the rate of the first, in a folder of its own."""
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    full = ABLATIONS["quantizers"]
    ablation = replace(full, arms=(full.arm("ibq"), full.arm("ibq_single")), contrasts=(), paper_rows=())
    monkeypatch.setitem(ablations.ABLATIONS, full.name, ablation)
    return ablation


def pretend(cell: Cell, losses: list[float], status: str = "ok") -> None:
    """A finished run with these reconstruction errors in its history."""
    cell.run.path.mkdir(parents=True)
    cell.run.history.write_text(
        "".join(json.dumps({"step": i, "pixel_mean": loss}) + "\n" for i, loss in enumerate(losses))
    )
    cell.run.row.write_text(
        json.dumps({"run": cell.run.path.name, "status": status, "reason": "step 1: the gradient norm overflowed"})
    )


@pytest.mark.parametrize(
    ("losses", "value"),
    [
        ({1e-3: 0.2, 3e-4: 0.3, 3e-3: 0.4}, 1e-3),
        ({3e-3: 0.2, 1e-3: 0.2, 3e-4: 0.2}, 3e-4),
        ({3e-4: math.inf, 1e-3: 0.9, 3e-3: math.inf}, 1e-3),
        ({3e-4: math.inf, 1e-3: math.inf}, 3e-4),
        ({3e-4: 0.1, 1e-3: None}, None),
        ({}, None),
    ],
)
def test_the_least_loss_wins_a_tie_goes_to_the_smaller_and_nothing_is_chosen_early(
    losses: dict, value: float | None
) -> None:
    assert tuning.best(losses) == value


def test_what_decides_is_the_last_third_and_numbers_that_are_not_finite_lose(small: Ablation, tmp_path: Path) -> None:
    one, other, third = Study("smoke", ("quantizers",)).cells
    assert tuning.search_loss(one.run) is None
    pretend(one, [9.0, 9.0, 9.0, 9.0, 1.0, 2.0])
    assert tuning.search_loss(one.run) == 1.5
    pretend(other, [0.0, 0.0, 0.1], status="nan")
    assert tuning.search_loss(other.run) == math.inf
    pretend(third, [0.7])
    assert tuning.search_loss(third.run) == 0.7


def test_arms_wait_for_their_search_and_then_follow_it(small: Ablation) -> None:
    study = Study("smoke", ("quantizers",))
    assert [cell.search.value for cell in study.cells if cell.search] == [3e-4, 1e-3, 3e-3]
    assert {cell.config.steps for cell in study.cells} == {1}
    assert [cell.arm.name for cell in study.waiting] == ["ibq", "ibq_single"]
    study, joined = advance(study)
    assert joined == []
    for cell, loss in zip(study.cells[:2], (0.5, 0.1), strict=True):
        pretend(cell, [loss])
    study, joined = advance(study)
    assert joined == []
    assert rows.waits_for(study, study.waiting[1]) == "waits for the search of ibq, 2 of 3 runs finished"

    pretend(study.cells[2], [0.1])  # a tie
    study, joined = advance(study)
    assert [cell.arm.name for cell in joined] == ["ibq", "ibq_single"]
    assert study.waiting == []
    finals = [cell for cell in study.cells if not cell.search]
    assert {cell.config.optim.lr for cell in finals} == {1e-3}
    assert {cell.config.steps for cell in finals} == {3}
    assert [cell.run.path for cell in study.cells] == [cell.run.path for cell in Study("smoke", ("quantizers",)).cells]
    study, joined = advance(study)
    assert joined == []


@pytest.mark.parametrize(
    ("losses", "tried", "chosen"),
    [
        ({0.3: 0.3, 1.0: 0.2, 3.0: 0.4}, 3, 1.0),
        ({0.3: 0.2, 1.0: 0.3, 3.0: 0.4, 0.1: 0.5}, 4, 0.3),
        ({0.3: 0.5, 1.0: 0.4, 3.0: 0.3, 10.0: 0.2}, 4, 10.0),
        ({0.3: 0.5, 1.0: 0.4, 3.0: 0.3}, 4, None),
        ({0.3: 0.5, 1.0: 0.4}, 3, None),
    ],
)
def test_a_search_goes_on_while_its_best_value_lies_at_an_edge(
    losses: dict[float, float], tried: int, chosen: float | None, tmp_path: Path
) -> None:
    """The value at the end of the grid is taken where there is none beyond."""
    widening = tuning.Tuning("optim.lr", factors=(0.1, 0.3, 1.0, 3.0, 10.0), step_share=1.0, first=(0.3, 1.0, 3.0))
    config = Study("smoke").cells[0].config
    assert isinstance(config, TrainConfig)
    trials = []
    for factor, (value, trial) in zip(widening.factors, widening.trials(config).items(), strict=True):
        run = RunDirectory(tmp_path / f"{factor}")
        if factor in losses:
            run.path.mkdir()
            write_json(run.row, {"status": "ok"})
            append_line(run.history, {"pixel_mean": losses[factor]})
        trials.append(Trial(value, run, trial.steps))
    wanted = widening.wanted(trials)
    assert len(wanted) == tried
    found = widening.choice(wanted, config)
    assert (found and found.optim.lr) == (chosen and pytest.approx(chosen * config.optim.lr))


def test_a_part_of_a_study_stays_that_part(small: Ablation) -> None:
    study = Study("smoke", ("quantizers",))
    part = study.only(study.cells[:1])
    for cell in study.cells:
        pretend(cell, [0.1])
    assert part.waiting == []
    part, joined = advance(part)
    assert joined == []
    assert len(part.cells) == 1


def test_rows_and_plan_of_a_study_that_waits(small: Ablation) -> None:
    study = Study("smoke", ("quantizers",))
    frame = rows.load(study).set_index("arm")
    assert frame.loc["ibq", "status"] == "waiting"
    assert frame.loc["ibq_single", "reason"] == "waits for the search of ibq, 0 of 3 runs finished"
    assert frame.loc["ibq: optim.lr 0.001", ["status", "search.arm", "search.value"]].tolist() == [
        "pending",
        "ibq",
        1e-3,
    ]
    table = plan_table(study, small).set_index("arm")
    assert table.loc["ibq", "search of optim.lr"] == "0.0003, 0.001, 0.003; 1 steps each, 0 finished"
    assert table.loc["ibq_single", "search of optim.lr"] == "as ibq"
    cost = expected_cost(study)
    assert cost.startswith("5 runs, 0 finished; 9 steps left (3 of them in 3 runs of a search that 2 runs wait for)")


def test_one_sweep_trains_both_stages_and_never_again(small: Ablation) -> None:
    study = Study("smoke", ("quantizers",))
    said: list[str] = []
    train_study(study.only(study.cells[:1]), device="cpu", say=said.append)
    outcome = train_study(study, device="cpu", say=said.append)
    study, _ = advance(study)
    assert outcome.skipped == 1
    assert len(outcome.finished) == 4
    assert outcome.failed == outcome.unfinished == []
    assert any(
        "[4/4] ok quantizers/ibq_single seed 0" in line or "[4/4] ok quantizers/ibq seed 0" in line for line in said
    )
    frame = rows.load(study)
    assert set(frame["status"]) == {"ok"}
    assert frame["search.loss"].notna().sum() == 3
    assert list(frame["arm"]) == list(rows.load(Study("smoke", ("quantizers",)))["arm"])
    assert train_study(Study("smoke", ("quantizers",)), device="cpu", say=said.append).skipped == 5
    assert expected_cost(study).startswith("5 runs, 5 finished; 0 steps left at")


def test_a_search_that_fails_leaves_its_arms_waiting_and_the_command_unfinished(small: Ablation) -> None:
    study = Study("smoke", ("quantizers",))
    broken = study.cells[1].run
    broken.path.mkdir(parents=True)
    broken.config.write_text("{")
    outcome = train_study(study, device="cpu", say=lambda _: None)
    study, _ = advance(study)
    assert [cell.search.value for cell in outcome.failed if cell.search] == [1e-3]
    assert [cell.arm.name for cell in outcome.unfinished] == ["ibq", "ibq_single"]
    broken.config.unlink()
    last = train_study(study, device="cpu", say=lambda _: None).finished[-2:]
    assert {cell.arm.name for cell in last} == {"ibq", "ibq_single"}, "two trained at a time: either may end first"


def test_a_stop_leaves_what_waits_for_later(small: Ablation) -> None:
    study = Study("smoke", ("quantizers",), overrides={"steps": 600_000})
    outcome = train_study(study, device="cpu", slots=1, time_budget_s=2, say=lambda _: None)
    assert [cell.arm.name for cell in outcome.unfinished][-2:] == ["ibq", "ibq_single"]
    assert len(outcome.unfinished) == 5
    assert [RunDirectory(path).finished for path in study.runs_folder.glob("*/")] == [False]


def test_runs_of_a_search_are_not_evaluated_anew(small: Ablation) -> None:
    study = Study("smoke", ("quantizers",))
    for cell in study.cells:
        pretend(cell, [0.1])
    assert runs.evaluate_finished(study, "train_split") == 0


def test_the_command_line_knows_what_waits(small: Ablation) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["status", "quantizers", "--preset", "smoke"]).output.count(" waiting ") == 2
    assert "as ibq" in runner.invoke(app, ["plan", "quantizers", "--preset", "smoke"]).output
