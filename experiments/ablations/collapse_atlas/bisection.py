"""Bisection of a map of collapse: which arms between others are trained, because exactly one of the two has collapsed.

It follows from rows alone, so that any process that looks decides alike, however often a study is killed and begun
again. An arm between two that agree is left out, and so is one beside an arm that was left out, since the border does
not pass there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.ablations.base import Adaptive, Arm, Fate, Trial
from experiments.recipes import Preset

if TYPE_CHECKING:
    from ibq.run_directory import RunDirectory  # imports torch, which listing the ablations does without

COLLAPSE = 0.1
"""Stated before the numbers: a codebook whose perplexity is below this times K has collapsed, and so has one whose run
did not stay finite."""
DECISIVE = ("logit_spread", "max_probability")


@dataclass(frozen=True)
class Bisection(Adaptive):
    """A map of where codebooks collapse, which is drawn coarsely first and then along its border by arms `between`
    others. Seed 0 decides for all seeds.

    Args:
        collapse: share of K below which a perplexity is that of a collapsed codebook.
        most: arms that are trained at most: those that are between no others come first, then the others in their
            order.
    """

    collapse: float
    most: int

    def most_arms(self, preset: Preset) -> int:
        return min(self.most, preset.max_arms)

    def fates(self, arms: Sequence[Arm], runs: Mapping[str, RunDirectory], most_arms: int) -> dict[str, Fate]:
        # An arm for which there would be no room if all that wait before it were trained waits, so that the order in
        # which runs finish decides nothing; a run that fails for good may so hold others back until it is mended.
        certain = [arm.name for arm in arms if arm.between is None and arm.name in runs]
        known: dict[str, Fate] = {name: "trained" if i < most_arms else "beyond" for i, name in enumerate(certain)}
        taken = possible = min(len(certain), most_arms)
        for arm in [arm for arm in arms if arm.between and arm.name in runs]:
            fate = self._of_neighbours(arm, runs, known)
            if fate in ("trained", "waits") and taken >= most_arms:
                fate = "beyond"
            elif fate == "trained" and possible >= most_arms:
                fate = "waits"
            known[arm.name] = fate
            taken += fate == "trained"
            possible += fate in ("trained", "waits")
        return known

    def _of_neighbours(self, arm: Arm, runs: Mapping[str, RunDirectory], known: Mapping[str, Fate]) -> Fate:
        """Fate by an arm's neighbours, whether or not there is room for it."""
        assert arm.between
        of_neighbours = {known.get(name, "beyond") for name in arm.between}
        if of_neighbours & {"agreeing", "beyond"}:
            return "agreeing" if "agreeing" in of_neighbours else "beyond"
        neighbours = [runs[name] for name in arm.between]
        if "waits" in of_neighbours or not all(run.finished for run in neighbours):
            return "waits"
        one, other = (has_collapsed(self.collapse, run.read_row()) for run in neighbours)
        return "trained" if one != other else "agreeing"

    def columns(self, arm: Arm, trials: Sequence[Trial]) -> dict[str, str]:
        return {"only if one has collapsed of": " and ".join(arm.between or ())}

    def facts(self, run: RunDirectory, is_trial: bool) -> dict[str, float]:
        return saturation(run)

    def waits_for(self, arm: Arm, trials: Sequence[Trial], neighbours: Sequence[RunDirectory]) -> str:
        """Neighbours, or the arms before it while there may be no room for it."""
        finished = sum(run.finished for run in neighbours)
        if finished == 2:
            return "waits for the arms before it, which may take all the places that are left"
        return (
            f"trained only if one of {' and '.join(arm.between or ())} has collapsed and the other has not, "
            f"{finished} of 2 runs finished"
        )

    def waiting(self, count: int) -> str:
        return f"{count} runs wait for their neighbours."


def has_collapsed(collapse: float, row: Mapping[str, Any]) -> bool:
    """True if the row of a finished run is of a collapsed codebook."""
    return row["status"] != "ok" or float(row["perplexity_share"]) < collapse


def saturation(run: RunDirectory) -> dict[str, float]:
    """Decisiveness of assignments when the run first logged and when it last did: standard deviation of a token's
    logits over the codes, and the largest probability of its softmax at temperature 1, means over tokens; none where
    they were not finite."""
    history = run.read_history()
    ends = {"first": history[0], "last": history[-1]} if history else {}
    return {
        f"{end}.{name}": float(line[name])
        for end, line in ends.items()
        for name in DECISIVE
        if line.get(name) is not None
    }
