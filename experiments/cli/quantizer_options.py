"""Table of `list --quantizers`: every registered method with its options and its paper, read from the configs
themselves."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ibq.quantizers import Quantizer

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def options_table() -> list[tuple[str, list[str], str]]:
    """Method, its options as "field=default (allowed values) meaning", written as `--set` reads them, and its paper;
    sorted by method."""
    return [
        (
            method,
            [
                option_in_words(name, field)
                for name, field in quantizer.config_class.model_fields.items()
                if name != "method"
            ],
            quantizer.paper,
        )
        for method, quantizer in sorted(Quantizer.registry.items())
    ]


def option_in_words(name: str, field: FieldInfo) -> str:
    """One option as it stands in the table."""
    default = field.default if isinstance(field.default, str) else json.dumps(field.default)
    return f"{name}={default} ({_allowed(field.annotation, field.metadata)}) {field.description or ''}".rstrip()


def _allowed(annotation: Any, metadata: Any = ()) -> str:
    """The values that a type admits, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Annotated:
        return _allowed(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return " | ".join(_allowed(argument, metadata) for argument in arguments)
    if origin is tuple:
        return f"[{_allowed(arguments[0])}, ...]"
    if annotation is type(None):
        return "null"
    if annotation is bool:
        return "true | false"
    bounds = [f"{sign} {getattr(item, key)}" for item in metadata for key, sign in SIGNS.items() if hasattr(item, key)]
    return " ".join([annotation.__name__, *bounds])
