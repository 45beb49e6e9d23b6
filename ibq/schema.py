"""Frozen pydantic configs: strict fields, dotted paths, and errors as one sentence."""

from __future__ import annotations

import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ibq.errors import ConfigError, nearest, one_sentence


class Frozen(BaseModel):
    """Base of all configs: immutable, unknown fields are errors, numbers are finite, defaults are validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @classmethod
    def parse(cls, tree: Any) -> Self:
        """A config from a nested dict; pydantic's report becomes one sentence (ConfigError)."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(one_sentence(error)) from None

    def to_json_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def with_fields(self, **dotted: Any) -> Self:
        """A copy with fields set by dotted path, validated whole.

        Args:
            dotted: values by path, e.g. ``**{"quantizer.codebook_size": 4096, "steps": 100}``.

        Raises:
            ConfigError: a path names no field (the nearest valid path is given), or the result contradicts itself.
        """
        return self.parse(set_fields(self.to_json_dict(), dotted))


def later(default: Any, **constraints: Any) -> Any:
    """A field that came when runs existed already. Its default is what was done before, and stays out of a run's id:
    what is finished under that id is still the run that the config describes."""
    return Field(default, json_schema_extra={"later": True}, **constraints)


def without_later(model: BaseModel, tree: dict[str, Any]) -> dict[str, Any]:
    """A model's dump without the later fields that are at their default."""
    kept = {}
    for name, info in type(model).model_fields.items():
        value, extra = getattr(model, name), info.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("later") and value == info.default):
            kept[name] = without_later(value, tree[name]) if isinstance(value, BaseModel) else tree[name]
    return kept


def set_fields(tree: dict[str, Any], dotted: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with existing leaves replaced by dotted path; a path that is not there is a
    ConfigError."""
    tree = json.loads(json.dumps(tree))
    for path, value in dotted.items():
        *parents, leaf = path.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
            raise ConfigError(f"there is no field {path!r}; {nearest(path, flatten(tree))}")
        node[leaf] = value
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to a flat one with dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
