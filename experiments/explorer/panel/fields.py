"""Widgets for the fields of a config, made from the fields themselves: their values, what they allow, and what they
mean."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from experiments.cli.quantizer_options import option_in_words

STYLE = {"description_width": "128px"}
WIDE = {"width": "auto", "margin": "1px 2px"}


def field_at(config: BaseModel, path: str) -> tuple[FieldInfo, Any]:
    """A field of a config by dotted path, and its value."""
    *parents, leaf = path.split(".")
    node = config
    for parent in parents:
        node = getattr(node, parent)
    return type(node).model_fields[leaf], getattr(node, leaf)


def field_widget(name: str, field: FieldInfo, value: Any, label: str = "") -> widgets.ValueWidget:
    """A widget that holds a field's value; `value_of` reads it.

    Args:
        name: of the field, which the tooltip begins with.
        label: in place of the name.
    """
    common = {
        "description": label or name.replace("_", " "),
        "description_allow_html": False,
        "tooltip": option_in_words(name, field),
        "style": STYLE,
        "layout": WIDE,
    }
    if field.annotation is bool:
        return widgets.Checkbox(value=value, indent=True, **common)
    if get_origin(field.annotation) is Literal:
        return widgets.Dropdown(options=get_args(field.annotation), value=value, **common)
    words = [word for part in get_args(field.annotation) if get_origin(part) is Literal for word in get_args(part)]
    if words:
        return widgets.Combobox(value=text_of(value), options=words, continuous_update=False, **common)
    return widgets.Text(value=text_of(value), continuous_update=False, **common)


def text_of(value: Any) -> str:
    """A value as it stands in a text box: 0.001, none, "4, 4, 4", {"method": "vq"}."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        words = ", ".join(map(text_of, value))
        return words if len(value) > 1 else f"[{words}]"
    if isinstance(value, dict):
        return json.dumps(value)
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def value_of(widget: widgets.ValueWidget) -> Any:
    """The value that a widget holds, text read as a number, a list or none where it is one; whether it fits is the
    config's affair."""
    if not isinstance(widget.value, str) or isinstance(widget, widgets.Dropdown):
        return widget.value
    text = widget.value.strip()
    if text.lower() in ("none", "null", ""):
        return None
    try:
        return json.loads(f"[{text.strip('[()]')}]" if "," in text and text[0] != "{" else text)
    except ValueError:
        return text
