"""The quantizer that a config describes, built in or a plugin's."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ibq.errors import ConfigError, one_sentence
from ibq.plugins import VARIABLE, is_method
from ibq.quantizers.base import Quantizer
from ibq.schema import QuantizerConfig


def parse_quantizer_config(value: Any) -> QuantizerConfig:
    """A QuantizerConfig from itself or from a dict with a `method` key.

    Raises:
        ValueError: the method is unknown (all known ones are named) or a field is.
    """
    if isinstance(value, QuantizerConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a quantizer config must be a dict or a QuantizerConfig, not {type(value).__name__}")
    method = value.get("method")
    if not isinstance(method, str) or not is_method(method):
        raise ValueError(
            f"method={method!r} is not a quantizer; choose one of {', '.join(sorted(Quantizer.registry))}, or name its "
            f"plugin by {VARIABLE}"
        )
    return Quantizer.registry[method].config_class.model_validate(value)


def build_quantizer(config: QuantizerConfig | dict[str, Any]) -> Quantizer:
    """The quantizer that a config (or its dict form, with the key `method`) describes.

    Raises:
        ValueError: unknown method, unknown field or a value out of range, in one sentence.
    """
    try:
        parsed = parse_quantizer_config(config)
    except ValidationError as error:
        raise ConfigError(one_sentence(error)) from None
    return Quantizer.registry[parsed.method](parsed)
