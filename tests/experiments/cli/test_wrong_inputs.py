"""Mistakes of users, each with its error message: exit code 2, one line on stderr that holds what was given and what is
allowed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from experiments import notebook
from experiments.cli import app
from experiments.study import Study
from ibq import load_tokenizer
from ibq.errors import ConfigError
from ibq.quantizers import Quantizer

runner = CliRunner()


def sentence(*command: str) -> str:
    """The one line that a wrong command prints."""
    result = runner.invoke(app, list(command))
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lr", ["'optim.lr'", "field=value"]),
        ("optim.rl=1", ["'optim.rl'", "'optim.lr'"]),
        ("learning_rate=1", ["'learning_rate'"]),
        ("quantizer=1", ["'quantizer'"]),
        ("quantizer.codebook_sise=8", ["'quantizer.codebook_sise'", "'quantizer.codebook_size'"]),
        ("codebook_size=8", ["'codebook_size'", "'quantizer.codebook_size'"]),
        ("steps=0", ["steps", "greater than or equal to 1", "0"]),
        ("steps=-3", ["steps", "-3"]),
        ("steps=many", ["steps", "'many'"]),
        ("steps=2.5", ["steps", "2.5"]),
        ("steps=true", ["steps", "True"]),
        ("batch_size=0", ["batch_size", "0"]),
        ("quantizer.codebook_size=0", ["codebook_size", "0"]),
        ("quantizer.code_dim=-4", ["code_dim", "-4"]),
        ("quantizer.beta=NaN", ["beta", "nan"]),
        ("quantizer.beta_on=everything", ["beta_on", "'everything'", "'commitment'"]),
        ("quantizer.codebook_init=random", ["codebook_init", "'random'", "'features'"]),
        ("quantizer.entropy_temperature=0", ["entropy_temperature", "0"]),
        ("quantizer.method=vqq", ["'vqq'", ", ".join(sorted(Quantizer.registry))]),
        ("optim.lr=Infinity", ["lr", "inf"]),
        ("optim.lr=fast", ["lr", "'fast'"]),
        ("optim.betas=[0.5,1.5]", ["betas=(0.5, 1.5)", "[0, 1)"]),
        ("optim.milestones=[0.9,0.5]", ["milestones=(0.9, 0.5)", "ascending"]),
        ("model.norm_groups=3", ["norm_groups=3", "base_channels=4"]),
        ("model.channel_multipliers=[]", ["channel_multipliers"]),
        ("model.attention_resolutions=[7]", ["attention_resolutions=(7,)", "[32, 16, 8]"]),
        ("data.resolution=64", ["64", "32"]),
        ("data.name=mnist", ["'mnist'", "fashion-mnist"]),
        ("precision=fp8", ["precision", "'fp8'", "'bf16'"]),
        ("seed=-1", ["seed", "-1"]),
    ],
)
def test_fields(change: str, words: list[str]) -> None:
    line = sentence("run", "--preset", "smoke", "--set", change)
    assert all(word in line for word in words), line


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan --preset qick", ["'qick'", "'quick'"]),
        ("run vq_vs_ibqq --preset smoke", ["'vq_vs_ibqq'", "'vq_vs_ibq'"]),
        ("run --preset smoke --seeds 0", ["seeds=0", "at least 1"]),
        ("run --preset smoke --slots 0 --set steps=3", ["slots=0", "at least 1"]),
        ("run --preset smoke --time-budget -1 --set steps=3", ["-1 minutes", "more than 0"]),
        ("run --preset smoke --device cuda:9 --set steps=3", ["'cuda:9'", "'cpu'"]),
        ("run --preset smoke --device tpu --set steps=3", ["'tpu'", "cpu"]),
        ("forget nonsense", ["'nonsense'", "no run has that id"]),
        ("forget ../../etc", ["'../../etc'"]),
        ("forget vq", ["'vq'", "runs begin with it"]),
        ("compare vq-s0 ibq-s7", ["runs begin with it"]),
        ("rerun ibq-s7", ["'ibq-s7'"]),
        ("evaluate --preset smoke --metric full_tset", ["'full_tset'", "'full_test'"]),
    ],
)
def test_arguments(command: str, words: list[str]) -> None:
    line = sentence(*command.split())
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pre_set": "smoke"}, ["'pre_set'", "'preset'"]),
        ({"seed": 3}, ["'seed'", "'seeds'"]),
        ({"preset": 3}, ["preset=3", "int", "str"]),
        ({"seeds": "three"}, ["seeds='three'", "int or None"]),
        ({"seeds": True}, ["seeds=True", "bool"]),
        ({"overrides": [1]}, ["overrides=[1]", "dict"]),
    ],
)
def test_notebook_parameters(given: dict, words: list[str]) -> None:
    injected = {
        "preset": "smoke",
        "seeds": None,
        "overrides": {},
        "slots": None,
        "_i": "",
        "json": json,
    }
    notebook.check(injected)
    with pytest.raises(ConfigError) as caught:
        notebook.check(injected | given)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def broken_model(folder: Path, kind: str) -> None:
    """Damage a copy of a finished run's model in one way."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "pickle":
        weights.write_bytes(pickle.dumps({"state_dict": torch.zeros(3)}))
    elif kind == "shape":
        tensors = load_file(weights)
        tensors["quantize.embedding"] = torch.zeros(7, 3)
        save_file(tensors, weights)
    elif kind == "missing tensor":
        tensors = load_file(weights)
        del tensors["quantize.embedding"]
        save_file(tensors, weights)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "absent":
        weights.unlink()
    elif kind == "NaN":
        config.write_text(config.read_text().replace('"lr": 0.001', '"lr": NaN'))
    elif kind == "unknown key":
        config.write_text(config.read_text().replace('"steps"', '"stepps"'))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pickle", ["model.safetensors"]),
        ("shape", ["model.safetensors", "quantize.embedding"]),
        ("missing tensor", ["quantize.embedding"]),
        ("truncated", ["model.safetensors"]),
        ("absent", ["holds no model.safetensors"]),
        ("NaN", ["optim.lr", "nan"]),
        ("unknown key", ["stepps"]),
    ],
)
def test_models(trained: tuple, tmp_path: Path, kind: str, words: list[str]) -> None:
    run = trained[0].cells[0].run
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    load_tokenizer(tmp_path)
    broken_model(tmp_path, kind)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.fixture
