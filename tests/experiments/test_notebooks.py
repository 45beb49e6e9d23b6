from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import nbformat
import papermill.parameterize
import psutil
import pytest
from nbclient import NotebookClient
from transformer_rows import NOT_AT_SMOKE

from experiments.ablations import ABLATIONS, Ablation
from experiments.explorer.tabs import TABS
from experiments.notebook import check
from experiments.report import notebooks
from experiments.study import ROOT, Study
from ibq.errors import ConfigError

PATIENCE_S = 1800.0
"""Beyond which a notebook hangs: one that takes a minute may take half an hour on a machine that others load."""
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
KINDS = [path for path in SOURCES if path.stem[:2] in ("01", "09")]
"""A notebook of an ablation and one with widgets."""
OF_ABLATIONS = {ablation.notebook: ablation for ablation in ABLATIONS.values() if ablation.notebook}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_committed_without_outputs_and_with_one_parameters_cell(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    assert (
        subprocess.run([sys.executable, "-m", "nbstripout", "--verify", str(path)], capture_output=True).returncode == 0
    )


def test_every_notebook_belongs_to_an_ablation_but_the_one_on_the_mechanism_and_the_interactive_ones() -> None:
    assert {*OF_ABLATIONS, notebooks.MECHANISM, *notebooks.INTERACTIVE} == {path.stem for path in SOURCES}


@pytest.mark.parametrize("name", sorted(OF_ABLATIONS))
def test_a_notebook_shows_what_its_ablation_shows(name: str) -> None:
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
    ablation = OF_ABLATIONS[name]
    assert re.findall(r'show\(\\"(\w+)\\"\)', text) == list(ablation.figures)
    shown = re.findall(r'show_table\(\\"(\w+)\\", ablation, table\)', text)
    assert set(shown) | {"verdicts"} == set(ablation.tables)
    assert "show_finding(ablation, table)" in text  # and with it the verdicts


@pytest.mark.notebooks
@pytest.mark.parametrize("name", sorted(OF_ABLATIONS))
def test_what_an_executed_notebook_shows(name: str, executed: Study) -> None:
    require_shown(OF_ABLATIONS[name], executed.report_folder / "notebooks" / f"{name}.ipynb")


@pytest.mark.notebooks
@pytest.mark.usefixtures("trained")
def test_runs_under_papermill_from_any_folder(tmp_path: Path) -> None:
    path, out = ROOT / "notebooks" / "01_vq_vs_ibq.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(path), str(out), "-p", "preset", "smoke", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    require_shown(OF_ABLATIONS["01_vq_vs_ibq"], out)


def require_shown(ablation: Ablation, path: Path) -> None:
    """All figures and tables of an ablation stand in an executed notebook, and nothing on stderr."""
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(set(ablation.figures) - NOT_AT_SMOKE)
    texts = " ".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert ("PCA" in texts) == bool(ablation.mapped or any(arm.followed for arm in ablation.arms))
    assert "UMAP" not in texts
    assert ("| verdict" in texts) == bool(ablation.contrasts)
    assert set(re.findall(r"No data yet for (\w+)", texts)) == set(ablation.figures) & NOT_AT_SMOKE
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


OWN = 'preset = "quick"\nseeds = None\noverrides = {}\nslots = None'
CHECK = "import experiments.notebook\nexperiments.notebook.check(globals())"
LATER = "from functools import partial\nstudy = ablation = 1"


def test_run_all_twice_in_a_kernel_that_has_names_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    startup = tmp_path / "profile_default" / "startup" / "00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("import math\npi, presets = 3, [1]\ndef helper(): ...\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sources = [OWN, '# Parameters\npreset = "smoke"', "%matplotlib inline", CHECK, LATER] * 2
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3").execute()


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([OWN, LATER, "seeds = 3"], ""),
        ([OWN.replace("seeds", "seed")], "notebook parameter 'seed' does not exist; did you mean 'seeds'?"),
        (
            [OWN, '# Parameters\npre_set = "smoke"'],
            "notebook parameter 'pre_set' does not exist; did you mean 'preset'?",
        ),
        ([OWN.replace("seeds", "seed"), OWN], ""),
        (
            [OWN, LATER, OWN.replace("slots", "slot")],
            "notebook parameter 'slot' does not exist; did you mean 'slots'?",
        ),
        (["preset"], "notebook parameter 'preset' has no value; run the cell of the parameters first"),
        ([OWN + "\nseeds: str = 'three'"], "notebook parameter seeds='three' is of type str; it must be int or None"),
    ],
)
def test_only_what_the_parameters_cell_or_papermill_assigned_is_a_parameter(cells: list[str], said: str) -> None:
    namespace: dict[str, object] = {"In": ["", *cells, CHECK]}
    for source in cells:
        exec(source, namespace) if "=" in source else None
    with pytest.raises(ConfigError) if said else nullcontext() as caught:
        check(namespace)
    assert said in ("", str(getattr(caught, "value", "")))


