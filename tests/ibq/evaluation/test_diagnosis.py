"""Histories of real runs, short ones that fail each in its own way and healthy ones, and what is said of them."""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_runs import read_the_images_once, stop_after  # noqa: F401

import ibq.training.tokenizer as trainer
from ibq.config import TrainConfig
from ibq.errors import NonFiniteError
from ibq.evaluation.diagnosis import CAUSES, COLLAPSED_EARLY, EARLY, NOTHING_SEEN, diagnose, summary
from ibq.run_directory import RunDirectory
from ibq.training.runtime import Runtime, StopRequested
from ibq.training.tokenizer import train_tokenizer
from ibq.training.tokenizer_state import TrainingState

History = list[dict[str, Any]]
RUNTIME = Runtime(device="cpu", log_every=10, snapshots=0, eval_images=8)
MODEL = {"base_channels": 4, "channel_multipliers": (1, 1, 2), "res_blocks": 1, "z_channels": 8, "norm_groups": 4}
FROM_FEATURES = {
    "method": "vq",
    "codebook_size": 128,
    "code_dim": 16,
    "codebook_init": "features",
    "beta_on": "commitment",
}
IBQ = {"method": "ibq", "codebook_size": 128, "code_dim": 64}

HEALTHY: dict[str, dict[str, Any]] = {
    "ibq as released": {"quantizer": IBQ, "steps": 100, "lr": 3e-3},
    "vq from features with entropy": {"quantizer": FROM_FEATURES | {"entropy_weight": 0.05}, "steps": 100},
    "lfq": {"quantizer": {"method": "lfq", "codebook_size": 128, "code_dim": 7}, "steps": 100},
}
NAIVE = {"method": "vq", "codebook_size": 256, "code_dim": 32}
FLAT = {
    "quantizer": FROM_FEATURES | {"code_dim": 64, "entropy_weight": 0.05},
    "model": MODEL | {"z_channels": 3},
    "steps": 60,
}
"""The encoder ends in three channels, so that features, and codes that begin as features, lie in three dimensions."""
FAILURES: dict[str, dict[str, Any]] = {
    "vq of three dimensions": FLAT,
    "vq from U(-1/K, 1/K)": {"quantizer": NAIVE, "steps": 60, "lr": 3e-3},
    "vq from N(0, 1)": {"quantizer": NAIVE | {"codebook_init": "normal"}, "steps": 60},
    "no commitment, fast": {"quantizer": FROM_FEATURES | {"beta": 0.0}, "steps": 80, "lr": 1e-2},
    "ibq at ten times the logits": {"quantizer": IBQ | {"logit_scale": 10.0}, "steps": 100},
    "ibq of large D, bare": {"quantizer": IBQ | {"code_dim": 256, "double": False, "entropy_weight": 0.0}, "steps": 60},
    "ibq without entropy": {"quantizer": IBQ | {"entropy_weight": 0.0}, "steps": 100},
    "ibq, entropy times 100": {"quantizer": IBQ | {"code_dim": 16, "entropy_weight": 5.0}, "steps": 60},
    "ibq, much too fast": {"quantizer": IBQ, "steps": 60, "lr": 5e-2},
}


def config_of(run: dict[str, Any]) -> TrainConfig:
    tree = {
        "model": run.get("model", MODEL),
        "quantizer": run["quantizer"],
        "steps": run["steps"],
        "batch_size": 8,
        "optim": {"lr": run.get("lr", 1e-3)},
    }
    return TrainConfig.parse(tree)


@pytest.fixture(scope="module")
def history_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], History]:
    @functools.cache
    def train(name: str) -> History:
        run = RunDirectory(tmp_path_factory.mktemp("run"))
        list(train_tokenizer(config_of((HEALTHY | FAILURES)[name]), run.path, RUNTIME))
        history = run.read_history()
        assert run.read_row()["diagnosis"] == summary(diagnose(history))
        return history

    return train


# --- The right cause for each, and silence ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEALTHY)
def test_silent_on_healthy_runs_from_the_first_line_to_the_last(history_of: Any, name: str) -> None:
    history = history_of(name)
    assert history[-1]["perplexity_share"] > 0.4
    assert [diagnose(history[:n]) for n in range(len(history) + 1)] == [[]] * (len(history) + 1)
    assert summary([]) == NOTHING_SEEN


