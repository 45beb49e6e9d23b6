"""Arms between two others: which are trained, whatever the order in which runs finish, and what a study says of the
others."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import ablations, rows
from experiments.ablations import ABLATIONS, ALL, CORE, Ablation
from experiments.ablations.collapse_atlas import bisection
from experiments.ablations.collapse_atlas.arms import arm, name
from experiments.ablations.collapse_atlas.bisection import Bisection
from experiments.analysis import findings
from experiments.cells import Cell
from experiments.cli import app
from experiments.runner.plan import expected_cost, plan_table
from experiments.runner.sweep import train_study
from experiments.study import Study, advance, possible
from ibq.run_directory import RunDirectory

POINTS = {
    "low": ("slow", 16),
    "middle": ("slow", 64),
    "lower": ("slow", 32),
    "upper": ("slow", 128),
    "high": ("slow", 256),
}
LOW, LOWER, MIDDLE, UPPER, HIGH = (name("ibq", *POINTS[point]) for point in ("low", "lower", "middle", "upper", "high"))


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ablation:
    """Two ends, the middle between them, and the quarters on both sides of the middle; in a folder of its own."""
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    arms = (
        *(arm("ibq", *POINTS[end]) for end in ("low", "high")),
        arm("ibq", *POINTS["middle"], between=(LOW, HIGH)),
        arm("ibq", *POINTS["lower"], between=(LOW, MIDDLE)),
        arm("ibq", *POINTS["upper"], between=(MIDDLE, HIGH)),
    )
    ablation = replace(
        ABLATIONS["collapse_atlas"], arms=arms, contrasts=(), paper_rows=(), adaptive=Bisection(collapse=0.1, most=4)
    )
    monkeypatch.setitem(ablations.ABLATIONS, ablation.name, ablation)
    return ablation


def finish(run: RunDirectory, share: float, status: str = "ok") -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    facts = {"run": run.path.name, "status": status, "reason": "loss is nan", "train_seconds": 1.0}
    run.row.write_text(json.dumps(facts | {"perplexity_share": share}))


def cell_of(study: Study, arm: str) -> Cell:
    return next(cell for cell in [*study.cells, *study.waiting] if cell.arm.name == arm)


def names(cells: list[Cell]) -> list[str]:
    return [cell.arm.name for cell in cells]


def test_the_middle_is_trained_where_the_ends_disagree_and_then_one_of_the_quarters(line: Ablation) -> None:
    study = Study("smoke", ("collapse_atlas",))
    assert names(study.cells) == [LOW, HIGH]
    assert names(study.waiting) == [MIDDLE, LOWER, UPPER]
    assert names(possible(study)) == [MIDDLE, LOWER]
    finish(study.cells[0].run, 0.02)
    study, joined = advance(study)
    assert joined == []
    assert rows.waits_for(study, study.waiting[0]).endswith("has collapsed and the other has not, 1 of 2 runs finished")
    finish(study.cells[1].run, 0.1)  # just alive
    study, joined = advance(study)
    assert names(joined) == [MIDDLE]
    assert names(study.waiting) == [LOWER, UPPER]
    finish(cell_of(study, MIDDLE).run, 0.5)
    study, joined = advance(study)
    assert names(joined) == [LOWER]
    assert study.waiting == []
    assert study.agreeing == [f"collapse_atlas/{UPPER}"]


def test_ends_that_agree_leave_out_all_between_them(line: Ablation) -> None:
    study = Study("smoke", ("collapse_atlas",))
    finish(study.cells[0].run, 0.02)
    finish(study.cells[1].run, 0.9, status="nan")
    study, joined = advance(study)
    assert joined == []
    assert study.waiting == []
    assert len(study.agreeing) == 3
    assert list(rows.load(study)["arm"]) == [LOW, HIGH]
    assert "left out between neighbours that agree: 3" in expected_cost(study)
    assert list(plan_table(study, line)["arm"]) == [LOW, HIGH]


def test_seed_0_decides_for_all_seeds(line: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("quick", ("collapse_atlas",), seeds=2)
    for cell, share in zip(study.cells, (0.02, 0.5, 0.5, 0.5), strict=True):
        finish(cell.run, share)
    study, joined = advance(study)
    assert [(cell.arm.name, cell.seed) for cell in joined] == [(MIDDLE, 0), (MIDDLE, 1)]


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_at_most_so_many_arms_are_trained_in_whatever_order_runs_finish(
    line: Ablation, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lines of ends that disagree, and one place left: the middle of the first line takes it."""
    second = [arm("vq", *POINTS[end]) for end in ("low", "high")]
    middle = arm("vq", *POINTS["middle"], between=(second[0].name, second[1].name))
    ends = (*line.arms[:2], *second)
    crowded = replace(line, arms=(*ends, line.arms[2], middle), adaptive=Bisection(collapse=0.1, most=5))
    monkeypatch.setitem(ablations.ABLATIONS, line.name, crowded)
    study = Study("smoke", ("collapse_atlas",))
    cells = list(study.cells)
    joined = []
    for i in order:
        finish(cells[i].run, 0.02 if i % 2 else 0.5)
        study, new = advance(study)
        joined += names(new)
    assert joined == [MIDDLE]
    assert study.beyond == [f"collapse_atlas/{middle.name}"]
    assert "left out for want of room on a map: 1" in expected_cost(study)


