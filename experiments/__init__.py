"""The study: recipes, ablations, sweeps, rows, tables, figures and the report. Imports ibq, never the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.study import Study


def run(
    *ablations: str,
    preset: str = "quick",
    seeds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    bases: Sequence[str] = (),
    slots: int | None = None,
    time_budget_minutes: float | None = None,
    fail_fast: bool = False,
) -> Study:
    """Train what has no row yet of the named ablations (none: the core study) and project what is new, as the command
    line does.

    Args:
        ablations: names.
        preset: the scale.
        seeds: seeds of every arm; None: each arm's own number.
        overrides: fields changed in every arm, by dotted path.
        grid: values by dotted path; in place of ablations, every combination of them is an arm.
        bases: arms that the grid starts from, as "ablation/arm", or the arm alone where one ablation has it; none: the
            published pair.
        slots: runs at a time.
        time_budget_minutes: stop, resumably, after so long.
        fail_fast: stop at the first failure.

    Returns:
        The study, for `experiments.rows.load` and the figures.

    Raises:
        ConfigError: a name, a field or a value that does not exist or fit; one sentence.
    """
    from experiments.analysis.projections import project_all
    from experiments.runner.sweep import train_study
    from experiments.study import Study, advance

    study = Study(preset, ablations, seeds, overrides or {}, grid or {}, tuple(bases))
    budget_s = None if time_budget_minutes is None else 60 * time_budget_minutes
    train_study(study, slots=slots, time_budget_s=budget_s, fail_fast=fail_fast)
    study, _ = advance(study)
    project_all((cell for cell in study.cells if cell.seed == 0), study.preset.projection)
    return study


__all__ = ["Study", "run"]


def __getattr__(name: str) -> Any:
    if name != "Study":
        raise AttributeError(f"module 'experiments' has no attribute {name!r}")
    from experiments.study import Study  # here, since `--help` does without torch

    return Study