@pytest.mark.parametrize(
    ("name", "causes"),
    [
        ("vq of three dimensions", ["dimension"]),
        ("vq from U(-1/K, 1/K)", ["collapsed", "gap", "never_used"]),
        ("vq from N(0, 1)", ["collapsed", "gap", "never_used"]),
        ("no commitment, fast", ["collapsed", "norms"]),
        ("ibq at ten times the logits", ["collapsed", "saturated", "never_used"]),
        ("ibq of large D, bare", ["collapsed", "saturated"]),
        ("ibq without entropy", ["collapsed", "gap", "never_used"]),
        ("ibq, entropy times 100", ["entropy"]),
        ("ibq, much too fast", ["collapsed", "saturated", "gap"]),
    ],
)
def test_each_failure_has_its_cause_first(history_of: Any, name: str, causes: list[str]) -> None:
    history = history_of(name)
    found = diagnose(history)
    assert [finding.cause for finding in found][: len(causes)] == causes
    for finding in found:
        assert finding.cause in CAUSES
        assert history[0]["step"] <= finding.step <= history[-1]["step"]
        assert f"step {finding.step}" in finding.sentence
        assert math.isfinite(finding.value)
        assert finding.phrase in summary(found)
        assert "nan" not in finding.sentence


def test_numbers_are_those_of_the_history(history_of: Any) -> None:
    history = history_of("vq from U(-1/K, 1/K)")
    last, (collapsed, gap, never_used) = history[-1], diagnose(history)
    assert f"perplexity {last['perplexity']:.3g} of 256 codes" in collapsed.sentence
    assert f"{last['dead_codes']:.0f} codes have no token" in collapsed.sentence
    assert collapsed.value < 1 / 16
    assert gap.value > 2
    assert never_used.value == last["never_used"] > 128
    assert f"the gradient reaches {last['reach_effective']:.3g} codes" in never_used.sentence
    assert (
        summary([collapsed, never_used])
        == f"collapsed since step {collapsed.step}: {last['never_used']:.0f} codes never used"
    )

    history = history_of("ibq at ten times the logits")
    last, saturated = history[-1], diagnose(history)[1]
    assert saturated.value == last["logit_spread"]
    given = 10 * last["feature_norm"] * last["code_norm"] / 8
    assert f"spread by {last['logit_spread']:.3g}; logit_scale · |z| · |c| / sqrt(D) is 10 · " in saturated.sentence
    assert f" / sqrt(64) = {given:.3g}. A logit_scale of 1/sqrt(D) would divide it by 80." in saturated.sentence

    history = history_of("no commitment, fast")
    norms = diagnose(history)[1]
    assert norms.step == 10
    assert f"norm of the features runs away since step 10: it has grown {norms.value:.3g}-fold" in norms.sentence

    entropy = diagnose(history_of("ibq, entropy times 100"))[0]
    assert f"pulls {entropy.value:.3g} times as hard on the features as all other terms together" in entropy.sentence


def test_a_collapse_is_named_when_it_has_come_and_not_before(history_of: Any) -> None:
    """This run has its codes at first and loses them within some tens of steps; at which one depends on how the CPU
    rounds."""
    history = history_of("ibq, much too fast")
    assert history[0]["perplexity_share"] > COLLAPSED_EARLY
    lost = next(
        n for n, line in enumerate(history) if line["step"] >= EARLY and line["perplexity_share"] < COLLAPSED_EARLY
    )
    named = [bool(diagnose(history[: n + 1])) for n in range(len(history))]
    assert not any(named[:lost])
    assert all(named[lost + 1 :])
    assert diagnose(history)[0].step == history[lost]["step"]
    for name in FAILURES:
        assert not diagnose([line for line in history_of(name) if line["step"] < EARLY])


