from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.ablations import ABLATIONS
from experiments.ablations.base import Contrast
from experiments.analysis.error_rates import family_errors, rates
from experiments.analysis.verdicts import Verdict, holm, interval, p_value, verdicts
from experiments.report.tables import markdown
from experiments.study import ROOT

ABLATION = ABLATIONS["vq_vs_ibq"]
GAIN = Contrast("c", "vq_fair", "ibq_fair", "A claim.", "bits", 1.0)
TYPICAL = [-0.5, 0.3, 1.1, 0.2, 0.9]


def pair_rows(outcome: str, pairs: list[tuple[float, float]]) -> pd.DataFrame:
    """Rows of vq_fair and ibq_fair with these values of an outcome, a pair a seed."""
    lines = [
        {"arm": arm, "seed": seed, "status": "ok", outcome: value}
        for seed, values in enumerate(pairs)
        for arm, value in zip(("vq_fair", "ibq_fair"), values, strict=True)
    ]
    return pd.DataFrame(lines, columns=["arm", "seed", "status", outcome])


def judge(contrast: Contrast, rows: pd.DataFrame) -> Verdict:
    """The verdict on a claim that is a family by itself."""
    (judged,) = verdicts(replace(ABLATION, contrasts=(contrast,)), rows)
    return judged


def differing(differences: list[float], sign: int = 1) -> pd.DataFrame:
    return pair_rows("bits", [(3.0, 3.0 + sign * difference) for difference in differences])


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([1.5, 2.0, 1.7], "supported"),
        ([1.5, 2.0, 1.0], "inconclusive"),  # every seed is beyond the threshold, the interval is not
        ([0.5, 0.4, 0.6], "smaller than claimed"),
        ([0.1, -0.1, 0.2], "smaller than claimed"),
        ([-0.5, -0.4, -0.6], "contradicted"),
        ([1.5, 1.5, 1.5], "supported"),
        ([1.0, 1.0, 1.0], "inconclusive"),
        ([0.0, 0.0, 0.0], "smaller than claimed"),
        ([-0.25, -0.25, -0.25], "contradicted"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_word_is_read_off_the_interval(differences: list[float], word: str, sign: int) -> None:
    judged = judge(replace(GAIN, effect=float(sign)), differing(differences, sign))
    assert (judged.word, judged.uncorrected) == (word, word)
    assert (judged.reason != "") == (word == "inconclusive")


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-19.0, 5.0, -5.0], "inconclusive"),
        ([-10.0, -8.0, -9.0], "supported"),
        ([5.0, 6.0, 7.0], "supported"),
        ([-21.0, -19.0, -20.0], "inconclusive"),
        ([-22.0, -22.5, -23.0], "contradicted"),
    ],
)
def test_what_is_kept_is_supported_short_of_the_threshold(differences: list[float], word: str) -> None:
    kept = replace(GAIN, outcome="usage", effect=-20, keeps=True)
    judged = judge(kept, pair_rows("usage", [(0.5, 0.5 + difference / 100) for difference in differences]))
    assert judged.word == word
    assert judged.claimed == "Δ usage, points > -20"


@pytest.mark.parametrize(("seeds", "reason"), [(0, "not trained"), (1, "one seed"), (2, "two seeds")])
def test_fewer_than_three_seeds_decide_nothing(seeds: int, reason: str) -> None:
    judged = judge(GAIN, differing([5.0] * seeds))
    assert (judged.word, judged.reason, judged.p) == ("inconclusive", reason, None)
    assert ("fewer than 3 seeds" in judged.exploratory) == (seeds > 0)
    assert judged.change == ("+5.000" if seeds else "")


def test_the_interval_and_p_agree_with_scipy() -> None:
    differences = np.array(TYPICAL)
    known = stats.ttest_1samp(differences, 1.0)
    assert p_value(differences, 1.0) == pytest.approx(known.pvalue)
    assert interval(differences) == pytest.approx(tuple(known.confidence_interval()))
    for bound in interval(differences):
        assert p_value(differences, bound) == pytest.approx(0.05)
    assert p_value(np.array([differences, differences + 1]), 1.0).shape == (2,)


def test_holms_method_by_hand_in_any_order_and_along_other_axes() -> None:
    p, corrected = np.array([0.01, 0.04, 0.03, 0.9]), np.array([0.04, 0.09, 0.09, 0.9])
    assert holm(p) == pytest.approx(corrected)
    assert holm(np.array([p, p[::-1]])) == pytest.approx(np.array([corrected, corrected[::-1]]))
    assert holm(np.array([])).size == 0


