"""Cells of a study: an arm at a seed with its config and run; and what such a cell needs first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from experiments.ablations import Ablation, Arm, Trial
from ibq.config import RunConfig
from ibq.run_directory import RunDirectory

Stage = Literal["tokenizer", "transformer"]
STAGES: tuple[Stage, ...] = ("tokenizer", "transformer")


class Search(NamedTuple):
    """Purpose of a run of a search: the arm, and the value of the tuned field that it tries."""

    arm: str
    value: float


@dataclass(frozen=True)
class Cell:
    """One arm at one seed; or a run that such a cell needs first, whose arm is none of the ablation's: of its search,
    or its tokenizer.

    Cells may share a run: the run's id depends on its config alone.
    """

    ablation: Ablation
    arm: Arm
    seed: int
    config: RunConfig
    run: RunDirectory
    search: Search | None = None
    tokenizer: Cell | None = None
    """Of a transformer: the cell of its tokenizer, whose run has to be finished first."""
    tokenizer_of: str | None = None
    """Of a transformer's tokenizer: the transformer's arm."""

    @property
    def name(self) -> str:
        return f"{self.ablation.name}/{self.arm.name} seed {self.seed}"

    @property
    def is_arm(self) -> bool:
        """True for an arm of the ablation itself, which tables and figures show."""
        return self.search is None and self.tokenizer_of is None

    @property
    def stage(self) -> Stage:
        """Network that its run trains."""
        return "transformer" if self.tokenizer else "tokenizer"


class Stages(NamedTuple):
    """The cells that can be trained now, those that wait, and the arms that have none, as "ablation/arm": with too many
    codes for the preset, between neighbours that agree, and beyond the most arms of a map."""

    ready: list[Cell]
    waiting: list[Cell]
    too_large: list[str]
    agreeing: list[str]
    beyond: list[str]


def unique_runs(cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of each run: what has to be trained."""
    return list({cell.run.path: cell for cell in reversed(list(cells))}.values())[::-1]


def trials(cells: Iterable[Cell], ablation: Ablation, arm: str) -> list[Trial]:
    """The runs of the search that an arm takes its value from."""
    of = ablation.arm(arm).tuned_as or arm
    return [
        Trial(cell.search.value, cell.run, cell.config.steps)
        for cell in cells
        if cell.ablation is ablation and cell.search and cell.search.arm == of
    ]
