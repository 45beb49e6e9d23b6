"""Names that try to get out: as markup into a page, as commands into LaTeX, as separators into paths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import ablations
from experiments import rows as rows_module
from experiments.report import pages, tables
from experiments.study import LONGEST_NAME, Study, file_name

HOSTILE = [
    "<script>alert(1)</script>",
    "../../x",
    "\\input{/etc/passwd} $x$ 100% & #1_2^3~",
    "two\nlines",
    "n" * 300,
    ".hidden",
    "ü/ß",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_file_names_stay_in_their_folder(text: str, tmp_path: Path) -> None:
    name = file_name(text)
    assert (tmp_path / name).parent == tmp_path
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert len(name) <= LONGEST_NAME + 9
    assert not name.startswith(".")
    (tmp_path / name).write_text("")


def test_long_names_stay_apart() -> None:
    assert file_name("n" * 300) != file_name("n" * 301)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "text", [HOSTILE[0], " ".join(HOSTILE[1:3]), "\n".join(HOSTILE[3:])], ids=["html", "latex", "long"]
)
def test_a_report_of_hostile_names(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ablation, title, first arm and a changed field all bear the name."""
    honest = ablations.ABLATIONS["vq_vs_ibq"]
    arms = (replace(honest.arms[0], name=text), *honest.arms[1:])
    contrasts = tuple(replace(contrast, claim=text, without=arms[0].name) for contrast in honest.contrasts[:1])
    paper_rows = (replace(honest.paper_rows[0], arm=text), *honest.paper_rows[1:])
    shown = ("usage_over_training", "code_frequency")
    hostile = replace(
        honest,
        figures=shown,
        name=text,
        title=text,
        question=text,
        arms=arms,
        contrasts=contrasts,
        paper_rows=paper_rows,
    )
    honest_study = Study("smoke", (honest.name,))
    rows = rows_module.load(honest_study)
    rows.loc[rows["arm"] == honest.arms[0].name, "arm"] = text
    rows["ablation"] = text
    monkeypatch.setitem(ablations.ABLATIONS, text, hostile)
    monkeypatch.setattr(rows_module, "load", lambda study: rows)
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    cells = [
        replace(c, ablation=hostile, arm=arms[0] if c.arm is honest.arms[0] else c.arm) for c in honest_study.cells
    ]
    study = Study("smoke", (text,), overrides={"model.norm_groups": 4, "quantizer.beta_on": text})
    assert study.report_folder.parent == tmp_path / "reports"
    monkeypatch.setattr(Study, "cells", cells)
    monkeypatch.setattr(Study, "waiting", [])

    written = sorted(pages.write(study).parent.glob("*.html"))
    assert len(written) == 2
    assert not any("<script" in page.read_text() for page in written)
    for file in (tmp_path / "reports").rglob("*"):
        assert file.resolve().is_relative_to((tmp_path / "reports").resolve())
    assert [path.name for path in tmp_path.iterdir()] == ["reports"]
    for tex in (tmp_path / "reports").rglob("*.tex"):
        assert "\\input" not in tex.read_text()
        assert "\n\n" not in tex.read_text()
    assert tables.latex(tables.arms_table(hostile, rows), "t", text).count("\\end{tabular}") == 1
