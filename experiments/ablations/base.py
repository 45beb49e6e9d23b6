"""What an ablation is: a claim stated before its numbers, arms that differ in named factors, and what the paper reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from experiments.recipes import Preset


@dataclass(frozen=True)
class Arm:
    """One configuration of an ablation, described by the level of each factor; its config follows from the levels alone."""

    name: str
    levels: Mapping[str, str]
    seeds: int = 1
    focal: bool = False
    """Drawn in colour, and kept in the figures that show only a few arms."""


@dataclass(frozen=True)
class Factor:
    """A named choice and its levels, in the order in which a change counts as positive."""

    name: str
    levels: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class Contrast:
    """A claim and the pair of arms that tests it.

    Stated before the numbers: `outcome` changes from `without` to `with_` by at least `effect` (its sign is the direction) in every seed.
    """

    name: str
    without: str
    with_: str
    claim: str
    outcome: Literal["bits", "l1"]
    effect: float


@dataclass(frozen=True)
class PaperRow:
    """A row of a table of the paper, None where it reports no number; `arm` is the arm that comes closest to it, if there is one."""

    method: str
    rfid: float | None
    usage_pct: float | None
    arm: str | None = None


@dataclass(frozen=True)
class Ablation:
    """One study: see `experiments/ablations/`.

    The first factor is the method, by which figures choose colours; `quantizer(levels)` turns an arm's levels into quantizer fields.
    """

    name: str
    title: str
    notebook: str
    question: str
    factors: tuple[Factor, ...]
    arms: tuple[Arm, ...]
    contrasts: tuple[Contrast, ...]
    quantizer: Callable[[Mapping[str, str]], dict[str, Any]]
    paper_source: str
    paper_rows: tuple[PaperRow, ...]

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def letter(self, name: str) -> str:
        """The key under which figures name an arm; the table spells it out."""
        return chr(ord("A") + [arm.name for arm in self.arms].index(name))

    def seeds(self, arm: Arm, preset: Preset, wanted: int | None) -> range:
        """Seeds of an arm: its own number, or as many as the user wants."""
        return range(min(wanted or arm.seeds, preset.max_seeds))
