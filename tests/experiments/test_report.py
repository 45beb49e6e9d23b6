from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments import figures, report, rows, tables
from experiments.ablations import ABLATIONS, Arm
from experiments.effects import effects
from experiments.findings import findings
from experiments.study import Study

ABLATION = ABLATIONS["vq_vs_ibq"]


@pytest.fixture(scope="module")
def page(trained: tuple) -> Path:
    return report.write(trained[0])


def test_everything_is_there_and_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    expected = {f"{ablation.name}_{name}" for ablation in ABLATIONS.values() for name in ablation.figures}
    assert {path.stem for path in (page.parent / "figures").iterdir()} == expected
    targets = re.findall(r'(?:href|src)="([^"#]+)"', text)
    assert len(targets) > 2 * len(expected)
    for target in targets:
        assert (page.parent / target).is_file(), target


def test_the_page_is_self_contained(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)
    assert "@import" not in text
    assert "url(" not in text


def test_two_reports_on_the_same_rows_are_the_same_bytes(page: Path, trained: tuple) -> None:
    files = sorted(path for path in page.parent.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    report.write(trained[0])
    changed = [path.name for path in files if path.read_bytes() != before[path]]
    assert changed == []


def test_a_study_without_rows_renders_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "none"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    study = Study("smoke", tuple(ABLATIONS))
    text = report.write(study).read_text()
    assert "vq_published seed 0: pending" in text
    assert "simvq seed 0: waiting (waits for the search of simvq, 0 of 3 runs finished)" in text
    assert "<img" not in text
    assert set(rows.load(study)["status"]) == {"pending", "waiting"}


def test_a_new_quantizer_needs_a_level_and_an_arm(trained: tuple) -> None:
    """What the README asks of a new quantizer is enough for every table and figure."""
    method = replace(ABLATION.factors[0], levels=(*ABLATION.factors[0].levels, "noisy"))
    arm = Arm("noisy", dict(ABLATION.arm("vq_published").levels) | {"estimator": "noisy"}, focal=True)
    extended = replace(ABLATION, factors=(method, *ABLATION.factors[1:]), arms=(*ABLATION.arms, arm))
    frame = rows.load(trained[0])
    line = frame.iloc[[0]].assign(arm="noisy", **{"factor.estimator": "noisy"})
    frame = pd.concat([frame, line], ignore_index=True)
    for name in extended.tables:
        assert len(tables.build(name, extended, frame)) > 0, name
    for name in ("rate_distortion", "main_effects"):
        figure = figures.draw(name, trained[0], extended, frame)
        assert figure is not None
        figures.plt.close(figure)
    assert "estimator: VQ → noisy" in set(effects(extended, frame)["change"])


def test_findings_name_every_claim_and_missing_runs(trained: tuple) -> None:
    frame = rows.load(trained[0])
    sentences = findings(ABLATION, frame)
    for contrast in ABLATION.contrasts:
        assert any(sentence.startswith(contrast.claim) for sentence in sentences)
    assert not any("confirmed" in sentence.lower() for sentence in sentences)  # one seed
    frame.loc[0, "status"] = "failed"
    assert findings(ABLATION, frame)[0].startswith("1 of 13 runs have no result (1 failed)")


def test_findings_admit_that_more_codes_can_mean_more_error() -> None:
    lines = []
    for arm in ABLATION.arms:
        high = arm.levels["entropy"] == "on"
        lines.append(
            {
                "ablation": ABLATION.name,
                "arm": arm.name,
                "seed": 0,
                "status": "ok",
                "bits": 8.0 if high else 2.0,
                "l1": 0.2 if high else 0.1,
            }
        )
    sentences = findings(ABLATION, pd.DataFrame(lines))
    assert any(s.startswith("More codes in use did not mean a lower error") and "entropy: off → on (+6.00 bits" in s for s in sentences)


def test_a_hostile_reason_is_escaped(trained: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path))
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    frame = rows.load(trained[0])
    frame["reason"] = None
    frame.loc[0, ["status", "reason"]] = ["failed", "<script>alert(1)</script>"]
    monkeypatch.setattr(rows, "load", lambda study: frame)
    text = report.write(trained[0]).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
