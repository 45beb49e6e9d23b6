"""Parts of the commands: the app, the options that several have, and the study that a command line names."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ibq import plugins
from ibq.cli.settings import changes, equation, value_of
from ibq.errors import ConfigError

if TYPE_CHECKING:
    from experiments.study import Study

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Ablations of image tokenizers."
)
console = Console(width=None if sys.stdout and sys.stdout.isatty() else 200, highlight=False)

Names = Annotated[
    list[str] | None,
    typer.Argument(help="ablations; none: the core study; 'all': every one but collapse_atlas and evidence"),
]
PresetOption = Annotated[str, typer.Option("--preset", help="scale: smoke, quick, night, gpu, paper")]
SeedsOption = Annotated[int | None, typer.Option("--seeds", help="seeds of every arm; default: each arm's own number")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="field=value, of a study in every arm, e.g. optim.lr=3e-4 or transformer.steps=500; repeatable"
    ),
]
GridOption = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        help="field=value,value in place of ablations, every combination an arm, e.g. optim.lr=1e-4,1e-3; repeatable",
    ),
]
BaseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--base", help="arm that the grid starts from, e.g. vq_vs_ibq/vq_fair; repeatable; none: the published pair"
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", metavar="FILE.py", help="quantizer of your own, an arm of quantizers; repeatable; also IBQ_PLUGINS"
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]


def use_plugins(files: list[str] | None) -> None:
    """Load plugins, here and in every process started from here."""
    if files:
        plugins.use(files)
        from experiments.ablations import include_plugins

        include_plugins()


def study_of(
    names: list[str] | None,
    preset: str,
    seeds: int | None,
    set_: list[str] | None,
    grid: list[str] | None,
    base: list[str] | None,
    plugin: list[str] | None,
) -> Study:
    """The study that a command line names."""
    use_plugins(plugin)
    from experiments.ablations import ALL
    from experiments.imagenet256 import RECIPES
    from experiments.study import Study

    if recipes := [name for name in names or [] if name in RECIPES]:
        raise ConfigError(
            f"{recipes[0]!r} is a recipe, not an ablation; use train: python -m experiments train {recipes[0]}"
        )
    values: dict[str, list[Any]] = {}
    for path, text in (equation("--grid", line) for line in grid or []):
        if path in values:
            raise ConfigError(f"--grid has {path} twice; give all its values in one, e.g. --grid {path}=VALUE,VALUE")
        values[path] = _values(text)
    return Study(
        preset, ALL if names == ["all"] else tuple(names or ()), seeds, changes(set_), values, tuple(base or ())
    )


def _values(text: str) -> list[Any]:
    """Values between commas: JSON as a whole, so that lists may be values, else each value by itself."""
    try:
        return list(json.loads(f"[{text}]"))
    except json.JSONDecodeError:
        return [value_of(part) for part in text.split(",")]


def say(line: str) -> None:
    print(line, flush=True)
