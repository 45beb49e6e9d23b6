"""The parameters of a notebook, checked before anything trains: papermill injects whatever it is given, misspelt names included."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, get_args

from ibq.errors import ConfigError, nearest

PARAMETERS: dict[str, Any] = {"preset": str, "seeds": int | None, "overrides": dict, "slots": int | None}
"""Name and type of every parameter that an ablation's notebook takes."""

_OF_IPYTHON = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def check(namespace: Mapping[str, Any], parameters: Mapping[str, Any] = PARAMETERS) -> None:
    """Refuse unknown names and wrong types among a notebook's variables; call it with globals() right after the parameters.

    Args:
        namespace: the notebook's globals().
        parameters: name and type of each parameter, where they are not those of an ablation's notebook.

    Raises:
        ConfigError: a variable that is no parameter (the nearest one is named), or a value of another type.
    """
    given = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in _OF_IPYTHON and not isinstance(value, types.ModuleType)
    }
    for name, value in given.items():
        if name not in parameters:
            raise ConfigError(f"notebook parameter {name!r} does not exist; {nearest(name, parameters)}")
        allowed = get_args(parameters[name]) or (parameters[name],)
        if type(value) not in allowed:
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ConfigError(f"notebook parameter {name}={value!r} is of type {type(value).__name__}; it must be {names}")
