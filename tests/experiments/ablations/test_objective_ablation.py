"""The arms of the objective: one named change each, around IBQ as released, with the preset's own discriminator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.ablations import ABLATIONS
from experiments.cells import Cell
from experiments.report import figures
from experiments.report.configs import active_fields, differing_fields
from experiments.study import Study
from ibq.config import TrainConfig
from ibq.run_directory import append_line, write_json

ABLATION = ABLATIONS["objective"]


def configs(preset: str = "quick") -> dict[str, TrainConfig]:
    return {cell.arm.name: cell.config for cell in Study(preset, ("objective",)).cells}


def changed(one: TrainConfig, other: TrainConfig) -> set[str]:
    fields = [active_fields(config) for config in (one, other)]
    return {name for name in {*fields[0], *fields[1]} if fields[0].get(name) != fields[1].get(name)}


def test_arms_change_what_they_are_named_for() -> None:
    of, gan = configs(), "loss.adversarial."
    for name, fields in {
        "adaptive": {gan + "adaptive"},
        "vanilla": {gan + "loss"},
        "no_lecam": {gan + "lecam_weight"},
        "group_norm": {gan + "norm"},
        "no_norm": {gan + "norm"},
        "late_start": {gan + "start"},
        "gan": {"loss.perceptual", "loss.perceptual_weight"},
    }.items():
        assert changed(of["whole"], of[name]) == fields, name
    assert changed(of["pixel_l1"], of["pixel_l2"]) == {"loss.pixel"}
    assert changed(of["pixel_l1"], of["perceptual"]) == {"loss.perceptual", "loss.perceptual_weight"}
    assert all(name.startswith(gan) for name in changed(of["perceptual"], of["whole"]))
    assert of["whole"].loss.adversarial.model_dump() == {
        "weight": 0.1,
        "adaptive": False,
        "loss": "hinge",
        "start": 0.0,
        "lecam_weight": 0.05,
        "lecam_decay": 0.999,
        "channels": 16,
        "layers": 2,
        "norm": "batch",
    }


def test_every_contrast_is_of_arms_that_differ_in_its_term_alone() -> None:
    of = configs()
    groups = {"loss.pixel": "pixel", "loss.perceptual": "perceptual", "loss.perceptual_weight": "perceptual"}
    for contrast in ABLATION.contrasts:
        terms = {groups.get(name, "discriminator") for name in changed(of[contrast.without], of[contrast.with_])}
        assert len(terms) == 1 or contrast.name == "rate", contrast.name
        assert not contrast.paper


def test_the_pixel_arm_is_the_run_that_other_ablations_have() -> None:
    paths = {
        f"{c.ablation.name}/{c.arm.name}": c.run.path for c in Study("quick", ("objective", "vq_vs_ibq"), seeds=1).cells
    }
    assert paths["objective/pixel_l1"] == paths["vq_vs_ibq/ibq_published"]


@pytest.mark.parametrize(("preset", "channels", "layers"), [("smoke", 8, 2), ("quick", 16, 2), ("gpu", 32, 2)])
def test_the_discriminator_has_the_size_of_the_preset(preset: str, channels: int, layers: int) -> None:
    adversarial = configs(preset)["whole"].loss.adversarial
    assert (adversarial.channels, adversarial.layers) == (channels, layers)
    overrides = {"loss.adversarial.weight": 0.2, "loss.adversarial.channels": 4}  # what the user says goes first
    others = [cell.config.loss.adversarial for cell in Study(preset, ("vq_vs_ibq",), overrides=overrides).cells]
    assert {(of.weight, of.channels, of.layers) for of in others} == {(0.2, 4, layers)}


def test_a_grid_of_weights_gives_points_with_a_discriminator_its_size() -> None:
    study = Study("quick", grid={"loss.adversarial.weight": [0.0, 0.1]}, bases=("ibq_published",))
    sizes = {cell.config.loss.adversarial.weight: cell.config.loss.adversarial.channels for cell in study.cells}
    assert sizes == {0.0: 64, 0.1: 16}


def test_idle_fields_stand_in_no_table_of_configs() -> None:
    table, common = differing_fields(Study("quick", ("objective",)), ABLATION)
    lines = table.set_index("arm")
    assert lines.loc["pixel_l1", "loss.adversarial.weight"] == "0.0"
    assert lines.loc["pixel_l1", "loss.adversarial.norm"] == "–"
    assert lines.loc["group_norm", "loss.adversarial.norm"] == "group"
    assert "optim.final_factor" not in common
    _, of_others = differing_fields(Study("quick", ("double_quant_loss",)), ABLATIONS["double_quant_loss"])
    assert [name for name in of_others if name.startswith("loss.")] == [
        "loss.pixel",
        "loss.pixel_weight",
        "loss.perceptual",
        "loss.adversarial.weight",
    ]


def finished(cell: Cell, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        append_line(cell.run.history, line)
    write_json(cell.run.row, {"run": cell.run.path.name, "status": "ok"})


def test_the_figure_of_the_discriminator_has_lines_of_arms_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("quick", ("objective",))
    of = {cell.arm.name: cell for cell in study.cells}
    judged = {"logit_real": 0.5, "logit_fake": -0.5, "weighted_adversarial": 0.1}
    finished(of["pixel_l1"], [{"step": 10}, {"step": 20}])
    finished(of["whole"], [{"step": step, **judged} for step in (10, 20)])
    finished(of["late_start"], [{"step": 10}, {"step": 20, **judged}])
    rows = pd.DataFrame({"ablation": ["objective"], "arm": ["whole"], "status": ["ok"]})
    figure = figures.draw("discriminator_over_training", study, ABLATION, rows)
    assert figure is not None
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "mean logit of training images",
        "mean logit of reconstructions",
        "weighted adversarial term",
    ]
    assert all(len(axis.lines) == 2 for axis in figure.axes)
    drawn = [np.isfinite(np.asarray(line.get_ydata(), dtype=float)).sum() for line in figure.axes[1].lines]
    assert sorted(drawn) == [1, 2]
    assert figure.axes[1].get_ylim()[0] < -0.5  # nothing is cut off at 0
    figures.plt.close(figure)
