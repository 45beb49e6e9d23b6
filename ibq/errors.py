"""Errors a user can mend, each one sentence: what was given, what is allowed, the nearest valid name."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class ConfigError(ValueError):
    """A parameter, field or config that cannot be used as given."""


class OtherSourceError(ConfigError):
    """A run of a method that is not here, or is here from another source."""


def require_packages(*modules: str) -> None:
    """Refuse to begin what needs packages of the extra `metrics` where one is missing.

    Raises:
        ConfigError: which one, and how to install it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"the package {module} is missing; install it with pip install 'ibq-study[metrics]'")


def require_writable(folder: Path, remedy: str) -> None:
    """Refuse to begin what ends by writing into a folder that cannot be written; one that does not exist is judged by
    the first above it that does.

    Raises:
        ConfigError: the folder, and the remedy.
    """
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.exists(each))
    if not there.is_dir():
        raise ConfigError(f"{there} is a file where a folder is wanted; {remedy}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"the folder {there} cannot be written; {remedy}")


class DataError(ValueError):
    """Data that is absent, damaged or does not fit; the message is one sentence that a user can act on."""


class PeerLostError(RuntimeError):
    """Another process of the run has ended, or no longer answers; the message is one sentence."""


class NonFiniteInputError(ValueError):
    """A tensor holds NaN or infinity where only numbers mean something."""


class NonFiniteElsewhereError(NonFiniteInputError):
    """So does a tensor of another process, which names it."""


class NonFiniteError(FloatingPointError):
    """A loss term or the gradient left the finite numbers; the message names it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The helpful half of a sentence: the nearest valid name, or all of them."""
    names = sorted(known)
    same_leaf = [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = same_leaf or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "valid names are " + ", ".join(names)


def one_sentence(error: ValidationError) -> str:
    """Pydantic's report as one line: where, what is allowed, what was given."""
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        given = "" if isinstance(item["input"], (dict, list)) else f" (given {item['input']!r})"
        problems.append(f"{where}: {message}{given}" if where else message)
    return "; ".join(problems)
