"""A map's border of collapse: which arms between others are trained, because exactly one of the two has collapsed
(`Border`).

It follows from rows alone, so that any process that looks decides alike, however often a study is killed and begun
again. An arm between two that agree is left out, and so is one beside an arm that was left out, since the border does
not pass there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from experiments.ablations import Ablation, Arm, Border
from ibq.run_directory import RunDirectory

DECISIVE = ("logit_spread", "max_probability")
Fate = Literal["trained", "waits", "agreeing", "beyond"]
"""Of an arm: it is trained, it waits for others, its neighbours agree, or there is no room for it among the most
arms."""


def has_collapsed(border: Border, row: Mapping[str, Any]) -> bool:
    """Whether the row of a finished run is of a collapsed codebook."""
    return row["status"] != "ok" or float(row["perplexity_share"]) < border.collapse


def saturation(run: RunDirectory) -> dict[str, float]:
    """How decisive assignments were when the run first logged and when it last did: standard deviation of a token's
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


def fates(ablation: Ablation, runs: Mapping[str, RunDirectory], most_arms: int) -> dict[str, Fate]:
    """What becomes of each arm.

    Args:
        ablation: one with a border.
        runs: by arm the run of seed 0; an arm that is not among them is not in the study.
        most_arms: how many are trained at most. An arm for which there would be no room if all that wait before it were
            trained waits, so that the order in which runs finish decides nothing; a run that fails for good may so hold
            others back until it is mended.
    """
    assert ablation.border
    certain = [arm.name for arm in ablation.arms if arm.between is None and arm.name in runs]
    known: dict[str, Fate] = {name: "trained" if i < most_arms else "beyond" for i, name in enumerate(certain)}
    taken = possible = min(len(certain), most_arms)
    for arm in [arm for arm in ablation.arms if arm.between and arm.name in runs]:
        fate = _of_neighbours(ablation.border, arm, runs, known)
        if fate in ("trained", "waits") and taken >= most_arms:
            fate = "beyond"
        elif fate == "trained" and possible >= most_arms:
            fate = "waits"
        known[arm.name] = fate
        taken += fate == "trained"
        possible += fate in ("trained", "waits")
    return known


def _of_neighbours(border: Border, arm: Arm, runs: Mapping[str, RunDirectory], known: Mapping[str, Fate]) -> Fate:
    """What an arm's neighbours say, whether or not there is room for it."""
    assert arm.between
    of_neighbours = {known.get(name, "beyond") for name in arm.between}
    if of_neighbours & {"agreeing", "beyond"}:
        return "agreeing" if "agreeing" in of_neighbours else "beyond"
    neighbours = [runs[name] for name in arm.between]
    if "waits" in of_neighbours or not all(run.finished for run in neighbours):
        return "waits"
    one, other = (has_collapsed(border, run.read_row()) for run in neighbours)
    return "trained" if one != other else "agreeing"
