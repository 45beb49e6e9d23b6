"""The command line: python -m experiments list | plan | run | status | report | evaluate | bench | rerun | forget | compare."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from experiments import manage, tables
from experiments.ablations import ABLATIONS
from experiments.quantizer_options import options_table
from experiments.recipes import PRESETS
from experiments.study import Study
from experiments.sweep import HANG_S, terminable, train_study
from ibq.data import DataError
from ibq.errors import ConfigError, nearest

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Ablations of image tokenizers.")
console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)

Names = Annotated[list[str] | None, typer.Argument(help="ablations; none: the core study; 'all': every one")]
PresetOption = Annotated[str, typer.Option("--preset", help=f"scale: {', '.join(PRESETS)}")]
SeedsOption = Annotated[int | None, typer.Option("--seeds", help="seeds of every arm; default: each arm's own number")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="field=value in every arm, e.g. optim.lr=3e-4; repeatable")]
GridOption = Annotated[
    list[str] | None,
    typer.Option("--grid", help="field=value,value in place of ablations, every combination an arm, e.g. optim.lr=1e-4,1e-3; repeatable"),
]
BaseOption = Annotated[
    list[str] | None,
    typer.Option("--base", help="arm that the grid starts from, e.g. vq_vs_ibq/vq_fair; repeatable; none: the published pair"),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a run's id as status shows it, or its beginning")]
MetricOption = Annotated[str, typer.Option("--metric", help="; ".join(f"{k}: {what}" for k, what in manage.EVALUATIONS.items()))]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
SlotsOption = Annotated[int | None, typer.Option("--slots", help="runs at a time; default: one a core, or one on a GPU")]


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's error is one line on stderr and exit code 2, never a traceback; Ctrl-C and SIGTERM stop resumably, code 130."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        for name in ("IBQ_RUNS", "IBQ_REPORTS", "IBQ_DATA", "IBQ_CACHE", "IBQ_WEIGHTS"):  # notebooks run in a folder of their own
            if os.environ.get(name):
                os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())
        try:
            with terminable():
                command(*args, **kwargs)
        except (ConfigError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except SafetensorError as error:
            print(f"error: a run's tensors cannot be read ({error}); forget that run and train it again", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:
            what = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
            print(f"error: {what}: {error.filename or 'while reading or writing'}; nothing finished is lost", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None

    return guarded


def study_of(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
) -> Study:
    """The study that a command line names."""
    overrides = {path: _value(text) for path, text in (_equation("--set", change) for change in set_ or [])}
    values: dict[str, list[Any]] = {}
    for path, text in (_equation("--grid", line) for line in grid or []):
        if path in values:
            raise ConfigError(f"--grid has {path} twice; give all its values in one, e.g. --grid {path}=VALUE,VALUE")
        values[path] = _values(text)
    return Study(preset, tuple(ABLATIONS) if names == ["all"] else tuple(names or ()), seeds, overrides, values, tuple(base or ()))


def of_a_study(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes, in place of its first parameter, the options that name a study, and receives that study."""
    naming, own = signature(study_of, eval_str=True).parameters, signature(command, eval_str=True).parameters

    @wraps(command)
    def with_options(**given: Any) -> None:
        study = study_of(**{name: given.pop(name) for name in naming})
        command(study, **given)

    parameters = [*naming.values(), *list(own.values())[1:]]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return with_options


def _equation(option: str, given: str) -> tuple[str, str]:
    path, equals, text = given.partition("=")
    if not equals:
        raise ConfigError(f"{option} {given!r} is not of the form field=value, e.g. {option} optim.lr=3e-4")
    return path, text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _values(text: str) -> list[Any]:
    """What commas separate: JSON as a whole, so that lists may be values, else each value by itself."""
    try:
        return list(json.loads(f"[{text}]"))
    except json.JSONDecodeError:
        return [_value(part) for part in text.split(",")]


@app.command("list")
@one_sentence_errors
def list_ablations(
    quantizers: Annotated[bool, typer.Option("--quantizers", help="the quantizers instead, with their options and papers")] = False,
) -> None:
    """The ablations and presets there are."""
    if quantizers:
        table = Table("method", "options", "paper", box=None)
        for method, options, paper in options_table():
            table.add_row(method, escape("\n".join(options)), paper, end_section=True)
        console.print(table)
        return
    table = Table("ablation", "arms", "question", box=None)
    for ablation in ABLATIONS.values():
        table.add_row(ablation.name, str(len(ablation.arms)), escape(ablation.question))
    presets = Table("preset", "for", box=None)
    for preset in PRESETS.values():
        presets.add_row(preset.name, escape(preset.purpose))
    console.print(table, "", presets)


@app.command()
@one_sentence_errors
@of_a_study
def plan(study: Study, slots: SlotsOption = None) -> None:
    """Arms, steps and expected minutes; trains nothing."""
    from experiments import plan as plan_module

    for ablation in study.ablations:
        lines = plan_module.plan_table(study, ablation)
        table = Table(*lines.columns, title=ablation.name, box=None)
        for line in lines.itertuples(index=False):
            table.add_row(*(escape(str(value)) for value in line))
        console.print(table)
    print(plan_module.expected_cost(study, slots))


