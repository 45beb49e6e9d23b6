"""What a study would train, and what that costs."""

from __future__ import annotations

import pandas as pd

from experiments.ablations import Ablation
from experiments.study import Study, unique_runs
from experiments.sweep import default_slots


def plan_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Every arm of an ablation: letter, name, the level of each factor, its search if there is one, steps, seeds, finished runs."""
    lines = []
    for arm in ablation.arms:
        ready = [cell for cell in study.cells if cell.ablation.name == ablation.name and cell.arm is arm]
        cells = ready + [cell for cell in study.waiting if cell.ablation.name == ablation.name and cell.arm is arm]
        if cells:
            line: dict[str, object] = {"": ablation.letter(arm.name), "arm": arm.name, **arm.levels}
            if ablation.tuning:
                line[f"search of {ablation.tuning.field}"] = (
                    f"as {arm.tuned_as}" if arm.tuned_as else _search_phrase(study, ablation, arm.name)
                )
            line |= {"steps": cells[0].config.steps, "seeds": len(cells)}
            lines.append(line | {"finished": sum(cell.run.finished for cell in ready)})
    return pd.DataFrame(lines)


def _search_phrase(study: Study, ablation: Ablation, arm: str) -> str:
    search = [cell for cell in study.cells if cell.ablation.name == ablation.name and cell.search and cell.search.arm == arm]
    values = ", ".join(f"{cell.search.value:g}" for cell in search if cell.search)
    return f"{values}; {search[0].config.steps} steps each, {sum(cell.run.finished for cell in search)} finished" if search else ""


def expected_cost(study: Study, slots: int | None = None) -> str:
    """Runs, steps left, and minutes, from the speed of this study's finished runs or else of the preset's reference; searches included."""
    cells, waiting = unique_runs(study.cells), study.waiting
    left = [cell for cell in cells if not cell.run.finished]
    rows = [cell.run.read_row() for cell in cells if cell.run.finished]
    measured = [row["train_seconds"] / row["config.steps"] for row in rows if row["status"] == "ok"]
    per_step = sum(measured) / len(measured) if measured else study.preset.seconds_per_step
    basis = f"{len(measured)} finished runs" if measured else study.preset.measured_on
    at_once = min(slots or default_slots("auto"), max(1, len(left)))
    steps = sum(cell.config.steps for cell in left + waiting)
    searching = [cell for cell in left if cell.search]
    searched = sum(cell.config.steps for cell in searching)
    stages = f" ({searched:,} of them in {len(searching)} runs of a search that {len(waiting)} runs wait for)" if waiting else ""
    left_out = study.left_out
    too_large = f"; left out, having more than {study.preset.max_codebook_size:,} codes: {', '.join(left_out)}" if left_out else ""
    todo = f"{len(cells) + len(waiting)} runs, {len(cells) - len(left)} finished; {steps:,} steps left{stages}"
    if per_step is None:
        return f"{todo}; how long they take is not known: no step of preset {study.preset_name} has been measured{too_large}"
    minutes = steps * per_step / at_once / 60
    return f"{todo} at {per_step:.3f} s a step (measured on {basis}), {at_once} at a time: about {minutes:.1f} minutes{too_large}"
