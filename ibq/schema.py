"""Frozen pydantic configs: strict fields, dotted paths, errors as one sentence; the base of quantizers' configs."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ibq.errors import ConfigError, nearest, one_sentence

Backend = Literal["auto", "dense", "chunked", "triton"]
"""Ways to compute the operators of `ibq.ops`."""
Resize = Literal["antialiased", "released"]
"""Ways to scale a picture: Pillow's antialiased bicubic filter, upright as EXIF says, large JPEGs decoded at reduced
size; or the released code's bilinear kernel without antialiasing (`ibq.data.resizing`), neither turned nor reduced."""


COUNTABLE_CODES = 2**24
"""Largest codebook that is built whole, counted code by code, and drawn; a larger one only exists where it follows from
the config, code by code."""


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


class QuantizerConfig(Frozen):
    """Fields that all quantizers share; a method's config adds its own and sets `method`."""

    method: str
    codebook_size: int = Field(1024, strict=True, ge=1, description="K, the number of codes")
    code_dim: int = Field(64, strict=True, ge=1, description="D, the dimension of a code")

    @classmethod
    def sizes(cls, codebook_size: int) -> dict[str, Any]:
        """Fields that K codes decide: K itself, and what else follows from it where the codebook is not learnt."""
        return {"codebook_size": codebook_size}

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each raw term of `Quantized.losses` in the total loss."""
        raise NotImplementedError

    @property
    def changes_in_forward(self) -> bool:
        """True if a training forward moves codes or draws noise; the number of calls in one step then matters."""
        return False

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Number of values of each part of a code, where an index is a number with a digit a part, part 0 the least
        significant; empty where codes have no parts."""
        return ()

    @property
    def places_codes(self) -> bool:
        """True if codes can be put on features one by one (`restart_codes`)."""
        return False


def bits_of(codebook_size: int) -> int:
    """log2 K.

    Raises:
        ConfigError: K is not a power of two, of at least 4, so that methods without a learnt codebook cannot have it.
    """
    bits = codebook_size.bit_length() - 1
    if codebook_size != 1 << bits or bits < 2:
        raise ConfigError(
            f"quantizer.codebook_size={codebook_size} has no LFQ and no FSQ beside it; choose a power of two, at least "
            f"4"
        )
    return bits
