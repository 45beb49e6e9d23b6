from __future__ import annotations

import pytest

from experiments.ablations import ABLATIONS
from experiments.recipes import PRESETS, get_preset
from experiments.study import Study, unique_runs
from ibq.errors import ConfigError


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("ablation", sorted(ABLATIONS))
def test_every_arm_is_a_valid_config_and_arms_differ(preset: str, ablation: str) -> None:
    study = Study(preset, (ablation,))
    assert len(unique_runs(study.cells)) == len(study.cells)
    assert {cell.config.quantizer.codebook_size for cell in study.cells} == {get_preset(preset).codebook_size}


def test_arms_differ_in_the_named_factors_alone() -> None:
    cells = [cell for cell in Study("quick", ("vq_vs_ibq",)).cells if cell.seed == 0]
    without_quantizer = [{k: v for k, v in cell.config.to_json_dict().items() if k != "quantizer"} for cell in cells]
    assert all(config == without_quantizer[0] for config in without_quantizer)


def test_seed_0_of_everything_comes_first() -> None:
    seeds = [cell.seed for cell in Study("quick").cells]
    assert seeds == sorted(seeds)
    assert max(seeds) == 2


def test_seeds_apply_to_every_arm() -> None:
    study = Study("quick", seeds=2)
    assert len(study.cells) == 2 * sum(len(ablation.arms) for ablation in study.ablations)


def test_overrides_change_runs_and_the_reports_name() -> None:
    plain, changed = Study("quick"), Study("quick", overrides={"optim.lr": 3e-4, "quantizer.codebook_size": 512})
    assert not {cell.run.path for cell in plain.cells} & {cell.run.path for cell in changed.cells}
    assert changed.cells[0].config.optim.lr == 3e-4
    assert changed.name == "quick+optim.lr=0.0003+quantizer.codebook_size=512"


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
