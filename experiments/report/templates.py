"""HTML pages from the templates: one look, one navigation, no foreign script, font or image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


class Link(NamedTuple):
    """An entry of the navigation; the page that is shown has no address."""

    label: str
    address: str | None


def render(template: str, **values: Any) -> str:
    """A page: everything that a template is given is escaped unless the template says that it is markup."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    folder = Path(__file__).parent / "html"
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
