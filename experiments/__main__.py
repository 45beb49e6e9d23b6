"""python -m experiments list | plan | run | status | report"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.ablations import ABLATIONS
from experiments.recipes import PRESETS
from experiments.study import Study, unique_runs
from experiments.sweep import default_slots, terminable, train_study
from ibq.data import DataError
from ibq.errors import ConfigError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Ablations of image tokenizers.")
console = Console(soft_wrap=True, highlight=False)

Names = Annotated[list[str] | None, typer.Argument(help="ablations; none means all")]
PresetOption = Annotated[str, typer.Option("--preset", help=f"scale: {', '.join(PRESETS)}")]
SeedsOption = Annotated[int | None, typer.Option("--seeds", help="seeds of every arm; default: each arm's own number")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="field=value in every arm, e.g. optim.lr=3e-4; repeatable")]
SlotsOption = Annotated[int | None, typer.Option("--slots", min=1, help="runs at a time; default: one a core, or one on a GPU")]


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's error is one line on stderr and exit code 2, never a traceback; Ctrl-C and SIGTERM stop resumably, code 130."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with terminable():
                command(*args, **kwargs)
        except (ConfigError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None

    return guarded


def study_of(names: list[str] | None, preset: str, seeds: int | None, changes: list[str] | None) -> Study:
    """The study that a command line names."""
    overrides = {}
    for change in changes or []:
        path, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change!r} is not of the form field=value, e.g. --set optim.lr=3e-4")
        overrides[path] = _value(text)
    return Study(preset, tuple(names or ()), seeds, overrides)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@app.command("list")
@one_sentence_errors
def list_ablations() -> None:
    """The ablations and presets there are."""
    table = Table("ablation", "arms", "question", box=None)
    for ablation in ABLATIONS.values():
        table.add_row(ablation.name, str(len(ablation.arms)), escape(ablation.question))
    presets = Table("preset", "for", box=None)
    for preset in PRESETS.values():
        presets.add_row(preset.name, escape(preset.purpose))
    console.print(table, "", presets)


@app.command()
@one_sentence_errors
def plan(
    names: Names = None, preset: PresetOption = "quick", seeds: SeedsOption = None, set_: SetOption = None, slots: SlotsOption = None
) -> None:
    """Arms, steps and expected minutes; trains nothing."""
    study = study_of(names, preset, seeds, set_)
    cells = unique_runs(study.cells)
    done = [cell for cell in cells if cell.run.finished]
    measured = [cell.run.read_row()["train_seconds"] / cell.config.steps for cell in done if cell.run.read_row()["status"] == "ok"]
    per_step = sum(measured) / len(measured) if measured else study.preset.seconds_per_step
    table = Table("arm", "seeds", "steps", "changes from the first arm", box=None)
    for ablation in study.ablations:
        base = ablation.arms[0]
        for arm in ablation.arms:
            mine = [cell for cell in study.cells if cell.arm is arm and cell.ablation is ablation]
            changes = ", ".join(f"{f} {level}" for f, level in arm.levels.items() if level != base.levels[f])
            table.add_row(f"{ablation.name}/{arm.name}", str(len(mine)), str(mine[0].config.steps), escape(changes))
    console.print(table)
    left = sum(cell.config.steps for cell in cells if not cell.run.finished)
    at_once = min(slots or default_slots("auto"), max(1, len(cells) - len(done)))
    basis = f"measured on {len(measured)} finished runs" if measured else f"measured on {study.preset.measured_on}"
    print(
        f"{len(cells)} runs, {len(done)} finished; {left} steps left at {per_step:.3f} s a step ({basis}), {at_once} at a time: "
        f"about {left * per_step / at_once / 60:.1f} minutes"
    )


@app.command()
@one_sentence_errors
def run(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    slots: SlotsOption = None,
    time_budget: Annotated[float | None, typer.Option(help="minutes; then stop, resumably")] = None,
    fail_fast: Annotated[bool, typer.Option(help="stop everything at the first failed run")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Train all arms that have no row yet, execute the notebooks, write the report."""
    study, started = study_of(names, preset, seeds, set_), time.monotonic()
    budget_s = None if time_budget is None else 60 * time_budget
    outcome = train_study(study, slots=slots, device=device, time_budget_s=budget_s, fail_fast=fail_fast, say=_say)
    from experiments import notebooks, projections, report

    if not outcome.unfinished and study.preset_name != "smoke":
        projections.project_all((cell for cell in study.cells if cell.seed == 0), study.preset.projection, _say)
    if outcome.finished:
        command = f"python -m experiments {shlex.join(sys.argv[1:])}"
        report.record_session(study, command, len(outcome.finished), (time.monotonic() - started) / 60)
    if not outcome.unfinished:
        notebooks.execute_changed(study, _say)
    page = report.write(study)
    print(f"report: {page}")
    _suggest_gpu(study)
    if outcome.failed or outcome.unfinished:
        print(
            f"{len(outcome.failed)} failed, {len(outcome.unfinished) - len(outcome.failed)} unfinished; the same command goes on from here"
        )
        raise typer.Exit(1)


@app.command()
@one_sentence_errors
def status(names: Names = None, preset: PresetOption = "quick", seeds: SeedsOption = None, set_: SetOption = None) -> None:
    """Every arm: finished, running with step and speed, failed with its reason, or pending."""
    from experiments.rows import status_lines

    study = study_of(names, preset, seeds, set_)
    table = Table("arm", "state", "detail", "run", box=None)
    for line in status_lines(study):
        table.add_row(*(escape(str(line[key])) for key in ("arm", "state", "detail", "run")))
    console.print(table)


@app.command()
@one_sentence_errors
def report(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    publish: Annotated[bool, typer.Option(help="also copy it to reports/published/, to be committed")] = False,
) -> None:
    """Tables, figures and the page, from the rows there are."""
    from experiments import report as report_module

    study = study_of(names, preset, seeds, set_)
    print(f"report: {report_module.write(study)}")
    if publish:
        print(f"published: {report_module.publish(study)}")


def _say(line: str) -> None:
    print(line, flush=True)


def _suggest_gpu(study: Study) -> None:
    import torch

    if torch.cuda.is_available() and study.preset_name == "quick":
        print(f"a GPU is here ({torch.cuda.get_device_name()}): make study PRESET=gpu runs the study at the paper's codebook size")


if __name__ == "__main__":
    app(prog_name="python -m experiments")
