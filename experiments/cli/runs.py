"""Commands on single runs: forget, rerun, compare."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from experiments.cli.base import DeviceOption, PluginOption, app, console, say, use_plugins
from ibq.cli.boundary import one_sentence_errors

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a run's id as status shows it, or its beginning")]


@app.command()
@one_sentence_errors
def forget(run_id: RunArgument) -> None:
    """Remove a run for good."""
    from experiments.runner import runs

    run = runs.find_run(run_id)
    kept = runs.kept_copies(run)
    runs.forget(run)
    print("; ".join(part for part in (f"forgot {run.path.name}", kept) if part))


@app.command()
@one_sentence_errors
def rerun(run_id: RunArgument, device: DeviceOption = "auto", plugin: PluginOption = None) -> None:
    """Train a run again, and say what changed."""
    use_plugins(plugin)
    from experiments.runner import runs

    run = runs.find_run(run_id)
    before, after = runs.rerun(run, device, say)
    if before and after:
        changed = [name for name in after if before.get(name) != after[name]]
        print(f"entries that differ from the former row: {', '.join(changed) or 'none'}")
    if not after:
        raise typer.Exit(1)
    if kept := runs.kept_copies(run):
        print(kept)


@app.command()
@one_sentence_errors
def compare(one: RunArgument, other: RunArgument) -> None:
    """Config fields and results in which two runs differ."""
    from experiments.runner import runs

    pair = [runs.find_run(name) for name in (one, other)]
    table = Table("", *(run.path.name for run in pair), box=None)
    for line in runs.compare(*pair):
        table.add_row(*(escape(str(value)) for value in line))
    console.print(table)
