"""Commands on studies: list, plan, run, status, report, evaluate."""

from __future__ import annotations

import inspect
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from experiments.cli.base import (
    BaseOption,
    DeviceOption,
    GridOption,
    Names,
    PluginOption,
    PresetOption,
    SeedsOption,
    SetOption,
    app,
    console,
    say,
    study_of,
    use_plugins,
)
from ibq.cli.boundary import one_sentence_errors
from ibq.cli.settings import changes
from ibq.errors import ConfigError, nearest, require_writable
from ibq.metrics import NETWORKS

if TYPE_CHECKING:
    from experiments.study import Study

MetricOption = Annotated[
    str,
    typer.Option(
        "--metric",
        help="; ".join(
            [
                "full_test: the whole test split, where the row has its first images only",
                "train_split: as many images of the train split",
                *(f"{name}: {what}" for name, what in NETWORKS.items()),
                "diagnosis: what a tokenizer's history shows, in words",
            ]
        ),
    ),
]
SlotsOption = Annotated[
    int | None, typer.Option("--slots", help="runs at a time; default: one a core, or one on a GPU")
]


@app.command("list")
@one_sentence_errors
def list_ablations(
    quantizers: Annotated[
        bool, typer.Option("--quantizers", help="the quantizers instead, with their options and papers")
    ] = False,
    plugin: PluginOption = None,
) -> None:
    """The ablations, recipes and presets there are."""
    use_plugins(plugin)
    from experiments.ablations import ABLATIONS
    from experiments.imagenet256 import RECIPES
    from experiments.recipes import PRESETS

    if quantizers:
        from experiments.cli.quantizer_options import options_table  # torch, which the rest does without

        table = Table("method", "options", "paper", box=None)
        for method, options, paper in options_table():
            table.add_row(method, escape("\n".join(options)), paper, end_section=True)
        console.print(table)
        return
    table = Table("ablation", "arms", "question", box=None)
    for ablation in ABLATIONS.values():
        table.add_row(ablation.name, str(len(ablation.arms)), escape(ablation.question))
    recipes = Table("recipe", "what", box=None)
    for name, recipe in RECIPES.items():
        recipes.add_row(name, escape(str(inspect.getdoc(recipe)).splitlines()[0]))
    presets = Table("preset", "for", box=None)
    for preset in PRESETS.values():
        presets.add_row(preset.name, escape(preset.purpose))
    console.print(table, "", recipes, "", presets)


@app.command()
@one_sentence_errors
def plan(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(help="ablations as for run, or recipes as list shows them")
    ] = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
    plugin: PluginOption = None,
    slots: SlotsOption = None,
    gpus: Annotated[int, typer.Option(min=1, help="of a recipe: processes, each with a GPU")] = 8,
) -> None:
    """Arms, steps and expected minutes, or what a recipe would cost; trains nothing."""
    use_plugins(plugin)
    from experiments.ablations import ABLATIONS
    from experiments.imagenet256 import RECIPES

    if recipes := [name for name in names or [] if name in RECIPES]:
        if others := [name for name in names or [] if name not in RECIPES]:
            raise ConfigError(
                f"{others[0]!r} is no recipe, as {recipes[0]!r} is; plan ablations and recipes one after the other"
            )
        _refuse_idle(context, "a recipe", ("preset", "seeds", "grid", "base", "plugin", "slots"), "--set and --gpus")
        print("\n\n".join(_plan_of_recipe(name, changes(set_), gpus) for name in recipes))
        return
    if unknown := [name for name in names or [] if name not in ABLATIONS and name != "all"]:
        raise ConfigError(
            f"ablation or recipe {unknown[0]!r} does not exist; {nearest(unknown[0], [*ABLATIONS, *RECIPES])}"
        )
    _refuse_idle(context, "an ablation", ("gpus",), "--preset, --seeds, --set, --grid, --base, --plugin and --slots")
    _plan_study(study_of(names, preset, seeds, set_, grid, base, plugin), slots)


def _refuse_idle(context: typer.Context, what: str, options: tuple[str, ...], others: str) -> None:
    sources = {option: context.get_parameter_source(option) for option in options}
    if idle := [option for option, source in sources.items() if source and source.name == "COMMANDLINE"]:
        raise ConfigError(f"the plan of {what} has no --{idle[0]}; it has {others}")


def _plan_of_recipe(name: str, overrides: dict[str, Any], gpus: int) -> str:
    from experiments.imagenet256 import RECIPES, tokenizer_plan, transformer_plan
    from ibq.config import TransformerTrainConfig

    config = RECIPES[name]().with_fields(**overrides)
    lines = (
        transformer_plan.plan(config, gpus)
        if isinstance(config, TransformerTrainConfig)
        else tokenizer_plan.plan(config, gpus)
    )
    heading = str(inspect.getdoc(RECIPES[name]))
    if overrides:
        changed = ", ".join(f"{field}={value}" for field, value in overrides.items())
        heading += f"\n\nchanged: {changed}; the heading is that of the recipe unchanged"
    return "\n".join([name, heading, "", *(f"{subject + ':':<11} {text}" for subject, text in lines)])


