from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import ablations
from experiments.ablations import ABLATIONS, Ablation
from experiments.ablations.base import Factor
from experiments.ablations.changes import Times, together
from experiments.ablations.crossing import crossed, thinned
from experiments.study import Study

FULL = ABLATIONS["second_collapse"]
SMALL = replace(
    FULL,
    arms=(FULL.arm("vq"), FULL.arm("vq_late")),
    contrasts=tuple(claim for claim in FULL.contrasts if (claim.without, claim.with_) == ("vq", "vq_late")),
)
STEPS = Factor("steps", ("×1", "×3"), "of training")
TIMES = {"×1": {}, "×3": {"steps": Times(3)}}


@pytest.fixture
def longer(monkeypatch: pytest.MonkeyPatch) -> Ablation:
    ablation = crossed(SMALL, STEPS, TIMES, tuned_at="×1")
    monkeypatch.setitem(ablations.ABLATIONS, ablation.name, ablation)
    return ablation


def test_arms_and_claims_stand_at_every_level(longer: Ablation) -> None:
    assert [arm.name for arm in longer.arms] == ["vq, ×1", "vq_late, ×1", "vq, ×3", "vq_late, ×3"]
    assert [arm.levels["steps"] for arm in longer.arms] == ["×1", "×1", "×3", "×3"]
    assert len(longer.contrasts) == 2 * len(SMALL.contrasts)
    assert len({claim.name for claim in longer.contrasts}) == len({c.claim for c in longer.contrasts}) == 4
    assert {(claim.without, claim.with_) for claim in longer.contrasts} == {
        ("vq, ×1", "vq_late, ×1"),
        ("vq, ×3", "vq_late, ×3"),
    }
    assert longer.contrasts[-1].claim.endswith("(steps: ×3).")


def test_a_longer_run_takes_the_rate_of_the_short_ones_search_and_keeps_schedule_and_window(longer: Ablation) -> None:
    assert [arm.tuned_as for arm in longer.arms] == [None, "vq, ×1", "vq, ×1", "vq, ×1"]
    study = Study("quick", (longer.name,))
    one, three = (study.config_of(longer, longer.arm(name)) for name in ("vq, ×1", "vq, ×3"))
    assert three.steps == 3 * one.steps
    assert three.optim.ema_decay**three.steps == pytest.approx(one.optim.ema_decay**one.steps, rel=1e-3)
    assert three.optim.milestones == one.optim.milestones  # shares of the run
    own = crossed(SMALL, STEPS, TIMES)
    assert [arm.tuned_as for arm in own.arms] == [None, "vq, ×1", None, "vq, ×3"]


def test_multiples_of_one_field_are_multiplied() -> None:
    assert together({"steps": Times(0.5), "a": 1}, {"steps": Times(3), "a": 2}) == {"steps": Times(1.5), "a": 2}
    assert together({"steps": Times(0.5)}, {"steps": 7}) == {"steps": 7}


def test_arms_without_seeds_and_claims_on_them_are_left_out(longer: Ablation) -> None:
    thin = thinned(longer, lambda arm: 0 if arm.name == "vq_late, ×3" else 5)
    assert [(arm.name, arm.seeds) for arm in thin.arms] == [("vq, ×1", 5), ("vq_late, ×1", 5), ("vq, ×3", 5)]
    assert {claim.with_ for claim in thin.contrasts} == {"vq_late, ×1"}


def test_reported_seeds_may_begin_later_than_those_of_the_search(
    longer: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = thinned(replace(longer, first_seed=10), lambda arm: 2)
    monkeypatch.setitem(ablations.ABLATIONS, fresh.name, fresh)
    study = Study("quick", (fresh.name,))
    assert {cell.seed for cell in study.cells if cell.search} == {0}
    assert {cell.seed for cell in [*study.cells, *study.waiting] if not cell.search} == {10, 11}
