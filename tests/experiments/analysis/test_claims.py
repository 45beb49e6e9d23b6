"""Every claim has a line, a word and a reason, and no number where no pair of runs is finished."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from experiments.ablations import ABLATIONS, ALL
from experiments.analysis import claims
from experiments.analysis.claims import UNTESTED, Claim
from experiments.analysis.verdicts import WORDS
from experiments.study import Study

ABLATION = ABLATIONS["vq_vs_ibq"]
CONTRAST = ABLATION.contrasts[0]
"""At least one bit a token more with ibq_published than with vq_published."""
SIZES = {
    "codebook_size": 1024,
    "code_dim": 64,
    "config.steps": 300,
    "config.data.name": "fashion-mnist",
    "config.data.resolution": 32,
}


def rows_of(bits: dict[int, float | str]) -> pd.DataFrame:
    """Rows of the pair: at each seed the gain in bits, or the status of the second arm."""
    lines = []
    for seed, gain in bits.items():
        line = {"ablation": ABLATION.name, "seed": seed, "l1": 0.1, **SIZES}
        lines.append(line | {"arm": CONTRAST.without, "status": "ok", "bits": 3.0})
        lost = isinstance(gain, str)
        lines.append(
            line | {"arm": CONTRAST.with_, "status": gain if lost else "ok", "bits": None if lost else 3.0 + gain}
        )
    return pd.DataFrame(lines)


def judged(bits: dict[int, float | str]) -> Claim:
    return claims.claims_of(Study("quick"), ABLATION, rows_of(bits))[0]


@pytest.mark.parametrize(
    ("bits", "word", "reason"),
    [
        ({0: 1.5, 1: 1.4, 2: 1.6}, "supported", ""),
        ({0: 1.5, 1: 1.2}, "inconclusive", "two seeds"),
        ({0: 1.5, 1: 1.0, 2: 4.0}, "inconclusive", "the interval holds the threshold"),
        ({0: 0.5}, "inconclusive", "one seed"),
        ({0: 0.5, 1: 0.4, 2: 0.6}, "smaller than claimed", ""),
        ({0: -0.5, 1: -0.4, 2: -0.6}, "contradicted", ""),
        ({0: "oom", 1: "nan"}, "inconclusive", "no result of ibq_published seed 0 (oom), ibq_published seed 1 (nan)"),
        ({0: 1.5, 1: 1.5, 2: 1.5, 3: "nan"}, "inconclusive", "no result of ibq_published seed 3 (nan)"),
        ({0: 1.5, 1: "pending"}, "inconclusive", "one seed"),
        ({0: "pending"}, "inconclusive", "no finished pair: ibq_published seed 0 pending"),
    ],
)
def test_word_and_reason(bits: dict[int, float | str], word: str, reason: str) -> None:
    claim = judged(bits)
    assert (claim.word, claim.reason) == (word, reason)
    assert len(claim.seeds) == sum(not isinstance(gain, str) for gain in bits.values())
    assert bool(claim.change) == bool(claim.seeds)


def test_a_claim_says_what_came_out_at_which_seeds_and_scale() -> None:
    claim = judged({0: 1.5, 1: "failed", 2: 2.25})
    assert claim.change == "+1.875"
    assert claim.seeds == (0, 2)
    assert claim.claimed == "Δ bits per token ≥ +1"
    assert claim.scale == "quick: fashion-mnist 32×32, K = 1,024, D = 64, 300 steps"
    assert claim.arms == "A→B"


def test_nothing_trained_leaves_every_claim_inconclusive_and_without_a_number() -> None:
    empty = pd.DataFrame(columns=["ablation", "arm", "seed", "status"])
    everything = claims.claims(Study("quick", ("vq_vs_ibq",)), empty)
    assert len(everything) == sum(len(ABLATIONS[name].contrasts) for name in ALL) + len(UNTESTED)
    assert {(claim.word, claim.change, claim.seeds, claim.scale) for claim in everything} == {
        ("inconclusive", "", (), "")
    }
    assert {claim.reason for claim in everything if claim.ablation} == {"not trained"}
    assert set(claims.table(everything)[claims.CHANGE]) == {"nothing yet", "–"}


def test_an_arm_that_a_study_does_not_have_is_the_reason() -> None:
    rows = rows_of({0: 1.0})
    claim = claims.claims_of(Study("quick"), ABLATION, rows[rows["arm"] == CONTRAST.without])[0]
    assert (claim.word, claim.reason) == ("inconclusive", "ibq_published is not in this study")


def test_a_grid_claims_nothing() -> None:
    study = Study("smoke", grid={"optim.lr": [1e-3, 1e-4]})
    assert claims.claims(study, pd.DataFrame(columns=["ablation", "arm", "seed", "status"])) == []


def test_a_metric_that_was_not_measured_is_the_reason() -> None:
    rows = rows_of({0: 1.0})
    rows["bits"] = float("nan")
    claim = claims.claims_of(Study("quick"), ABLATION, rows)[0]
    assert (claim.word, claim.reason) == ("inconclusive", "bits per token not measured")


def test_claims_that_nothing_tests_say_where_they_stand_and_what_they_need() -> None:
    assert all(claim.paper and claim.reason for claim in UNTESTED)
    assert all(claim.word == "inconclusive" and claim.ablation is None for claim in UNTESTED)


def test_the_count_is_in_words() -> None:
    of = [Claim("a", "", word, word) for word in (*WORDS, "inconclusive", "inconclusive")]
    assert claims.count(of) == (
        "six claims: one supported, one smaller than claimed, one contradicted, three inconclusive"
    )
    known = [replace(of[0], exploratory="written afterwards"), of[0]]
    assert claims.count(known).endswith("none inconclusive; one of them exploratory")
    assert claims.table(known)["verdict"].tolist() == ["supported (exploratory: written afterwards)", "supported"]
    assert claims.count(of[:1]) == (
        "one claim: one supported, none smaller than claimed, none contradicted, none inconclusive"
    )
