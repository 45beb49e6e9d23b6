"""Values on a command line: field=value, where the value is JSON or, if it is none, text."""

from __future__ import annotations

import json
from typing import Any

from ibq.errors import ConfigError


def changes(given: list[str] | None) -> dict[str, Any]:
    """Values by dotted path, as --set names them."""
    return {path: value_of(text) for path, text in (equation("--set", change) for change in given or [])}


def equation(option: str, given: str) -> tuple[str, str]:
    """Both sides of field=value (ConfigError where there is no "=")."""
    path, equals, text = given.partition("=")
    if not equals:
        raise ConfigError(f"{option} {given!r} is not of the form field=value, e.g. {option} optim.lr=3e-4")
    return path, text


def value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
