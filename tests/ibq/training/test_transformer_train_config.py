"""The config of a transformer: its learning rate step by step, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
from transformer_runs import transformer_config

from ibq.errors import ConfigError
from ibq.training.config import AdamWConfig


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"optim.warmup": 0.6, "optim.plateau": 0.5},
            "warmup=0.6 and plateau=0.5 are fractions of one run; let their sum be at most 1",
        ),
        ({"optim.betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must both lie in \[0, 1\)"),
        ({"optim.betas": (-0.1, 0.9)}, r"betas=\(-0.1, 0.9\) must both lie in \[0, 1\)"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size=8 is not a multiple of accumulate=3; choose a divisor of it"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        transformer_config(**fields)


def test_the_rate_rises_rests_and_falls() -> None:
    optim, steps = AdamWConfig(lr=2.0, warmup=0.1, plateau=0.2, final_factor=0.25), 50
    rates = [optim.rate(step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(2.0 / 6)
    assert rates[:6] == pytest.approx([2.0 * (step + 1) / 6 for step in range(6)])
    assert rates[5:15] == [2.0] * 10
    falls = [before - after for before, after in itertools.pairwise(rates[14:])]
    assert falls == pytest.approx([1.5 / 35] * 35)
    assert rates[-1] == pytest.approx(2.0 * 0.25)


@pytest.mark.parametrize(
    ("warmup", "plateau", "share"), [(0.0, 0.0, 0.1), (0.02, 0.05, 0.5), (0.0, 0.05, 1.0), (0.5, 0.5, 0.5)]
)
def test_a_run_of_one_step_has_a_rate(warmup: float, plateau: float, share: float) -> None:
    assert AdamWConfig(lr=1.0, warmup=warmup, plateau=plateau).rate(0, 1) == pytest.approx(share)


def released_decay(wd: float, wd_end: float, cur_it: int, max_it: int) -> float:
    """Weight decay of the released loop (TencentARC/SEED-Voken, `lr_wd_annealing`), which every group gets."""
    return wd_end + (wd - wd_end) * (0.5 + 0.5 * math.cos(math.pi * cur_it / (max_it - 1)))


@pytest.mark.parametrize(("end", "steps"), [(0.08, 750_600), (0.08, 7), (0.0, 100)])
def test_weight_decay_goes_along_a_cosine_as_released(end: float, steps: int) -> None:
    optim = AdamWConfig(weight_decay=0.05, final_weight_decay=end)
    for step in {0, 1, steps // 3, steps // 2, steps - 2, steps - 1}:
        assert abs(optim.decay(step, steps) - released_decay(0.05, end, step, steps)) < 1e-16
    assert optim.decay(steps - 1, steps) == pytest.approx(end, abs=1e-16)


def test_weight_decay_stays_where_no_end_is_given_and_a_run_of_one_step_has_one() -> None:
    assert {AdamWConfig().decay(step, 50) for step in range(50)} == {0.05}
    assert AdamWConfig(final_weight_decay=0.08).decay(0, 1) == pytest.approx(0.05)


def test_what_weight_decay_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.final_weight_decay"):
        transformer_config(**{"optim.final_weight_decay": -0.1})
    with pytest.raises(ConfigError, match=r"optim\.decayed"):
        transformer_config(**{"optim.decayed": "biases"})
