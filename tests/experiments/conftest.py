"""One smoke study, trained once by the real sweep and shared by every test that reads rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.ablations import ABLATIONS
from experiments.projections import project_all
from experiments.study import Study
from experiments.sweep import Outcome, train_study


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """IBQ_RUNS and IBQ_REPORTS point into a temporary folder, for this process and those it starts."""
    root = tmp_path_factory.mktemp("größe und leer")
    before = {name: os.environ.get(name) for name in ("IBQ_RUNS", "IBQ_REPORTS")}
    os.environ.update(IBQ_RUNS=str(root / "runs"), IBQ_REPORTS=str(root / "reports"))
    yield root
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def trained(folders: Path) -> tuple[Study, Outcome, list[str]]:
    """The smoke study of all ablations with all its rows, the outcome of the sweep and what the sweep said."""
    said: list[str] = []
    study = Study("smoke", tuple(ABLATIONS))
    outcome = train_study(study, device="cpu", say=said.append)
    project_all(study.cells, study.preset.projection, said.append)
    return study, outcome, said
