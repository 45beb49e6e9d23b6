from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from experiments.ablations import ABLATIONS, Ablation
from experiments.ablations.base import Contrast
from experiments.ablations.quantizers.anatomy import ANATOMY
from experiments.ablations.quantizers.tuning import Tuning
from experiments.analysis.effects import effects, main_effects, matched_pairs, paired_differences, verdict
from experiments.report import figures, tables
from ibq.metrics import METRICS

ABLATION = ABLATIONS["vq_vs_ibq"]


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
    assert "E→F" not in set(effects(ABLATION, rows[rows["arm"] != "vq_entropy"])["pair"])


def test_no_rows_no_effects() -> None:
    rows = pd.DataFrame([{"arm": arm.name, "seed": 0, "status": "pending"} for arm in ABLATION.arms])
    assert effects(ABLATION, rows).empty
    assert main_effects(ABLATION, rows).empty
    assert verdict(ABLATION.contrasts[0], rows).word == "undecided"


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([1.5, 2.0, 1.0], "confirmed"),
        ([1.5, 2.0], "consistent"),
        ([1.5, 0.9, 2.0], "undecided"),
        ([0.9, 0.2, -3.0], "refuted"),
        ([0.9, 0.2], "undecided"),
        ([], "undecided"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_verdicts_follow_the_rule_stated_beforehand(differences: list[float], word: str, sign: int) -> None:
    contrast = Contrast("c", "vq_fair", "ibq_fair", "claim", "bits", sign * 1.0)
    lines = [{"arm": "vq_fair", "seed": s, "status": "ok", "bits": 3.0, "l1": 0.1} for s in range(len(differences))]
    lines += [
        {"arm": "ibq_fair", "seed": s, "status": "ok", "bits": 3.0 + sign * d, "l1": 0.1}
        for s, d in enumerate(differences)
    ]
    rows = pd.DataFrame(lines, columns=["arm", "seed", "status", "bits", "l1"])
    judged = verdict(contrast, rows)
    assert judged.word == word
    assert math.isnan(judged.mean) == (not differences)


def pair_rows(outcome: str, pairs: list[tuple[float, float]]) -> pd.DataFrame:
    """Rows of vq_fair and ibq_fair with these values of an outcome, a pair a seed."""
    lines = [
        {"arm": arm, "seed": seed, "status": "ok", "bits": 3.0, "l1": 0.1, outcome: value}
        for seed, values in enumerate(pairs)
        for arm, value in zip(("vq_fair", "ibq_fair"), values, strict=True)
    ]
    return pd.DataFrame(lines)


def test_what_starts_too_near_the_edge_of_its_range_is_not_refuted() -> None:
    contrast = Contrast("c", "vq_fair", "ibq_fair", "claim", "usage", 10)
    full = verdict(contrast, pair_rows("usage", [(0.93, 0.99), (0.95, 1.0), (0.92, 0.97)]))
    assert (full.word, full.reason) == ("undecided", "it starts at 93.0, 95.0, 92.0, which leaves no room for +10")
    assert verdict(contrast, pair_rows("usage", [(0.5, 0.51)] * 3)).word == "refuted"
    assert verdict(contrast, pair_rows("usage", [(0.5, 0.61)] * 3)).word == "confirmed"


def test_a_claim_that_something_is_kept_fails_by_a_change_as_large_as_the_effect() -> None:
    contrast = Contrast("c", "vq_fair", "ibq_fair", "claim", "usage", -20, keeps=True)
    assert verdict(contrast, pair_rows("usage", [(0.9, 0.71), (0.9, 0.95), (0.1, 0.05)])).word == "confirmed"
    assert verdict(contrast, pair_rows("usage", [(0.9, 0.69)] * 3)).word == "refuted"
    assert verdict(contrast, pair_rows("usage", [(0.9, 0.69)] * 3)).required == "Δ usage, points > -20"


def test_a_tenth_less_of_a_distance_is_its_logarithm() -> None:
    contrast = Contrast("c", "vq_fair", "ibq_fair", "claim", "fid", -0.152)
    assert verdict(contrast, pair_rows("fid[fashion-cnn]", [(10.0, 8.99)] * 3)).word == "confirmed"
    assert verdict(contrast, pair_rows("fid[fashion-cnn]", [(10.0, 9.01)] * 3)).word == "refuted"
    assert (
        verdict(contrast, pair_rows("other", [(1.0, 1.0)] * 3)).reason == "doublings of FID[fashion-cnn] not measured"
    )
