"""The config of a transformer: its learning rate step by step, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
from transformer_runs import transformer_config

from ibq.config import AdamWConfig
from ibq.errors import ConfigError


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
