"""What all commands share: the app, where they print, how a user's error ends, and how a command line becomes a
study."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from experiments.ablations import ALL
from experiments.imagenet256 import RECIPES
from experiments.recipes import PRESETS
from experiments.runner.sweep import terminable
from experiments.study import Study
from ibq.data import DataError
from ibq.distributed import PeerLostError, last_words
from ibq.errors import ConfigError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Ablations of image tokenizers."
)
INTERRUPTED = 130
console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)

Names = Annotated[
    list[str] | None, typer.Argument(help="ablations; none: the core study; 'all': every one but collapse_atlas")
]
PresetOption = Annotated[str, typer.Option("--preset", help=f"scale: {', '.join(PRESETS)}")]
SeedsOption = Annotated[int | None, typer.Option("--seeds", help="seeds of every arm; default: each arm's own number")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="field=value in every arm, e.g. optim.lr=3e-4 or transformer.steps=500; repeatable"),
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
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]


FOLDERS = ("IBQ_RUNS", "IBQ_REPORTS", "IBQ_DATA", "IBQ_CACHE", "IBQ_WEIGHTS", "IBQ_IMAGENET")
"""Environment variables that name folders."""


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's error is one line on stderr and exit code 2, never a traceback; Ctrl-C and SIGTERM stop resumably, code
    130.

    Of the processes that torchrun has started on a node, the first one says it.
    """

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        for name in FOLDERS:  # made absolute, since notebooks run in a folder of their own
            if os.environ.get(name):
                os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())
        try:
            with terminable():
                command(*args, **kwargs)
        except (ConfigError, DataError, PeerLostError) as error:
            raise _ended(f"error: {error}", 2) from None
        except SafetensorError as error:
            raise _ended(
                f"error: a run's tensors cannot be read ({error}); forget that run and train it again", 2
            ) from None
        except OSError as error:
            what = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
            raise _ended(
                f"error: {what}: {error.filename or 'while reading or writing'}; nothing finished is lost", 2
            ) from None
        except KeyboardInterrupt:
            raise _ended("stopped; the same command goes on from here", INTERRUPTED) from None

    return guarded


def _ended(sentence: str, code: int) -> typer.Exit:
    last_words(sentence, interrupted=code == INTERRUPTED)
    return typer.Exit(code)


def study_of(
    names: Names = None,
    preset: PresetOption = "quick",
    seeds: SeedsOption = None,
    set_: SetOption = None,
    grid: GridOption = None,
    base: BaseOption = None,
) -> Study:
    """The study that a command line names."""
    if recipes := [name for name in names or [] if name in RECIPES]:
        raise ConfigError(
            f"{recipes[0]!r} is a recipe, not an ablation; use train: python -m experiments train {recipes[0]}"
        )
    values: dict[str, list[Any]] = {}
    for path, text in (_equation("--grid", line) for line in grid or []):
        if path in values:
            raise ConfigError(f"--grid has {path} twice; give all its values in one, e.g. --grid {path}=VALUE,VALUE")
        values[path] = _values(text)
    return Study(
        preset, ALL if names == ["all"] else tuple(names or ()), seeds, changes(set_), values, tuple(base or ())
    )


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


def changes(set_: list[str] | None) -> dict[str, Any]:
    """Values by dotted path, as --set names them."""
    return {path: value_of(text) for path, text in (_equation("--set", change) for change in set_ or [])}


def _equation(option: str, given: str) -> tuple[str, str]:
    path, equals, text = given.partition("=")
    if not equals:
        raise ConfigError(f"{option} {given!r} is not of the form field=value, e.g. {option} optim.lr=3e-4")
    return path, text


def value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _values(text: str) -> list[Any]:
    """What commas separate: JSON as a whole, so that lists may be values, else each value by itself."""
    try:
        return list(json.loads(f"[{text}]"))
    except json.JSONDecodeError:
        return [value_of(part) for part in text.split(",")]


def say(line: str) -> None:
    print(line, flush=True)
