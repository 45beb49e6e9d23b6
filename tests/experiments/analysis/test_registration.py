"""Claims are registered by what defines them, and those that are not known to be older than their runs are told
apart."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from experiments import rows
from experiments.ablations import ABLATIONS, Ablation, Contrast
from experiments.analysis import registration
from experiments.study import Study
from ibq.run_directory import append_line, read_lines

ABLATION = ABLATIONS["vq_vs_ibq"]
CLAIM = ABLATION.contrasts[0]
STATED = datetime(2026, 12, 1, 12, tzinfo=UTC)


def test_every_claim_is_registered_as_it_stands() -> None:
    """A claim that was changed has to be registered anew: python -m experiments register."""
    known = registration.dates()
    assert [
        f"{ablation.name}: {claim.name}"
        for ablation in ABLATIONS.values()
        for claim in ablation.contrasts
        if registration.digest(ablation, claim) not in known
    ] == []
    assert max(known.values()) <= datetime.now(UTC)
    lines = read_lines(registration.REGISTER)
    assert len({line["hash"] for line in lines}) == len(lines)


@pytest.mark.parametrize(
    "change",
    [{"claim": "Another wording."}, {"effect": 2.0}, {"outcome": "usage"}, {"keeps": True}, {"with_": "ibq_fair"}],
    ids=lambda change: next(iter(change)),
)
def test_what_defines_a_claim_changes_its_hash(change: dict) -> None:
    assert registration.digest(ABLATION, replace(CLAIM, **change)) != registration.digest(ABLATION, CLAIM)


def test_names_and_the_papers_numbers_do_not_change_it() -> None:
    renamed = replace(CLAIM, name="another", paper="Table 9", with_="renamed")
    arms = tuple(replace(arm, name="renamed") if arm.name == CLAIM.with_ else arm for arm in ABLATION.arms)
    same = replace(ABLATION, name="another", arms=arms)
    assert registration.digest(same, renamed) == registration.digest(ABLATION, CLAIM)


def test_a_change_of_an_arm_is_another_claim_also_of_a_transformer() -> None:
    def changed(ablation: Ablation, claim: Contrast, **fields: dict) -> str:
        arms = tuple(replace(arm, **fields) if arm.name == claim.with_ else arm for arm in ablation.arms)
        return registration.digest(replace(ablation, arms=arms), claim)

    assert changed(ABLATION, CLAIM, changes={"optim.lr": 1e-3}) != registration.digest(ABLATION, CLAIM)
    generation = ABLATIONS["generation"]
    claim = generation.contrasts[0]
    assert changed(generation, claim) == registration.digest(generation, claim)
    assert changed(generation, claim, transformer={"model.depth": 7}) != registration.digest(generation, claim)


def test_registering_appends_and_rewrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = registration.REGISTER.read_bytes().splitlines(keepends=True)
    known = tmp_path / "claims.jsonl"
    known.write_bytes(b"".join(lines[1:]))
    monkeypatch.setattr(registration, "REGISTER", known)
    before = datetime.now(UTC).replace(microsecond=0)
    (name,) = registration.register()
    line = read_lines(registration.REGISTER)[-1]
    assert name == f"{line['ablation']}: {line['claim']}"
    assert datetime.fromisoformat(line["registered"]) >= before
    assert known.read_bytes().startswith(b"".join(lines[1:]))
    assert registration.register() == []


def judged_rows(*started: datetime | None) -> pd.DataFrame:
    """A row for each start."""
    return pd.DataFrame(
        [
            {"arm": f"arm_{i}", "seed": i, "started": at and at.isoformat(timespec="seconds")}
            for i, at in enumerate(started)
        ]
    )


@pytest.mark.parametrize(
    ("started", "reason"),
    [
        ((STATED, STATED + timedelta(hours=1)), ""),
        (
            (STATED + timedelta(hours=1), STATED - timedelta(seconds=1)),
            "registered after the run of arm_1 seed 1 began",
        ),
        ((STATED - timedelta(hours=1), None), "start of its runs unknown"),
        ((), ""),
    ],
)
def test_a_claim_that_is_younger_than_a_run_is_exploratory(started: tuple, reason: str) -> None:
    registered = {registration.digest(ABLATION, CLAIM): STATED}
    assert registration.exploratory(ABLATION, CLAIM, judged_rows(*started), registered) == reason


def test_rows_without_starts_and_claims_without_a_line_say_so() -> None:
    judged = judged_rows(STATED)
    assert registration.exploratory(ABLATION, CLAIM, judged, {}) == "not registered"
    registered = {registration.digest(ABLATION, CLAIM): STATED}
    unknown = judged.drop(columns="started")
    assert registration.exploratory(ABLATION, CLAIM, unknown, registered) == "start of its runs unknown"


def test_rows_have_the_start_of_a_runs_first_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("smoke", (ABLATION.name,))
    run = study.cells[0].run
    for event, at in (("damaged", None), ("started", STATED), ("stopped", STATED), ("started", datetime.now(UTC))):
        append_line(run.attempts, {"event": event} | ({"time": at.timestamp()} if at else {}))
    frame = rows.load(study)
    assert frame["started"].dropna().tolist() == [STATED.isoformat(timespec="seconds")]
    assert pd.notna(frame.loc[0, "started"])