def test_codes_that_are_in_use_but_lie_in_few_dimensions_are_named_though_nothing_has_collapsed(
    history_of: Any,
) -> None:
    history = history_of("vq of three dimensions")
    last, (dimension,) = history[-1], diagnose(history)
    assert last["perplexity_share"] > 0.6
    assert dimension.value == last["dimension99_used"] == last["dimension99_features"] == 3
    assert dimension.step == history[0]["step"]
    assert dimension.sentence.startswith(
        f"{last['usage']:.0%} of the codes are in use, but they span 3 of 64 dimensions since step 10 (99% of "
    )
    assert (
        "could span 64; the features have 3. More codes give no more: quantize later in the run" in dimension.sentence
    )
    assert summary([dimension]) == "used codes span 3 of 64 dimensions"


def test_codes_that_are_kept_from_dimensions_which_their_features_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_average = TrainingState.update_average

    def flatten_codes(state: TrainingState) -> None:
        update_average(state)
        state.tokenizer.quantize.get_parameter("embedding").data[:, 2:] = 0

    monkeypatch.setattr(trainer.TrainingState, "update_average", flatten_codes)
    free = {"quantizer": FROM_FEATURES | {"entropy_weight": 0.05, "beta": 0.0}, "steps": 60}
    list(train_tokenizer(config_of(free), tmp_path, RUNTIME))
    history = RunDirectory(tmp_path).read_history()
    dimension = next(finding for finding in diagnose(history) if finding.cause == "dimension")
    assert dimension.value == 2
    assert history[-1]["dimension99_features"] >= 4
    assert "Codes that are learnt should begin as features" in dimension.sentence


def test_how_few_dimensions_are_few() -> None:
    def lines(used: float, features: float = math.nan, perplexity: float = 800.0, D: float = 64.0) -> History:
        line = {"dimension99_used": used, "dimension99_features": features, "perplexity": perplexity, "code_dim": D}
        return [line | {"step": step, "uniform_perplexity": 1000.0} for step in range(10, 60, 10)]

    assert [finding.cause for finding in diagnose(lines(4))] == ["dimension"]
    assert not diagnose(lines(5))
    assert [finding.cause for finding in diagnose(lines(16, D=256))] == ["dimension"]
    assert not diagnose(lines(17, D=256)), "as codebooks that quantize late have"
    assert not diagnose(lines(1, D=10)), "LFQ"
    assert not diagnose(lines(4, perplexity=64, D=256)), "so few codes could not span much more"
    assert not diagnose(lines(10, features=19))
    assert [finding.cause for finding in diagnose(lines(10, features=20))] == ["dimension"]
    assert [finding.cause for finding in diagnose(lines(10, features=20, perplexity=40))] == ["collapsed"]
    assert not diagnose(lines(3)[:1])
    assert not diagnose(lines(3)[:2])


# --- What must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*HEALTHY, *FAILURES])
def test_neither_the_order_of_columns_nor_others_nor_the_clock_matter(history_of: Any, name: str) -> None:
    history = history_of(name)
    changed = []
    for line in history:
        items = [*line.items(), ("mine", 1e9), ("words", "many")]
        random.Random(0).shuffle(items)
        changed.append(dict(items) | {"seconds": 1e3 * line["seconds"], "images_per_s": 1e-3, "loss": -line["loss"]})
    assert diagnose(changed) == diagnose(history)


COLUMNS = (
    *(
        "perplexity",
        "uniform_perplexity",
        "dead_codes",
        "codebook_size",
        "code_dim",
        "tokens",
        "never_used",
        "reach_effective",
    ),
    *("logit_scale", "logit_spread", "max_probability", "assignment_entropy", "entropy_pull"),
    *("feature_norm", "code_norm", "gap", "gap_used", "gap_dead", "usage"),
    *("dimension99_used", "dimension99_features"),
)


@given(absent=st.sets(st.sampled_from(COLUMNS)), value=st.sampled_from(["absent", None, math.nan, math.inf, "text"]))
def test_what_a_line_lacks_is_not_judged(history_of: Any, absent: set[str], value: Any) -> None:
    for name in FAILURES:
        history = history_of(name)
        lines = [{column: v for column, v in line.items() if column not in absent} for line in history]
        lines = lines if value == "absent" else [line | dict.fromkeys(absent, value) for line in lines]
        found = diagnose(lines)
        assert not any("nan" in finding.sentence for finding in found)
        if "gap_used" not in absent:  # without it the growth of the gap itself is looked at
            assert {finding.cause for finding in found} <= {finding.cause for finding in diagnose(history)}