@app.command()
@one_sentence_errors
@of_a_study
def run(
    study: Study,
    slots: SlotsOption = None,
    time_budget: Annotated[float | None, typer.Option(help="minutes; then stop, resumably")] = None,
    fail_fast: Annotated[bool, typer.Option(help="stop everything at the first failed run")] = False,
    hang_timeout: Annotated[float, typer.Option(help="minutes without a sign of life after which a trainer is killed")] = HANG_S / 60,
    device: DeviceOption = "auto",
) -> None:
    """Train all arms that have no row yet, execute the notebooks, write the report."""
    started = time.monotonic()
    budget_s = None if time_budget is None else 60 * time_budget
    outcome = train_study(
        study, slots=slots, device=device, time_budget_s=budget_s, fail_fast=fail_fast, hang_s=60 * hang_timeout, say=_say
    )
    from experiments import notebooks, projections, report

    complete = not (outcome.unfinished or outcome.failed)
    if complete:
        projections.project_all((cell for cell in study.cells if cell.seed == 0), study.preset.projection, _say)
    if outcome.finished:
        command = f"python -m experiments {shlex.join(sys.argv[1:])}"
        report.record_session(study, command, len(outcome.finished), (time.monotonic() - started) / 60)
    if complete:
        notebooks.execute_changed(study, _say)
    print(f"report: {report.write(report.widened(study))}")
    _suggest_gpu(study)
    if not complete:
        print(f"{len(outcome.failed)} failed, {len(outcome.unfinished)} unfinished; the same command goes on from here")
        raise typer.Exit(1)


@app.command()
@one_sentence_errors
@of_a_study
def status(study: Study) -> None:
    """Every arm: finished, running with step and speed, failed with its reason, or pending."""
    from experiments.rows import status_lines

    lines = status_lines(study)
    widths = {key: max(len(str(line[key])) for line in lines) for key in lines[0]}
    for line in lines:  # plain text: a table of thousands of rows takes longer to lay out than to read
        print("  ".join(str(line[key]).ljust(width) for key, width in widths.items()).rstrip())


@app.command()
@one_sentence_errors
@of_a_study
def report(
    study: Study, publish: Annotated[bool, typer.Option(help="also copy it to reports/published/, to be committed")] = False
) -> None:
    """Tables, figures and the page, from the rows there are."""
    from experiments import report as report_module

    study = report_module.widened(study)
    print(f"report: {report_module.write(study)}")
    if publish:
        print(f"published: {report_module.publish(study)}")


@app.command()
@one_sentence_errors
@of_a_study
def evaluate(study: Study, metric: MetricOption = "full_test") -> None:
    """Add an evaluation to finished runs, without training."""
    print(f"{manage.evaluate_finished(study, metric, _say)} runs evaluated with {metric}; the rows have its columns")


@app.command()
@one_sentence_errors
def bench(
    name: Annotated[str, typer.Argument(help="index-backprop")],
    device: DeviceOption = "auto",
    tokens: Annotated[str, typer.Option(help="N, e.g. 1024,4096; default: a grid for the device")] = "",
    codes: Annotated[str, typer.Option(help="K, likewise")] = "",
    dim: Annotated[int, typer.Option(help="D")] = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; default: bfloat16 on CUDA")] = "",
    publish: Annotated[bool, typer.Option(help="also copy it to reports/published/, to be committed")] = False,
) -> None:
    """Measure an operator against its rivals: time, memory, operations a second."""
    from experiments.benchmarks import index_backprop

    if name != "index-backprop":
        raise ConfigError(f"benchmark {name!r} does not exist; {nearest(name, ['index-backprop'])}")
    rows = index_backprop.run(device, _sizes(tokens), _sizes(codes), dim, dtype, _say)
    print(tables.markdown(index_backprop.table(rows)))
    print(f"report: {index_backprop.write(rows, publish)}")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"sizes {text!r} are not whole numbers separated by commas, e.g. 1024,4096") from None


@app.command()
@one_sentence_errors
def forget(run_id: RunArgument, preset: PresetOption = "quick") -> None:
    """Remove a run for good."""
    run = manage.find_run(Study(preset), run_id)
    manage.forget(run)
    print(f"forgot {run.path.name}")


@app.command()
@one_sentence_errors
def rerun(
    run_id: RunArgument,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
) -> None:
    """Train a run again, and say what changed."""
    study = study_of(None if grid else ["all"], preset, seeds, set_, grid, base)
    before, after = manage.rerun(study, manage.find_run(study, run_id), say=_say)
    if before and after:
        changed = [name for name in after if before.get(name) != after[name]]
        print(f"entries that differ from the former row: {', '.join(changed) or 'none'}")
    if not after:
        raise typer.Exit(1)


@app.command()
@one_sentence_errors
def compare(one: RunArgument, other: RunArgument, preset: PresetOption = "quick") -> None:
    """Config fields and results in which two runs differ."""
    runs = [manage.find_run(Study(preset), name) for name in (one, other)]
    table = Table("", *(run.path.name for run in runs), box=None)
    for line in manage.compare(*runs):
        table.add_row(*(escape(str(value)) for value in line))
    console.print(table)


def _say(line: str) -> None:
    print(line, flush=True)


def _suggest_gpu(study: Study) -> None:
    import torch

    if torch.cuda.is_available() and study.preset_name == "quick":
        print(f"a GPU is here ({torch.cuda.get_device_name()}): make study PRESET=gpu runs the study at the paper's codebook size")
