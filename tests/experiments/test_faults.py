"""A quick round of every kind of kill; `make faults` runs a hundred."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import TARGETS, faults, quiet_results


def test_a_round_of_every_kill_loses_nothing_and_leaves_nobody(tmp_path: Path) -> None:
    expected = quiet_results(tmp_path, steps=12)
    counts, trouble = faults(len(TARGETS), seed=0, folder=tmp_path, expected=expected, steps=12)
    assert trouble == []
    assert counts["studies compared"] >= 1
    assert sum(counts[target] for target in TARGETS) >= 2