def _plan_study(study: Study, slots: int | None) -> None:
    from experiments.runner import plan as plan_module

    for ablation in study.ablations:
        lines = plan_module.plan_table(study, ablation)
        table = Table(*lines.columns, title=ablation.name, box=None)
        for line in lines.itertuples(index=False):
            table.add_row(*(escape(str(value)) for value in line))
        console.print(table)
    print(plan_module.expected_cost(study, slots))


@app.command()
@one_sentence_errors
def run(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
    plugin: PluginOption = None,
    slots: SlotsOption = None,
    time_budget: Annotated[float | None, typer.Option(help="minutes; then stop, resumably")] = None,
    fail_fast: Annotated[bool, typer.Option(help="stop everything at the first failed run")] = False,
    hang_timeout: Annotated[
        float, typer.Option(help="minutes without a sign of life after which a trainer is killed")
    ] = 10.0,
    device: DeviceOption = "auto",
) -> None:
    """Train all arms that have no row yet, execute the notebooks, write the report."""
    from experiments.analysis import projections
    from experiments.report import notebooks, pages
    from experiments.runner.sweep import train_study
    from experiments.study import advance

    study = study_of(names, preset, seeds, set_, grid, base, plugin)
    require_writable(study.report_folder, pages.OWN_FOLDER)  # before hours of training, not after
    started = time.monotonic()
    budget_s = None if time_budget is None else 60 * time_budget
    outcome = train_study(
        study,
        slots=slots,
        device=device,
        time_budget_s=budget_s,
        fail_fast=fail_fast,
        hang_s=60 * hang_timeout,
        say=say,
    )
    study, _ = advance(study)
    complete = not (outcome.unfinished or outcome.failed)
    if complete:
        projections.project_all((cell for cell in study.cells if cell.seed == 0), study.preset.projection, say)
    if outcome.finished:
        command = f"python -m experiments {shlex.join(sys.argv[1:])}"
        pages.record_session(study, command, len(outcome.finished), (time.monotonic() - started) / 60)
    if complete:
        notebooks.execute_changed(study, say)
    print(f"report: {pages.write(pages.widened(study))}")
    _suggest_gpu(study)
    if not complete:
        print(f"{len(outcome.failed)} failed, {len(outcome.unfinished)} unfinished; the same command goes on from here")
        raise typer.Exit(1)


@app.command()
@one_sentence_errors
def status(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
    plugin: PluginOption = None,
) -> None:
    """Every arm: finished, running with step and speed, failed with its reason, or pending."""
    from experiments.rows import status_lines

    lines = status_lines(study_of(names, preset, seeds, set_, grid, base, plugin))
    widths = {key: max(len(str(line[key])) for line in lines) for key in lines[0]}
    for line in lines:  # plain text: a table of thousands of rows takes longer to lay out than to read
        print("  ".join(str(line[key]).ljust(width) for key, width in widths.items()).rstrip())


@app.command()
@one_sentence_errors
def report(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
    plugin: PluginOption = None,
    publish: Annotated[
        str | None, typer.Option(metavar="NAME", help="also copy it to reports/published/NAME, to be committed")
    ] = None,
) -> None:
    """Tables, figures and the page, from the rows there are."""
    from experiments.report import pages as report_module

    study = report_module.widened(study_of(names, preset, seeds, set_, grid, base, plugin))
    print(f"report: {report_module.write(study)}")
    if publish:
        print(f"published: {report_module.publish(study, publish)}")


@app.command()
@one_sentence_errors
def register() -> None:
    """Register the claims that have no line in experiments/claims.jsonl, with the time now; before their runs."""
    from experiments.analysis import registration

    names = registration.register()
    print("\n".join([*names, f"{len(names)} claims registered in {registration.REGISTER}; commit it"]))


@app.command()
@one_sentence_errors
def evaluate(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
    plugin: PluginOption = None,
    metric: MetricOption = "full_test",
) -> None:
    """Add an evaluation to finished runs, without training."""
    from experiments.runner import runs

    study = study_of(names, preset, seeds, set_, grid, base, plugin)
    print(f"{runs.evaluate_finished(study, metric, say)} runs evaluated with {metric}; the rows have its columns")


def _suggest_gpu(study: Study) -> None:
    import torch

    if torch.cuda.is_available() and study.preset_name == "quick":
        print(
            f"a GPU is here ({torch.cuda.get_device_name()}): make study PRESET=gpu runs the study at the paper's "
            f"codebook size"
        )
