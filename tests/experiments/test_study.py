from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from experiments.ablations import ABLATIONS, CORE, Arm
from experiments.cells import unique_runs
from experiments.recipes import PRESETS, get_preset, scaled
from experiments.study import ROOT, Study
from ibq.errors import ConfigError


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("ablation", sorted(ABLATIONS))
def test_every_arm_is_a_valid_config_and_arms_differ(
    preset: str, ablation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.study._data_hash", lambda data: "0" * 64)  # of ImageNet, which is not here
    study = Study(preset, (ablation,))
    refusals = {"objective": "'fashion-cnn' knows Fashion-MNIST, not imagefolder", "evidence": "comes in one size"}
    if preset == "paper" and ablation in refusals:
        with pytest.raises(ConfigError, match=refusals[ablation]):
            _ = study.cells
        return
    cells = [cell for cell in study.cells + study.waiting if not cell.tokenizer_of]  # which arms of one tokenizer share
    assert len(unique_runs(cells)) == len(cells)
    sizes = {cell.config.quantizer.codebook_size for cell in cells}
    assert max(sizes) <= max(get_preset(preset).codebook_size, get_preset(preset).max_codebook_size)
    if "K" not in {factor.name for factor in study.ablations[0].factors}:
        assert sizes == {get_preset(preset).codebook_size}


def test_arms_differ_in_the_named_factors_alone() -> None:
    cells = [cell for cell in Study("quick", ("vq_vs_ibq",)).cells if cell.seed == 0]
    without_quantizer = [{k: v for k, v in cell.config.to_json_dict().items() if k != "quantizer"} for cell in cells]
    assert all(config == without_quantizer[0] for config in without_quantizer)


def test_the_second_ablation_shares_the_runs_of_the_arms_that_are_equal() -> None:
    """The recipe without and with the double term, and without the entropy penalty, are arms of both."""
    one, two = (
        {cell.run.path: cell for cell in Study("quick", (name,)).cells}
        for name in ("recipe_parts", "double_quant_loss")
    )
    shared = {(one[path].arm.name, two[path].arm.name, one[path].seed) for path in one.keys() & two.keys()}
    assert shared == {
        ("ibq_published", "double", 0),
        ("ibq_single", "single", 0),
        ("ibq_no_entropy", "double_no_entropy", 0),
        ("ibq_single_commitment", "single_commitment", 0),
    }
    assert len(unique_runs(Study("quick", ("recipe_parts", "double_quant_loss")).cells)) == len(one) + len(two) - len(
        shared
    )


def test_a_study_without_names_is_the_core_study() -> None:
    assert [ablation.name for ablation in Study("quick").ablations] == list(CORE)
    assert "quantizers" in ABLATIONS
    assert "quantizers" not in CORE


def test_letters_go_on_after_z() -> None:
    arms = tuple(Arm(f"arm {i}", {}) for i in range(60))
    many = replace(ABLATIONS["vq_vs_ibq"], arms=arms)
    letters = [many.letter(arm.name) for arm in arms]
    assert letters[25:28] == ["Z", "AA", "AB"]
    assert letters[51:54] == ["AZ", "BA", "BB"]
    assert len(set(letters)) == len(arms)


def test_scales_multiply_the_recipe_and_what_the_user_set() -> None:
    rates = {cell.arm.name: cell.config.optim.lr for cell in Study("quick", ("double_quant_loss",)).cells}
    assert rates["single_slow"] == 3e-4
    assert rates["single"] == 1e-3
    config = Study("gpu", ("double_quant_loss",), overrides={"optim.lr": 2e-4}).cells[-1].config
    assert config.optim.lr in (2e-4, 6e-5)
    scaled_config = scaled(config, {"steps": 1e-9, "optim.lr": 1 / 3})
    assert scaled_config.steps == 1
    assert scaled_config.optim.lr == float(f"{config.optim.lr / 3:.6g}")
    assert scaled(config, {}) == config


def test_a_share_of_the_steps_keeps_the_share_of_the_run_that_is_averaged() -> None:
    config = next(cell.config for cell in Study("quick").cells)
    assert (config.steps, config.optim.ema_decay) == (300, 0.98)
    half, sixth = scaled(config, {"steps": 1 / 2}), scaled(scaled(config, {"steps": 1 / 2}), {"steps": 1 / 3})
    assert (half.steps, half.optim.ema_decay) == (150, 0.9604)
    assert sixth.optim.ema_decay**sixth.steps == pytest.approx(config.optim.ema_decay**config.steps, rel=1e-3)
    assert {cell.config.optim.ema_decay for cell in Study("quick", ("quantizers",)).waiting} == {0.9604}
    longer = Study("quick", ("vq_vs_ibq",), overrides={"steps": 3000}).cells[0].config
    assert longer.optim.ema_decay**longer.steps == pytest.approx(config.optim.ema_decay**config.steps, rel=1e-3)
    own = Study("quick", ("vq_vs_ibq",), overrides={"steps": 3000, "optim.ema_decay": 0.5}).cells[0].config
    assert own.optim.ema_decay == 0.5


def test_seed_0_of_everything_comes_first() -> None:
    seeds = [cell.seed for cell in Study("quick").cells]
    assert seeds == sorted(seeds)
    assert max(seeds) == 2


def test_seeds_apply_to_every_arm() -> None:
    arms = {(cell.ablation.name, cell.arm.name) for cell in Study("quick").cells}
    twice = [(cell.ablation.name, cell.arm.name, cell.seed) for cell in Study("quick", seeds=2).cells]
    assert sorted(twice) == sorted((*arm, seed) for arm in arms for seed in (0, 1))


def test_overrides_change_runs_and_the_reports_name() -> None:
    plain, changed = Study("quick"), Study("quick", overrides={"optim.lr": 3e-4, "quantizer.codebook_size": 512})
    assert not {cell.run.path for cell in plain.cells} & {cell.run.path for cell in changed.cells}
    assert changed.cells[0].config.optim.lr == 3e-4
    assert changed.name == "quick+optim.lr=0.0003+quantizer.codebook_size=512"


@pytest.mark.parametrize(
    "same",
    [
        [{"optim.lr": 3e-4}, {"optim.lr": "3e-4"}, {"optim.lr": "0.0003"}, {"optim.lr": np.float64(3e-4)}],
        [{"optim.lr": 1}, {"optim.lr": 1.0}, {"optim.lr": "1"}, {"optim.lr": np.int64(1)}],
        [{"optim.betas": [0.5, 0.9]}, {"optim.betas": (0.5, 0.9)}, {"optim.betas": ["0.5", 0.9]}],
        [{"batch_size": 16, "steps": 500}, {"steps": 500, "batch_size": 16}],
    ],
)
def test_one_study_has_one_name(same: list[dict]) -> None:
    studies = [Study("quick", ("codebook_size",), overrides=overrides) for overrides in same]
    assert len({study.name for study in studies}) == 1
    assert len({tuple(cell.run.path for cell in study.cells) for study in studies}) == 1


def test_a_grid_and_a_transformer_have_one_name_too() -> None:
    grids = [Study("quick", grid={"optim.lr": values}) for values in ([1e-3, 1], ["1e-3", 1.0], (1.0, 0.001))]
    assert {study.name for study in grids} == {"quick+grid+optim.lr=0.001_1-" + grids[0].name[-8:]}
    with pytest.raises(ConfigError, match=r"the grid has optim\.lr=0\.001 twice; leave one out"):
        Study("quick", grid={"optim.lr": ["1e-3", 0.001]})
    twice = [Study("quick", ("generation",), overrides={"transformer.optim.lr": value}) for value in (1e-3, "1e-3")]
    assert twice[0].name == twice[1].name == "quick+transformer.optim.lr=0.001"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"overrides": {1: 2}}, "the field 1 is of type int; name it by a text"),
        ({"grid": {None: [2]}}, "the field None is of type NoneType; name it by a text"),
        ({"ablation_names": (3,)}, "the ablation 3 is of type int; name it by a text"),
        ({"preset_name": 3}, "the preset 3 is of type int; name it by a text"),
        ({"grid": {"steps": [1]}, "bases": (b"vq_fair",)}, "the base b'vq_fair' is of type bytes; name it by a text"),
        ({"seeds": "3"}, "seeds='3' is of type str; give a whole number"),
        ({"seeds": 2.5}, "seeds=2.5 is of type float; give a whole number"),
    ],
)
def test_what_is_no_text_is_one_sentence(arguments: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Study(**arguments)
    assert str(caught.value) == sentence


def test_a_changed_codebook_size_reaches_arms_of_other_sizes() -> None:
    study = Study("quick", ("codebook_size",), overrides={"quantizer.codebook_size": 512})
    assert {cell.config.quantizer.codebook_size for cell in study.cells} == {
        32,
        128,
        512,
        2048,
    }  # 8,192 is above the preset's largest


def test_an_override_cannot_leave_the_report_folder() -> None:
    assert "/" not in Study("quick", overrides={"data.name": "../../x"}).name


def test_an_ablation_named_twice_counts_once() -> None:
    assert len(Study("quick", ("vq_vs_ibq", "vq_vs_ibq")).cells) == len(Study("quick", ("vq_vs_ibq",)).cells)


@pytest.mark.parametrize("field", ["seed", "quantizer.method", "quantizer.entropy_weight", "quantizer.beta_on"])
def test_what_the_arms_differ_in_cannot_be_set_for_all(field: str) -> None:
    value = {"seed": 5, "quantizer.method": "vq", "quantizer.entropy_weight": 0.1, "quantizer.beta_on": "both"}[field]
    with pytest.raises(ConfigError, match=field):
        _ = Study("quick", overrides={field: value}).cells


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset_name": "quik"}, ["'quik'", "'quick'"]),
        ({"ablation_names": ("vq_vs_ibk",)}, ["'vq_vs_ibk'", "'vq_vs_ibq'"]),
        ({"seeds": 0}, ["seeds=0", "at least 1"]),
        ({"overrides": {"optim.learning_rate": 1}}, ["'optim.learning_rate'"]),
        ({"overrides": {"quantizer.codebook_sizes": 1}}, ["'quantizer.codebook_sizes'", "'quantizer.codebook_size'"]),
        ({"overrides": {"steps": 0}}, ["steps", "given 0"]),
        ({"overrides": {"steps": "many"}}, ["steps", "'many'"]),
    ],
)
def test_errors_are_one_sentence_with_the_values(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _ = Study(**arguments).cells
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_the_list_of_ablations_is_printed_without_torch() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['experiments', 'list']; "
        "runpy.run_module('experiments', run_name='__main__')"
    )
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert listed.returncode == 0, listed.stderr[-2000:]
    assert all(name in listed.stdout for name in ABLATIONS)
