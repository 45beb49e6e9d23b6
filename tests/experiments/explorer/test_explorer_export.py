"""Exports of the explorer: a recipe that is the config and trains it, a command that is a study of the config
alone."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_runs import assert_same_run

from experiments.cli.base import study_of
from experiments.explorer.export import command_text, recipe_text
from experiments.recipes import get_preset, tokenizer
from experiments.study import ROOT, Study
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.quantizers import Quantizer
from ibq.run_directory import RunDirectory
from ibq.training.interventions import Intervention, scheduled
from ibq.training.runtime import Runtime
from ibq.training.tokenizer import train_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "vq": {"ema_decay": 0.9, "beta_on": "commitment", "restart": "dead", "distance": "cosine"},
    "ibq": {"logit_scale": "inverse_sqrt_dim", "top_m": 3, "double": False},
    "lfq": {"codebook_size": 64, "code_dim": 6, "entropy_boost": 3.0},
    "bsq": {"codebook_size": 64, "code_dim": 6},
    "fsq": {"codebook_size": 1000, "code_dim": 4, "levels": [8, 5, 5, 5]},
    "simvq": {"entropy_weight": 0.1 + 0.2},
    "gumbel": {"final_temperature": 1 / 16, "anneal_steps": 7},
    "diveq": {"curve": True, "replace_every": None},
    "wasserstein": {"beta": 0.1 + 0.2},
    "vqbridge": {"patch": 4, "width": 12, "registers": 0},
    "optvq": {"reparametrization": "none", "iterations": 3},
    "nsvq": {"spread": "codes", "width": 1 / 3},
    "spherical": {"points": "random", "points_seed": 3, "code_dim": 6},
    "grouped": {"inner": {"method": "vq", "beta": 0.5}, "drop_last": [0.25], "code_dim": 8},
}
ODD: dict[str, dict[str, Any]] = {
    "as the preset has it": {},
    "photos": {"data.name": "photos", "data.resolution": 64},
    "a folder": {
        "data.name": "imagefolder:/pictures of mine, 'all' of \"them\"\\n/äöü 😀",
        "data.crop": "random",
        "data.flip": True,
    },
    "a long path": {"data.name": "imagefolder:/" + "a long name, and a longer one" * 12},
    "a path that does not print": {"data.name": "imagefolder:/\udcff\n\t" + "\x01\\" * 60},
    "odd numbers": {
        "optim.lr": 1 / 3,
        "optim.clip_norm": 1e-300,
        "optim.milestones": [0.1 + 0.2],
        "steps": 7,
        "seed": 2,
    },
    "a discriminator": {
        "loss.adversarial.weight": 0.1,
        "loss.perceptual": "fashion-cnn",
        "optim.warmup": 0.1,
        "batch_size": 24,
    },
    "another network": {
        "model.channel_multipliers": [1, 2],
        "model.base_channels": 16,
        "model.attention_resolutions": [16],
    },
}
CHANGES = [
    Intervention(step=2, fields={"optim.lr": 1e-4, "quantizer.double": False, "quantizer.beta_on": "both"}),
    Intervention(step=3, restart_dead=True),
    Intervention(step=3, fields={"quantizer.entropy_weight": 0.0}, restart_dead=True),
]


def config_of(method: str, preset: str = "quick", **dotted: Any) -> TrainConfig:
    return tokenizer(get_preset(preset), {"method": method} | METHODS[method]).with_fields(**dotted)


def executed(text: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "exported"}
    exec(compile(text, "exported.py", "exec", dont_inherit=True), namespace)
    return namespace


def parsed(command: str) -> Study:
    """The study that a command line names, read as a shell and the command line would."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "experiments", "run"]
    options = list(zip(words[4::2], words[5::2], strict=True))
    of = {
        name: [value for option, value in options if option == name]
        for name in ("--preset", "--seeds", "--grid", "--base", "--set")
    }
    assert sum(map(len, of.values())) == len(options)
    return study_of([], of["--preset"][0], int(of["--seeds"][0]), of["--set"], of["--grid"], of["--base"], None)


def check(config: TrainConfig) -> None:
    namespace = executed(recipe_text(config, CHANGES))
    assert namespace["recipe"]() == config
    assert namespace["INTERVENTIONS"] == CHANGES
    study = parsed(command_text(config))
    (ablation,) = study.ablations
    (arm,) = ablation.arms
    assert study.config_of(ablation, arm).model_copy(update={"seed": config.seed}) == config
    assert ablation.seeds(arm, study.preset, study.seeds)[-1] == config.seed


def test_every_method_is_tried() -> None:
    assert METHODS.keys() == Quantizer.registry.keys()


@pytest.mark.parametrize("method", METHODS)
def test_both_give_the_config_back_for_every_method(method: str) -> None:
    check(config_of(method))
    check(config_of(method, preset="smoke", steps=11))


@pytest.mark.parametrize("odd", ODD)
def test_both_give_the_config_back_for_odd_values(odd: str) -> None:
    check(config_of("ibq", **ODD[odd]))


def test_both_give_the_config_back_for_any_combination() -> None:
    chance = random.Random(0)
    for _ in range(40):
        method, dotted = chance.choice([*METHODS]), {}
        for odd in chance.sample([*ODD.values()], 2):
            dotted |= odd
        if method != "lfq":
            dotted |= {"accumulate": 1, "optim.betas": [chance.random(), chance.random()]}
        try:
            config = config_of(method, chance.choice(["smoke", "quick", "gpu"]), **dotted)
        except ConfigError:  # the combination contradicts itself
            continue
        check(config)


def test_a_study_of_the_command_has_the_run_of_the_config() -> None:
    config = config_of("vq", preset="smoke")
    (cell,) = parsed(command_text(config)).cells
    assert cell.config == config


def test_a_method_without_an_arm_has_a_recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.explorer.export.ABLATIONS", {})
    with pytest.raises(ConfigError, match=r"no arm of any ablation has method='vq'.*use the recipe"):
        command_text(config_of("vq"))


@pytest.mark.parametrize("odd", ODD)
def test_the_recipe_keeps_the_rules_of_the_project(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(recipe_text(config_of("ibq", **ODD[odd]), CHANGES))
    rules = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    found = subprocess.run([sys.executable, "-m", "ruff", "check", *rules, str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", *rules, str(path)], capture_output=True, text=True
    )
    assert formatted.returncode == 0 or odd in ("a folder", "a path that does not print"), (
        formatted.stdout
    )  # whose quotes it would turn


@pytest.mark.processes
def test_the_recipe_trains_what_was_done_by_hand_and_goes_on_with_it(tmp_path: Path) -> None:
    config = config_of("ibq", preset="smoke", steps=6, **{"quantizer.top_m": None})
    recipe = tmp_path / "recipe.py"
    recipe.write_text(recipe_text(config, CHANGES))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    said = [
        subprocess.run([sys.executable, recipe], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "step 6 of 6: loss" in said[0]
    assert said[1] == ""  # it is finished
    list(train_tokenizer(config, tmp_path / "by hand", Runtime(log_every=1), intervene=scheduled(CHANGES)))
    assert_same_run(RunDirectory(tmp_path / "recipe"), RunDirectory(tmp_path / "by hand"))
