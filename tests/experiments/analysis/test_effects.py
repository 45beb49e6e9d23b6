from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.ablations import ABLATIONS, Ablation
from experiments.ablations.quantizers.anatomy import ANATOMY
from experiments.ablations.quantizers.tuning import Tuning
from experiments.analysis.effects import effects, main_effects, matched_pairs, paired_differences
from experiments.report import figures, tables
from ibq.metrics import METRICS

ABLATION = ABLATIONS["recipe_parts"]


def additive_rows(ablation: Ablation, weights: dict[tuple[str, str], float], seeds: int = 1) -> pd.DataFrame:
    """Rows whose outcome is exactly a sum over factor levels plus a seed effect."""
    lines = []
    for arm in ablation.arms:
        for seed in range(seeds):
            bits = sum(weights.get((factor, level), 0.0) for factor, level in arm.levels.items()) + 10 * seed
            lines.append({"arm": arm.name, "seed": seed, "status": "ok", "bits": bits, "l1": -bits / 100})
    return pd.DataFrame(lines)


@pytest.mark.parametrize("name", [name for name, ablation in ABLATIONS.items() if "main_effects" in ablation.tables])
def test_pairs_differ_in_one_factor_and_every_factor_has_two_pairs(name: str) -> None:
    ablation = ABLATIONS[name]
    pairs = matched_pairs(ablation)
    for pair in pairs:
        assert [f for f in pair.low.levels if pair.low.levels[f] != pair.high.levels[f]] == [pair.factor]
    counts = pd.Series([pair.factor for pair in pairs]).value_counts()
    assert set(counts.index) == {factor.name for factor in ablation.factors}
    assert counts.min() >= 2


def test_the_double_term_is_varied_alone_in_four_surroundings() -> None:
    assert sum(pair.factor == "loss" for pair in matched_pairs(ABLATIONS["double_quant_loss"])) == 4


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS)
def test_names_in_an_ablation_name_something(ablation: Ablation) -> None:
    arms, levels = {arm.name for arm in ablation.arms}, {factor.name: factor.levels for factor in ablation.factors}
    assert len(arms) == len(ablation.arms)
    assert all(
        arm.levels.keys() == levels.keys() and arm.levels[name] in levels[name]
        for arm in ablation.arms
        for name in levels
    )
    assert {name for contrast in ablation.contrasts for name in (contrast.without, contrast.with_)} <= arms
    assert {row.arm for row in ablation.paper_rows} - {None} <= arms
    assert set(ablation.figures) <= figures.FIGURES.keys()
    assert set(ablation.tables) <= tables.TABLES.keys()
    outcomes = {contrast.outcome for contrast in ablation.contrasts}
    assert {*ablation.columns, *ablation.beside_paper, *outcomes} <= METRICS.keys()
    assert (
        {name for row in ablation.paper_rows for name in row.reported}
        <= set(ablation.paper_columns)
        <= tables.PAPER_COLUMNS.keys()
    )
    assert {ablation.marker, ablation.fill, ablation.axis and ablation.axis.factor} - {None} <= levels.keys()
    searched = {arm.name for arm in ablation.arms if arm.tuned_as is None}
    assert {arm.tuned_as for arm in ablation.arms} - {None} <= searched
    if isinstance(ablation.adaptive, Tuning):
        assert list(ablation.adaptive.factors) == sorted(ablation.adaptive.factors)
    if "parts" in ablation.tables:
        parts = {name for part in ANATOMY.parts for name in (part.removed, part.alone)} - {None}
        assert parts | {ANATOMY.whole, ANATOMY.bare} <= arms


def test_published_pair_and_fairest_pair_are_what_they_claim() -> None:
    published, fair = ABLATION.arm("vq_published"), ABLATION.arm("ibq_published")
    assert published.levels == {
        "estimator": "VQ",
        "entropy": "off",
        "init": "uniform",
        "beta on": "codebook",
        "temperature": "0.01",
        "double": "off",
    }
    assert fair.levels == published.levels | {"estimator": "IBQ", "entropy": "on", "init": "normal", "double": "on"}
    one, other = ABLATION.arm("vq_fair").levels, ABLATION.arm("ibq_fair").levels
    assert [name for name in one if one[name] != other[name]] == ["estimator"]


def test_main_effects_recover_an_additive_model_whatever_the_seeds() -> None:
    weights = {
        ("estimator", "IBQ"): 1.5,
        ("entropy", "on"): 4.0,
        ("init", "features"): 2.0,
        ("init", "normal"): -3.0,
        ("double", "on"): 0.25,
    }
    table = main_effects(ABLATION, additive_rows(ABLATION, weights, seeds=3)).set_index("change")
    assert table.loc["estimator: VQ → IBQ", "bits_mean"] == pytest.approx(1.5)
    assert table.loc["entropy: off → on", "bits_mean"] == pytest.approx(4.0)
    assert table.loc["init: uniform → features", "bits_mean"] == pytest.approx(2.0)
    assert table.loc["init: normal → features", "bits_mean"] == pytest.approx(5.0)
    assert table.loc["double: off → on", "l1_mean"] == pytest.approx(-0.0025)
    assert np.allclose(table["bits_max"], table["bits_min"])


def test_seeds_are_paired_and_unfinished_runs_left_out() -> None:
    rows = additive_rows(ABLATION, {("estimator", "IBQ"): 1.0}, seeds=3)
    rows.loc[(rows["arm"] == "ibq_fair") & (rows["seed"] == 1), "status"] = "nan"
    differences = paired_differences(rows, "vq_fair", "ibq_fair")
    assert list(differences["seed"]) == [0, 2]
    assert np.allclose(differences["bits"], 1.0)
    assert "A→E" in set(effects(ABLATION, rows)["pair"])
    assert "A→E" not in set(effects(ABLATION, rows[rows["arm"] != "vq_entropy"])["pair"])


def test_no_rows_no_effects() -> None:
    rows = pd.DataFrame([{"arm": arm.name, "seed": 0, "status": "pending"} for arm in ABLATION.arms])
    assert effects(ABLATION, rows).empty
    assert main_effects(ABLATION, rows).empty