def test_a_family_of_claims_needs_more_than_one_claim_does() -> None:
    """Claims that have no interval are not of the family; those shown elsewhere are."""
    rows = differing([1.5, 2.0, 1.6]).assign(l1=[0.1, 0.2, 0.1, 0.09, 0.1, 0.15])
    alone = judge(GAIN, rows)
    others = tuple(replace(GAIN, name=name, outcome="l1", effect=-0.01) for name in "abc")
    untested = tuple(replace(GAIN, name=name, outcome="gap") for name in "de")
    family, *_ = verdicts(replace(ABLATION, contrasts=(GAIN, *others, *untested)), rows)
    (elsewhere,) = verdicts(replace(ABLATION, contrasts=(GAIN,), shown_elsewhere=others), rows)
    assert alone.p == alone.holm == family.p
    assert family.holm == elsewhere.holm == pytest.approx(4 * family.p)
    assert (alone.word, family.word, family.uncorrected) == ("supported", "inconclusive", "supported")
    assert family.text.startswith("inconclusive (uncorrected: supported")


def test_what_starts_too_near_the_edge_of_its_range_is_not_smaller_than_claimed() -> None:
    contrast = replace(GAIN, outcome="usage", effect=10)
    full = judge(contrast, pair_rows("usage", [(0.93, 0.99), (0.95, 1.0), (0.92, 0.97)]))
    assert (full.word, full.reason) == ("inconclusive", "it starts at 93.0, 95.0, 92.0, which leaves no room for +10")
    assert judge(contrast, pair_rows("usage", [(0.93, 0.5), (0.95, 0.51), (0.92, 0.5)])).word == "contradicted"
    assert judge(contrast, pair_rows("usage", [(0.5, 0.51)] * 3)).word == "smaller than claimed"
    assert judge(contrast, pair_rows("usage", [(0.5, 0.61)] * 3)).word == "supported"


def test_a_tenth_less_of_a_distance_is_its_logarithm() -> None:
    contrast = replace(GAIN, outcome="fid", effect=-0.152)
    assert judge(contrast, pair_rows("fid[fashion-cnn]", [(10.0, 8.99)] * 3)).word == "supported"
    assert judge(contrast, pair_rows("fid[fashion-cnn]", [(10.0, 9.01)] * 3)).word == "smaller than claimed"
    assert judge(contrast, pair_rows("other", [(1.0, 1.0)] * 3)).reason == "doublings of FID[fashion-cnn] not measured"


def test_the_sentence_has_the_change_its_interval_the_claim_seeds_and_p() -> None:
    judged = judge(GAIN, differing([1.5, 2.0, 1.6]))
    assert judged.sentence == (
        "Supported (exploratory: not registered): +1.700 bits per token (95% +1.043 to +2.357; at least +1 claimed; "
        "3 seeds; Holm's p 0.044)."
    )
    one = judge(replace(GAIN, effect=-1.0, keeps=True), differing([1.5]))
    assert one.sentence == (
        "Inconclusive: one seed (exploratory: not registered; fewer than 3 seeds): +1.500 bits per token (more than -1 "
        "claimed; 1 seed)."
    )
    assert judge(GAIN, differing([])).sentence == "Inconclusive: not trained."


# --- Error rates ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated() -> tuple[pd.DataFrame, pd.DataFrame]:
    return rates(), family_errors()


def test_the_tables_of_the_docs_are_those_of_the_simulation(simulated: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for table in simulated:
        assert markdown(table) in text, f"docs/evidence.md should have\n\n{markdown(table)}"


def test_wrong_words_are_as_rare_as_the_rule_says(simulated: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """Within four standard errors of 4,000 draws: at the threshold 2.5% on each side, of families 5%."""

    def of(table: pd.DataFrame, word: str) -> np.ndarray:
        return table[word].str.rstrip("%").astype(float).to_numpy()

    single, families = simulated
    at = single[single["true effect"] == "the threshold"]
    for word in ("supported", "smaller than claimed"):
        assert (of(at, word) < 2.5 + 4 * 0.25).all()
    assert np.allclose(of(at, "inconclusive"), 95.0, atol=4 * 0.35)
    assert (of(single[single["true effect"] == "none"], "contradicted") < 2.5 + 4 * 0.25).all()
    assert (of(families, "corrected") < 5 + 4 * 0.35).all()
    assert (of(families, "uncorrected") > 15).all()
