"""The search before a comparison: which of several short runs, alike but for one field, an arm takes its value from.

What decides is the mean reconstruction error on all training batches of the last third of the logged windows. All
candidates of all arms saw the same images in the same order, and no test image has a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.ablations.base import Adaptive, Arm, Trial
from experiments.recipes import scaled
from ibq.config import TrainConfig
from ibq.schema import flatten

if TYPE_CHECKING:
    from ibq.run_directory import RunDirectory  # imports torch, which listing the ablations does without

RULE = (
    "least mean reconstruction error on all training batches of the last third of the search run (no test image has a "
    "part in it); a run that did not stay finite loses to any other, a tie goes to the smaller value"
)


@dataclass(frozen=True)
class Tuning(Adaptive):
    """A search before the comparison: each arm is trained shortly at several values of one field and takes the best.

    Args:
        field: dotted path of a number in the config.
        factors: ascending multiples of the recipe's own value.
        step_share: length of a search run over that of the arm.
        first: neighbouring factors that are tried first; while the best of them lies at an edge, the next one beyond is
            tried too. Empty: all at once.
    """

    field: str
    factors: tuple[float, ...]
    step_share: float
    first: tuple[float, ...] = ()

    @property
    def tuned(self) -> str:
        return self.field

    @property
    def protocol(self) -> str:
        times = ", ".join(f"{factor:g}" for factor in self.factors)
        first = ", ".join(f"{factor:g}" for factor in self.first)
        order = f" ({first} first, then what lies beyond the best while it is at an edge)" if first else ""
        return (
            f"Tuning: {self.field} at {times} times the recipe's value{order}, in runs of {100 * self.step_share:.0f}% "
            f"of the steps with the whole schedule, seed 0; {RULE}."
        )

    def trials(self, config: TrainConfig) -> dict[float, TrainConfig]:
        short = [scaled(config, {self.field: factor, "steps": self.step_share}) for factor in self.factors]
        return {flatten(trial.to_json_dict())[self.field]: trial for trial in short}

    def wanted(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        low, high = 0, len(trials)
        if self.first:
            low, high = self.factors.index(self.first[0]), self.factors.index(self.first[-1]) + 1
        while (chosen := best({trial.value: search_loss(trial.run) for trial in trials[low:high]})) is not None:
            if chosen == trials[low].value and low:
                low -= 1
            elif chosen == trials[high - 1].value and high < len(trials):
                high += 1
            else:
                break
        return trials[low:high]

    def choice(self, trials: Sequence[Trial], config: TrainConfig) -> TrainConfig | None:
        chosen = best({trial.value: search_loss(trial.run) for trial in trials})
        return None if chosen is None else config.with_fields(**{self.field: chosen})

    def columns(self, arm: Arm, trials: Sequence[Trial]) -> dict[str, str]:
        phrase = f"as {arm.tuned_as}" if arm.tuned_as else ""
        if trials:
            values = ", ".join(f"{trial.value:g}" for trial in trials)
            phrase = f"{values}; {trials[0].steps} steps each, {_finished(trials)} finished"
        return {f"search of {self.field}": phrase}

    def facts(self, run: RunDirectory, is_trial: bool) -> dict[str, float]:
        loss = search_loss(run) if is_trial else None
        return {} if loss is None else {"search.loss": loss}

    def waits_for(self, arm: Arm, trials: Sequence[Trial], neighbours: Sequence[RunDirectory]) -> str:
        of = arm.tuned_as or arm.name
        return f"waits for the search of {of}, {_finished(trials)} of {len(trials)} runs finished"

    def waiting(self, count: int) -> str:
        return f"{count} runs wait for the search of their learning rate."


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


def _finished(trials: Sequence[Trial]) -> int:
    return sum(trial.run.finished for trial in trials)
