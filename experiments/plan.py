"""What a study would train, and what that costs."""

from __future__ import annotations

import pandas as pd

from experiments.ablations import Ablation
from experiments.study import Study, unique_runs
from experiments.sweep import default_slots


def plan_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Every arm of an ablation: letter, name, the level of each factor, seeds, steps, and how many of its runs are finished."""
    lines = []
    for arm in ablation.arms:
        cells = [cell for cell in study.cells if cell.ablation.name == ablation.name and cell.arm is arm]
        if cells:
            finished = sum(cell.run.finished for cell in cells)
            line = {"": ablation.letter(arm.name), "arm": arm.name, **arm.levels}
            lines.append(line | {"steps": cells[0].config.steps, "seeds": len(cells), "finished": finished})
    return pd.DataFrame(lines)


def expected_cost(study: Study, slots: int | None = None) -> str:
    """One sentence: runs, steps left, and minutes, from the speed of this study's finished runs or else of the preset's reference."""
    cells = unique_runs(study.cells)
    left = [cell for cell in cells if not cell.run.finished]
    rows = [cell.run.read_row() for cell in cells if cell.run.finished]
    measured = [row["train_seconds"] / row["config.steps"] for row in rows if row["status"] == "ok"]
    per_step = sum(measured) / len(measured) if measured else study.preset.seconds_per_step
    basis = f"{len(measured)} finished runs" if measured else study.preset.measured_on
    at_once = min(slots or default_slots("auto"), max(1, len(left)))
    steps = sum(cell.config.steps for cell in left)
    return (
        f"{len(cells)} runs, {len(cells) - len(left)} finished; {steps:,} steps left at {per_step:.3f} s a step (measured on {basis}), "
        f"{at_once} at a time: about {steps * per_step / at_once / 60:.1f} minutes"
    )
