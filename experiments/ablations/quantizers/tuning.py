"""The search before a comparison: which of several short runs, alike but for one field, an arm takes its value from.

What decides is the mean reconstruction error on all training batches of the last third of the logged windows. All
candidates of all arms saw the same images in the same order, and no test image has a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ibq.run_directory import RunDirectory

RULE = (
    "least mean reconstruction error on all training batches of the last third of the search run (no test image has a "
    "part in it); a run that did not stay finite loses to any other, a tie goes to the smaller value"
)


def search_loss(run: RunDirectory) -> float | None:
    """The number that decides: mean pixel loss over all batches of the last third of the logged windows; None while the
    run is not finished, infinite where it did not stay finite."""
    if not run.finished:
        return None
    if run.read_row()["status"] != "ok":
        return math.inf
    losses = [line["pixel_mean"] for line in run.read_history()]
    last = losses[-max(1, round(len(losses) / 3)) :]
    return sum(last) / len(last)


def best(losses: Mapping[float, float | None]) -> float | None:
    """The value of least loss, the smaller one of a tie; None while a loss is not known."""
    known = {value: loss for value, loss in sorted(losses.items()) if loss is not None}
    return min(known, key=lambda value: known[value]) if known and len(known) == len(losses) else None