@pytest.mark.notebooks
@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.stem)
def test_run_all_again_in_one_kernel(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem in notebooks.INTERACTIVE:
        monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    once = papermill.iorw.load_notebook_node(str(path))
    given = papermill.parameterize.parameterize_notebook(once, {"preset": "smoke"}, kernel_name="python3")
    again = copy.deepcopy(given.cells)
    for number, cell in enumerate(again):
        cell.id = f"again-{number}"
    twice = nbformat.v4.new_notebook(cells=given.cells + again)
    NotebookClient(twice, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.notebooks
def test_the_notebook_on_the_mechanism_runs_and_refuses_parameters_that_it_has_not(tmp_path: Path) -> None:
    path, out = ROOT / "notebooks" / f"{notebooks.MECHANISM}.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(path), str(out), "--no-progress-bar"]
    done = subprocess.run(
        [*command, "-p", "seed", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [output for cell in nbformat.read(out, as_version=4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    refused = subprocess.run(
        [*command, "-p", "sead", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "notebook parameter 'sead' does not exist; did you mean 'seed'?" in refused.stderr


@pytest.mark.notebooks
def test_the_explorer_runs_without_a_browser_leaves_no_process_and_refuses_what_it_has_not(tmp_path: Path) -> None:
    path, out = ROOT / "notebooks" / "09_collapse_explorer.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(path), str(out), "--no-progress-bar", "-p", "preset"]
    runs = {"IBQ_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(
        [*command, "smoke"], cwd=tmp_path, env=os.environ | runs, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [output for cell in nbformat.read(out, as_version=4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(TABS)
    texts = " ".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert all(tab.caption in texts for tab in TABS.values())
    assert "Diagnosis of A, VQ K=32 D=8" in texts
    assert "Diagnosis of B, IBQ K=32 D=8" in texts
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    rows = [json.loads(row.read_text()) for row in sorted((tmp_path / "runs" / "explore").glob("*/row.json"))]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert [process for process in psutil.process_iter() if _is_ours(process, str(tmp_path / "runs"))] == []
    refused = subprocess.run(
        [*command, "smok"], cwd=tmp_path, env=os.environ | runs, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "preset 'smok' does not exist; did you mean 'smoke'?" in refused.stderr


def _is_ours(process: psutil.Process, runs: str) -> bool:
    """True if a process is one of the explorer's with this folder of runs."""
    try:
        return "experiments.explorer" in " ".join(process.cmdline()) and process.environ().get("IBQ_RUNS") == runs
    except psutil.Error:
        return False


@pytest.mark.notebooks
def test_the_playground_runs_without_a_browser_and_refuses_what_it_has_not(tmp_path: Path) -> None:
    path, out = ROOT / "notebooks" / "10_two_dimensional_playground.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(path), str(out), "--no-progress-bar"]
    done = subprocess.run(
        [*command, "-p", "preset", "smoke"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [output for cell in nbformat.read(out, as_version=4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    texts = " ".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert "IBQ as released" in texts
    assert "Distance 2: a step pulls" in texts
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    refused = subprocess.run(
        [*command, "-p", "preset", "smok"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "the playground has no preset 'smok'; did you mean 'smoke'?" in refused.stderr


def test_executed_once_then_only_when_something_changed(
    trained: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study: Study = trained[0]
    executed: list[str] = []

    def fake_papermill(source: Path, target: Path, study: Study, parameters: dict) -> None:
        executed.append(source.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())

    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path))
    monkeypatch.setattr(notebooks, "execute", fake_papermill)
    for _ in range(2):
        notebooks.execute_changed(study, say=lambda _: None)
    everything = [notebooks.MECHANISM, *(ablation.notebook for ablation in study.ablations if ablation.notebook)]
    assert executed == everything
    page = (study.report_folder / "notebooks" / "01_vq_vs_ibq.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    monkeypatch.setattr(notebooks, "_fingerprint", lambda *_: "changed")
    notebooks.execute_changed(study, say=lambda _: None)
    assert executed == everything * 2


def test_machine_paths_are_taken_out() -> None:
    text = json.dumps({"path": f"{ROOT}/runs", "home": str(Path.home() / ".cache")})
    assert str(ROOT) not in notebooks.without_machine_paths(text)
    assert str(Path.home()) not in notebooks.without_machine_paths(text)