def test_a_preset_may_have_room_for_fewer(line: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Study("smoke", ("collapse_atlas",))
    monkeypatch.setattr(Study, "preset", replace(small.preset, max_arms=1))
    study = Study("smoke", ("collapse_atlas",))
    assert names(study.cells) == [LOW]
    assert study.waiting == []
    assert len(study.beyond) == 4


def test_one_sweep_trains_the_ends_and_what_is_between_and_never_again(
    line: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bisection, "has_collapsed", lambda collapse, row: row["code_dim"] < 100)
    study = Study("smoke", ("collapse_atlas",))
    said: list[str] = []
    outcome = train_study(study, device="cpu", say=said.append)
    study, _ = advance(study)
    assert sorted(names(outcome.finished)) == sorted([LOW, HIGH, MIDDLE, UPPER])
    assert outcome.unfinished == []
    assert any(line.startswith("[4/4] ok ") for line in said)
    frame = rows.load(study)
    assert set(frame["status"]) == {"ok"}
    assert frame[["first.logit_spread", "last.max_probability"]].notna().all(axis=None)
    assert train_study(Study("smoke", ("collapse_atlas",)), device="cpu", say=said.append).skipped == 4


def test_a_lost_end_keeps_the_middle_waiting_and_the_command_unfinished(line: Ablation) -> None:
    study = Study("smoke", ("collapse_atlas",))
    broken = study.cells[1].run
    broken.path.mkdir(parents=True)
    broken.config.write_text("{")
    outcome = train_study(study, device="cpu", say=lambda _: None)
    study, _ = advance(study)
    assert names(outcome.failed) == [HIGH]
    assert MIDDLE in names(outcome.unfinished)


def test_status_and_findings_say_what_waits_and_what_is_left_out(line: Ablation) -> None:
    assert CliRunner().invoke(app, ["status", "collapse_atlas", "--preset", "smoke"]).output.count(" waiting ") == 3
    study = Study("smoke", ("collapse_atlas",))
    assert "3 runs wait for their neighbours." in findings.findings(line, rows.load(study))


def test_every_arm_of_the_atlas_comes_after_its_neighbours_and_all_configs_differ() -> None:
    ablation, before = ABLATIONS["collapse_atlas"], set()
    for each in ablation.arms:
        assert set(each.between or ()) <= before, each.name
        assert not each.between or each.name not in each.between
        before.add(each.name)
    assert len(before) == len(ablation.arms)
    for preset in ("smoke", "quick", "gpu"):
        study = Study(preset, ("collapse_atlas",))
        cells = [*study.cells, *study.waiting]
        assert len({cell.run.path for cell in cells}) == len(cells)
        assert len(study.cells) + len(possible(study)) == (10 if preset == "smoke" else 60)


def test_the_atlas_is_trained_only_where_it_is_named() -> None:
    assert set(ABLATIONS) - set(ALL) == {"collapse_atlas", "evidence"}
    assert set(CORE) < set(ALL)
