"""Two smoke studies, each trained once by the real sweep and shared by the tests that read rows: all ablations, and toy
transformers."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from explorer_runs import LONG, PATIENCE_S, config_of, until
from smoke_study import AT_SMOKE
from toy_transformers import TOY

from experiments.ablations import ABLATIONS
from experiments.analysis.projections import project_all
from experiments.explorer.run import ExplorerRun, Workers, new_run
from experiments.report import figures, notebooks, pages
from experiments.report.figures.theme import theme
from experiments.runner import sweep
from experiments.runner.pool import Pool
from experiments.runner.sweep import Outcome, train_study
from experiments.study import Study, advance
from ibq.data import fashion_mnist


@pytest.fixture(scope="session", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """IBQ_RUNS, IBQ_REPORTS, IBQ_CACHE and IBQ_DATA point into a temporary folder, for this process and those it
    starts.

    The images lie there decompressed: a smoke run would spend more time on decompressing them than on its steps.
    """
    root = tmp_path_factory.mktemp("größe und leer")
    (root / "data").mkdir()
    for name, path in fashion_mnist.FILES.find().files.items():
        content = path.read_bytes()
        (root / "data" / name).write_bytes(gzip.decompress(content) if path.suffix == ".gz" else content)
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in (
            ("IBQ_RUNS", "runs"),
            ("IBQ_REPORTS", "reports"),
            ("IBQ_CACHE", "cache"),
            ("IBQ_DATA", "data"),
        ):
            patch.setenv(variable, str(root / folder))
        yield root
    shutil.rmtree(root / "data")


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty folders of runs and reports, for one test alone."""
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))


@pytest.fixture
def loaded_server() -> None:
    """The server that forks trainers has loaded torch, so that a limit of a few seconds is spent on training."""
    Pool(Study("smoke").preset.runtime, threads=1).warm()


@pytest.fixture(scope="session")
def trained(folders: Path) -> tuple[Study, Outcome, list[str]]:
    """The smoke study of all ablations with all its rows, the outcome of the sweep and what the sweep said."""
    said: list[str] = []
    study = Study("smoke", tuple(AT_SMOKE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "POLL_S", 0.02)  # a smoke run takes about as long as a poll
        outcome = train_study(study, device="cpu", say=said.append)
    study, _ = advance(study)
    project_all(study.cells, study.preset.projection, said.append)
    return study, outcome, said


@pytest.fixture(scope="session")
def executed(trained: tuple) -> Study:
    """The smoke study, its notebooks executed into the folder of its report."""
    notebooks.execute_changed(trained[0], say=lambda _: None)
    study: Study = trained[0]
    return study


@contextmanager
def _coarse_pictures() -> Iterator[None]:
    def coarse() -> None:
        theme()
        figures.plt.rcParams.update({"savefig.dpi": 60, "pdf.fonttype": 3})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "theme", coarse)
        yield


@pytest.fixture(scope="module")
def coarse_pictures() -> Iterator[None]:
    """Of few pixels, and fonts of a PDF not subset: half of what a report takes, and nothing that a test looks at."""
    with _coarse_pictures():
        yield


@pytest.fixture(scope="session")
def first_page(trained: tuple) -> Path:
    """Of the report on the smoke study, with coarse pictures."""
    with _coarse_pictures():
        return pages.write(trained[0])


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy ablation of transformers is among the ablations."""
    monkeypatch.setitem(ABLATIONS, "toy", TOY)


@pytest.fixture
def empty(toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The toy study without a run."""
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    return Study("smoke", ("toy",))


@pytest.fixture(scope="session")
def trained_toy(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Outcome, list[str]]:
    """The toy study as one sweep trains it, the outcome and what was said."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ABLATIONS, "toy", TOY)
        patch.setenv("IBQ_RUNS", str(tmp_path_factory.mktemp("toy") / "runs"))
        study = Study("smoke", ("toy",))
        outcome = train_study(study, device="cpu", say=said.append)
        return advance(study)[0], outcome, said


@pytest.fixture
def copied(toy: None, trained_toy: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The trained study in a folder that a test may change, and a folder for its report."""
    shutil.copytree(trained_toy[0].cells[0].run.path.parent, tmp_path / "runs")
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    return Study("smoke", ("toy",))


@pytest.fixture(scope="module")
def workers(folders: Path) -> Iterator[Workers]:
    """Trainers for a file of tests, warm."""
    workers = Workers(device="cpu")
    workers.warm()
    until(lambda: workers.is_warm, "warm workers")
    yield workers
    workers.close(PATIENCE_S)


@pytest.fixture
def make_run(workers: Workers) -> Iterator[Callable[..., ExplorerRun]]:
    """Makes a new run; what still trains at the end of the test is removed."""
    made: list[ExplorerRun] = []

    def run(steps: int = LONG, method: str = "ibq", **dotted: Any) -> ExplorerRun:
        made.append(new_run(config_of(steps, method, **dotted), workers))
        return made[-1]

    yield run
    for each in made:
        workers.remove(each.directory)
        assert each.wait(PATIENCE_S)