def test_histories_of_old_runs_of_transformers_and_of_nothing() -> None:
    assert diagnose([]) == []
    assert diagnose([{}]) == []
    transformer = [
        {"step": step, "seconds": 1.0, "loss": 7.0, "gradient_norm": 1.0, "tokens_per_s": 100.0}
        for step in range(10, 200, 10)
    ]
    assert diagnose(transformer) == []
    old = [
        {"step": s, "perplexity": 5.0, "uniform_perplexity": 1000.0, "dead_codes": 1000.0, "code_norm": 0.0}
        for s in range(10, 200, 10)
    ]
    assert summary(diagnose(old)) == "collapsed since step 10"


def test_rising_usage_is_no_collapse_and_a_flat_one_is() -> None:
    def lines(perplexities: list[float]) -> History:
        return [
            {"step": 10 * (i + 1), "perplexity": p, "uniform_perplexity": 1000.0} for i, p in enumerate(perplexities)
        ]

    assert not diagnose(lines([10.0 * (i + 1) for i in range(20)]))
    assert diagnose(lines([200.0] * 20))[0].step == 10
    assert not diagnose(lines([300.0] * 20))
    assert not diagnose(lines([700.0] * 19 + [5.0])), "one window is noise"
    fallen = diagnose(lines([700.0] * 10 + [100.0] * 10))
    assert [(finding.cause, finding.step, finding.value) for finding in fallen] == [("collapsed", 110, 0.1)]


@pytest.mark.parametrize("name", [*HEALTHY, *FAILURES])
def test_a_run_that_quantizes_late_is_judged_from_there_as_if_it_had_begun_there(history_of: Any, name: str) -> None:
    """Before, there is no perplexity, and features may grow as they like."""
    history, late = history_of(name), 400
    before = [
        {"step": step, "loss": 1.0, "feature_norm": 1e-3 * step, "code_dim": 8} for step in range(10, late + 1, 10)
    ]
    since = [line | {"step": line["step"] + late} for line in history]
    for n in range(len(history) + 1):
        found, expected = diagnose([*before, *since[:n]]), diagnose(history[:n])
        assert [(each.cause, each.step - late, each.value) for each in found] == [
            (each.cause, each.step, each.value) for each in expected
        ]


def test_a_hundred_thousand_lines_are_not_compared_pair_by_pair(history_of: Any) -> None:
    """Pair by pair it would take minutes instead of half a second."""
    history = history_of("vq from N(0, 1)")
    long = [line | {"step": step} for step, line in enumerate(itertools.islice(itertools.cycle(history), 100_000), 1)]
    started = time.process_time()
    assert diagnose(long)
    assert time.process_time() - started < 10


# --- The row ----------------------------------------------------------------------------------------------------------


def test_the_row_of_a_resumed_run_says_what_that_of_an_uninterrupted_one_does(history_of: Any, tmp_path: Path) -> None:
    name = "vq from N(0, 1)"
    for steps in (25, 20):
        with pytest.raises(StopRequested):
            list(train_tokenizer(config_of(FAILURES[name]), tmp_path, RUNTIME, stop_after(steps)))
    list(train_tokenizer(config_of(FAILURES[name]), tmp_path, RUNTIME))
    assert RunDirectory(tmp_path).read_row()["diagnosis"] == summary(diagnose(history_of(name)))


def test_the_row_of_a_run_that_did_not_stay_finite_has_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_average = TrainingState.update_average

    def break_at_45(state: TrainingState) -> None:
        update_average(state)
        if state.step == 45:
            state.tokenizer.quantize.get_parameter("embedding").data[3] = math.nan

    monkeypatch.setattr(trainer.TrainingState, "update_average", break_at_45)
    with pytest.raises(NonFiniteError):
        list(train_tokenizer(config_of(FAILURES["vq from N(0, 1)"]), tmp_path, RUNTIME))
    row = RunDirectory(tmp_path).read_row()
    assert row["status"] == "nan"
    assert row["diagnosis"].startswith("collapsed since step ")
