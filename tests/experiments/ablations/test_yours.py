"""Quantizers of one's own in the comparison: arms like the others, runs of their own, and nothing else changed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_files import SOURCE, source, write
from typer.testing import CliRunner

from experiments.ablations import ABLATIONS, include_plugins
from experiments.cli import app
from experiments.explorer.export import command_text
from experiments.report.configs import differing_fields
from experiments.report.figures.theme import method_colors
from experiments.runner import plan
from experiments.runner.runs import compare
from experiments.study import ROOT, Study
from ibq import plugins
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory, save_source, write_json

runner = CliRunner()


@pytest.fixture
def mine(own_plugins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with two arms, and the comparison as it was after the test."""
    monkeypatch.setitem(ABLATIONS, "quantizers", ABLATIONS["quantizers"])
    return write(tmp_path, text=SOURCE + "ARMS = {'mine': {}, 'mine_soft': {'beta': 0.5, 'code_dim': 4}}\n")


def included(*files: Path) -> Study:
    plugins.use(files)
    include_plugins()
    return Study("quick", ("quantizers",), seeds=1)


def ids(study: Study) -> dict[str, str]:
    return {cell.arm.name: cell.run.path.name for cell in [*study.cells, *study.waiting]}


def test_the_arms_join_and_those_of_before_keep_their_runs(mine: Path) -> None:
    before = ids(Study("quick", ("quantizers",), seeds=1))
    study = included(mine)
    after = ids(study)
    assert before == {name: after[name] for name in before}
    rates = ("0.0003", "0.001", "0.003")
    new = {name for arm in ("mine", "mine_soft") for name in (arm, *(f"{arm}: optim.lr {rate}" for rate in rates))}
    assert after.keys() - before.keys() == new
    assert len({after[name] for name in new}) == len(new)


def test_an_arm_has_the_methods_defaults_at_the_presets_sizes(mine: Path) -> None:
    study = included(mine)
    ablation = study.ablations[0]
    assert ablation is ABLATIONS["quantizers"]
    config, soft, vq = (study.config_of(ablation, ablation.arm(name)) for name in ("mine", "mine_soft", "vq"))
    assert (config.quantizer.codebook_size, config.quantizer.code_dim, config.steps) == (1024, 64, vq.steps)
    assert (soft.quantizer.code_dim, soft.quantizer.beta) == (4, 0.5)
    sha256 = plugins.loaded()[0].sha256[:8]
    assert ablation.arm("mine").levels == {"family": "yours", "method": f"mine at its defaults (mine.py {sha256})"}
    assert ablation.arm("mine_soft").levels["method"] == f"mine with beta=0.5, code_dim=4 (mine.py {sha256})"
    for arm in ablation.arms:
        assert all(arm.levels[factor.name] in factor.levels for factor in ablation.factors)
    assert "yours" in method_colors(ablation)
    assert list(differing_fields(study, ablation)[0]["arm"])[-2:] == ["mine", "mine_soft"]


def test_the_report_has_a_folder_of_its_own_and_the_command_names_the_file(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Study().name == "quick"
    study = included(mine)
    assert study.name == "quick+plugin=mine"
    assert Study("quick", overrides={"steps": 5}).name == "quick+steps=5+plugin=mine"
    command = ["python -m experiments run quantizers --preset quick --seeds 1 --plugin"]
    assert plan.command(study, "quantizers") == f"{command[0]} {mine}"
    monkeypatch.chdir(mine.parent)
    assert plan.command(study, "quantizers") == f"{command[0]} mine.py"
    assert command_text(study.config_of(study.ablations[0], study.ablations[0].arm("mine"))).endswith(
        "--base quantizers/mine --plugin mine.py"
    )


def test_the_name_of_another_arm_is_refused(mine: Path) -> None:
    first = included(mine).ablations[0]
    taken = write(mine.parent, "taken.py", source("other") + "ARMS = {'vq_ema': {}}\n")
    with pytest.raises(
        ConfigError, match=r"^the arm 'vq_ema' of the plugin .*taken\.py is an arm of quantizers already"
    ):
        included(taken)
    assert ABLATIONS["quantizers"] is first


def test_the_commands_take_the_file(mine: Path) -> None:
    planned = runner.invoke(app, ["plan", "quantizers", "--preset", "smoke", "--plugin", str(mine)])
    assert planned.exit_code == 0, planned.output
    assert "mine at its defaults (mine.py " in planned.output
    assert os.environ[plugins.VARIABLE] == str(mine)
    listed = runner.invoke(app, ["list", "--quantizers"])
    assert " mine " in listed.output
    status = runner.invoke(app, ["status", "quantizers", "--preset", "smoke", "--plugin", str(mine)])
    assert "quantizers/mine_soft: optim.lr 0.0003 seed 0" in status.output


@pytest.mark.usefixtures("own_plugins")
@pytest.mark.parametrize("command", ["plan", "run", "status", "report", "evaluate", "list", "train", "rerun"])
def test_a_file_that_is_none_is_one_sentence(command: str) -> None:
    named = {"list": [], "train": ["imagenet256_ibq_1024"], "rerun": ["vq-s0"]}.get(command, ["quantizers"])
    result = runner.invoke(app, [command, *named, "--plugin", "no.py"])
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("no.py cannot be read (No such file or directory); name a file")


def test_two_sources_of_one_method_are_two_runs_that_can_be_compared(
    mine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = []
    for text in (SOURCE, SOURCE + "# changed\n"):
        monkeypatch.setattr(plugins, "_loaded", {})
        plugins._registry().pop("mine", None)
        study = included(write(tmp_path, "mine.py", text))
        cell = next(cell for cell in study.waiting if cell.arm.name == "mine")
        run = RunDirectory(tmp_path / cell.run.path.name)
        write_json(run.config, cell.config.to_json_dict())
        save_source("mine", run.path)
        runs.append(run)
    assert runs[0].path.name != runs[1].path.name
    assert [line[0] for line in compare(*runs)] == ["plugin_sha256"]


@pytest.mark.notebooks
@pytest.mark.usefixtures("trained")
def test_a_study_with_a_quantizer_of_ones_own(mine: Path, tmp_path: Path) -> None:
    """The whole command: what is built in is trained already, so that only the new arms and their search are."""
    command = [sys.executable, "-m", "experiments", "run", "quantizers", "--preset", "smoke", "--plugin", "mine.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IBQ_REPORTS": str(tmp_path / "reports")}
    done = subprocess.run(command, cwd=mine.parent, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "training 6 runs on " in done.stdout
    folder = tmp_path / "reports" / "smoke+plugin=mine"
    with open(folder / "rows.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "mine"]
    assert {row["status"] for row in rows} == {"ok"}
    assert len(rows) == 8
    assert {row["config.plugin_sha256"] for row in rows} == {plugins.sha256_of(mine.read_bytes())}
    for file in ("tables/quantizers_arms.tex", "tables/quantizers_search.md", "notebooks/07_quantizers.html"):
        assert "mine" in (folder / file).read_text(), file
    assert "mine at its defaults (mine.py " in (folder / "quantizers.html").read_text()
    assert "--plugin mine.py" in (folder / "index.html").read_text()
