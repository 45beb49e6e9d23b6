"""pdfLaTeX compiles every table of the smoke report and of the published snapshots, and tables of whatever names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from test_hostile_names import HOSTILE

from experiments.report import tables
from experiments.study import ROOT

pytestmark = pytest.mark.latex
PREAMBLE = r"""\documentclass{article}
\usepackage{array,booktabs,graphicx}
\extrafloats{500}
\begin{document}
"""


def compiled(texts: list[str], folder: Path) -> str:
    """The log of pdfLaTeX on one document with these tables; fails on errors, missing glyphs and tables that do not fit
    a page."""
    assert shutil.which("pdflatex"), (
        "pdflatex is not installed; apt-get install --no-install-recommends texlive-latex-base "
        "texlive-latex-recommended"
    )
    body = "\n\\clearpage\n".join(texts)
    (folder / "tables.tex").write_text(f"{PREAMBLE}{body}\n\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "tables.tex"]
    fonts = os.environ | {"TEXMFVAR": str(folder / "texmf-var")}  # bitmaps that TeX makes go into a home otherwise
    done = subprocess.run(command, cwd=folder, env=fonts, capture_output=True, timeout=900)
    log = (folder / "tables.log").read_text(errors="replace").replace("\n", " ")
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert "Missing character" not in log
    return log


def test_every_table_of_the_smoke_report(first_page: Path, tmp_path: Path) -> None:
    folder = first_page.parent / "tables"
    files = sorted(folder.glob("*.tex"))
    assert len(files) == len(list(folder.glob("*.csv"))) == len(list(folder.glob("*.md")))
    log = compiled([path.read_text() for path in files], tmp_path)
    assert "Overfull \\hbox" not in log
    assert not re.search(r"Float too large", log)


@pytest.mark.parametrize(
    "snapshot", sorted((ROOT / "reports" / "published").glob("*/tables")), ids=lambda path: path.parent.name
)
def test_every_published_table(snapshot: Path, tmp_path: Path) -> None:
    compiled([path.read_text() for path in sorted(snapshot.glob("*.tex"))], tmp_path)


def test_tables_of_whatever_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a user without a home too."""
    monkeypatch.delenv("HOME", raising=False)
    signs = (
        "± → ← ≥ ≤ ≈ × − – — … “a” ‘b’ ² ³ · ∞ ° Δ Σ α σ µ μ < > | [0.5, 0.9] * ` ' \" ~ ^ _ % & # $ { } \\ ß ü é "
        "ł 中 文 ﬁ Ω 😀 \u200b"
    )
    table = pd.DataFrame(
        {
            "[*] a_b": ["[1, 2]", "*", "-0.5", *HOSTILE],
            "x": [1.0, float("nan"), -2.0, *range(len(HOSTILE))],
            signs: [signs, *["–"] * (2 + len(HOSTILE))],
        }
    )
    compiled([tables.latex(table, "t", signs), tables.latex(table.iloc[:, :2], "u", HOSTILE[2])], tmp_path)
