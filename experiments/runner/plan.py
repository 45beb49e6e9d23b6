"""Plan of a study: the runs it would train, and their cost."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pandas as pd

from experiments.ablations import Ablation
from experiments.ablations.grid import text
from experiments.cells import STAGES, Cell, Stage, trials, unique_runs
from experiments.runner.sweep import default_slots
from experiments.runner.throughput import StepCost, step_cost, work
from experiments.study import Study, possible
from ibq.plugins import loaded


def plan_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Every arm of an ablation: letter, name, level of each factor, search and tokenizer where it has them, steps,
    seeds, finished runs."""
    lines = []
    for arm in ablation.arms:
        ready = [cell for cell in study.cells if cell.ablation.name == ablation.name and cell.arm is arm]
        cells = ready + [cell for cell in study.waiting if cell.ablation.name == ablation.name and cell.arm is arm]
        if cells:
            line: dict[str, object] = {"": ablation.letter(arm.name), "arm": arm.name, **arm.levels}
            line |= ablation.adaptive.columns(arm, [] if arm.tuned_as else trials(study.cells, ablation, arm.name))
            if ablation.of_transformers:
                line["tokenizer"] = _tokenizer_phrase(cells)
            line |= {"steps": cells[0].config.steps, "seeds": len(cells)}
            lines.append(line | {"finished": sum(cell.run.finished for cell in ready)})
    return pd.DataFrame(lines)


def _tokenizer_phrase(cells: list[Cell]) -> str:
    tokenizers = [cell.tokenizer for cell in cells if cell.tokenizer]
    return f"{tokenizers[0].config.steps} steps, {sum(cell.run.finished for cell in tokenizers)} finished"


def expected_cost(study: Study, slots: int | None = None) -> str:
    """Runs, steps left, and minutes, from the speed of this study's finished runs or else of the preset's reference;
    searches and the tokenizers of transformers included."""
    cells, waiting = unique_runs(study.cells), unique_runs(possible(study))
    left = [cell for cell in cells if not cell.run.finished]
    stages = [stage for stage in STAGES if any(cell.stage == stage for cell in cells + waiting)]
    costs = {stage: step_cost(study, stage) for stage in stages}
    steps_left = " and ".join(
        _steps_left(stage, costs[stage], left, waiting, alone=len(stages) == 1) for stage in stages
    )
    todo = f"{len(cells) + len(waiting)} runs, {len(cells) - len(left)} finished; {steps_left}"
    left_out = study.left_out
    too_large = (
        f"; left out, having more than {study.preset.max_codebook_size:,} codes: {', '.join(left_out)}"
        if left_out
        else ""
    )
    if study.agreeing:
        too_large += f"; left out between neighbours that agree: {len(study.agreeing)}"
    if study.beyond:
        too_large += f"; left out for want of room on a map: {len(study.beyond)}"
    if unmeasured := [stage for stage in stages if costs[stage].seconds is None]:
        step = "step of a transformer" if unmeasured == ["transformer"] else "step"
        return (
            f"{todo}; how long they take is not known: no {step} of preset {study.preset_name} has been "
            f"measured{too_large}"
        )
    at_once = min(slots or default_slots("auto"), max(1, len(left + waiting)))
    seconds = sum(work(cell, study.preset) * (costs[cell.stage].seconds or 0.0) for cell in left + waiting)
    return f"{todo}, {at_once} at a time: about {seconds / at_once / 60:.1f} minutes{too_large}"


def _steps_left(stage: Stage, cost: StepCost, left: list[Cell], waiting: list[Cell], alone: bool) -> str:
    """Steps of one stage that are still to do, what has to come before, and seconds of a step where they are known."""
    mine, waits = ([cell for cell in cells if cell.stage == stage] for cells in (left, waiting))
    steps = sum(cell.config.steps for cell in mine + waits)
    named = "steps left" if alone else "steps of tokenizers left" if stage == "tokenizer" else "of transformers"
    phrase = f"{steps:,} {named}"
    if waits and stage == "transformer":
        phrase += f" ({len(waits)} runs wait for their tokenizers)"
    elif between := [cell for cell in waits if cell.arm.between]:
        conditional = sum(cell.config.steps for cell in between)
        phrase += f" (at most: {conditional:,} of them in {len(between)} runs between others, if these disagree)"
    elif waits:
        searching = [cell for cell in mine if cell.search]
        searched = sum(cell.config.steps for cell in searching)
        phrase += f" ({searched:,} of them in {len(searching)} runs of a search that {len(waits)} runs wait for)"
    if cost.seconds is None:
        return phrase
    size = "" if stage == "tokenizer" else " of the preset's size, encoding and evaluation included"
    return f"{phrase} at {cost.seconds:.3f} s a step{size} (measured on {cost.basis})"


def command(study: Study, *names: str) -> str:
    """The command that trains these ablations of a study; without fields of transformers where they have none, since it
    would be refused."""
    named = [ablation for ablation in study.ablations if ablation.name in names]
    words = ["python", "-m", "experiments", "run", *([] if study.grid else names), "--preset", study.preset_name]
    words += [] if study.seeds is None else ["--seeds", str(study.seeds)]
    for path, value in sorted(study.overrides_of(*named).items()):
        words += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    for field, values in study.grid.items():
        words += ["--grid", f"{field}={','.join(map(text, values))}"]
    for base in study.bases:
        words += ["--base", base]
    for plugin in loaded():
        file = plugin.path.relative_to(Path.cwd()) if plugin.path.is_relative_to(Path.cwd()) else plugin.path
        words += [] if plugin.installed else ["--plugin", str(file)]
    return shlex.join(words)