def copied_run(trained: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study whose first run is a copy, to be damaged."""
    source = trained[0].cells[0].run.path
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("smoke")
    for path in source.rglob("*"):
        if path.is_file():
            target = study.cells[0].run.path / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return study


def test_a_row_of_another_run(copied_run: Study) -> None:
    run = copied_run.cells[0].run
    run.row.write_text(json.dumps(run.read_row() | {"run": "ibq-s0-000000000000"}))
    line = sentence("status", "--preset", "smoke")
    assert "'ibq-s0-000000000000'" in line
    assert run.path.name in line


def test_a_damaged_row(copied_run: Study) -> None:
    copied_run.cells[0].run.row.write_text('{"run": "vq')
    assert "is not JSON" in sentence("report", "--preset", "smoke")


def test_a_damaged_config(copied_run: Study) -> None:
    run = copied_run.cells[0].run
    run.config.write_text("{")
    assert "config.json cannot be read" in sentence("compare", run.path.name, run.path.name)


def test_a_runs_folder_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Läufe und mehr").write_text("")
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "Läufe und mehr"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "Läufe und mehr"))
    line = sentence("report", "--preset", "smoke")
    assert "Läufe und mehr" in line


def test_a_missing_package_is_named_with_the_remedy() -> None:
    hide = "import runpy, sys; sys.modules['typer'] = None; sys.argv = ['experiments', 'list']; "
    code = hide + "runpy.run_module('experiments', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "error: the package 'typer' is missing; install the project with pip install -e '.[study]'"
    )
