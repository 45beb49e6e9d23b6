"""Config of an arm in one pass: the preset's config, the user's overrides, then the changes of the arm.

A change is a value, a multiple of what preset or user give (`Times`), or a function of the preset and K (`Given`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from experiments.recipes import Preset, scaled, tokenizer, transformer, with_window
from ibq.config import TrainConfig, TransformerTrainConfig
from ibq.errors import ConfigError
from ibq.schema import flatten

CODEBOOK_SIZE = "quantizer.codebook_size"
TRANSFORMER = "transformer."
"""Beginning of the paths of a transformer's fields."""
METHOD = "quantizer.method"
ANY_SIZE = 1024
"""A K that every method can have: FSQ's before the user's own levels are set, whose product need not be a power of
two."""
GAN_WEIGHT = "loss.adversarial.weight"
EMA_DECAY = "optim.ema_decay"


@dataclass(frozen=True)
class Times:
    """A multiple of the value that the preset, or the user, gives a field."""

    factor: float | Fraction

    def __str__(self) -> str:
        return f"×{self.factor}" if isinstance(self.factor, Fraction) else f"×{self.factor:g}"


@dataclass(frozen=True)
class Given:
    """Argument of a change that is a function.

    Attributes:
        preset: the scale.
        codebook_size: K of the arm.
        transformer: the preset's transformer on the arm's tokenizer; None for fields of the tokenizer.
    """

    preset: Preset
    codebook_size: int
    transformer: TransformerTrainConfig | None = None


def together(changes: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of both; where both multiply a field, by the product."""
    merged = {**changes, **more}
    for path in changes.keys() & more.keys():
        one, other = changes[path], more[path]
        if isinstance(one, Times) and isinstance(other, Times):
            merged[path] = Times(one.factor * other.factor)
    return merged


def of_quantizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that set fields of a quantizer."""
    return {f"quantizer.{name}": value for name, value in fields.items()}


def tokenizer_config(preset: Preset, changes: Mapping[str, Any], overrides: Mapping[str, Any]) -> TrainConfig:
    """The config of an arm's tokenizer, seed 0.

    Args:
        preset: the scale.
        changes: of the arm; they decide where the user has set the same field.
        overrides: what the user sets in every arm, by dotted path; with other `steps` the window of the averaged
            weights keeps its share of the run, as the schedule of the learning rate does.

    Raises:
        ConfigError: K cannot be multiplied so, or the config contradicts itself.
    """
    K = codebook_size(preset, changes, overrides)
    values = {path: change(Given(preset, K)) if callable(change) else change for path, change in changes.items()}
    times = {path: value.factor for path, value in values.items() if isinstance(value, Times) and path != CODEBOOK_SIZE}
    values = {path: value for path, value in values.items() if path not in (*times, CODEBOOK_SIZE)}
    if values.get(GAN_WEIGHT, overrides.get(GAN_WEIGHT)):
        values = {path: value for path, value in preset.discriminator.items() if path not in overrides} | values
    names = {path: path.removeprefix("quantizer.") for path in values if path.startswith("quantizer.")}
    own = {name: values[path] for path, name in names.items() if "." not in name}
    values = {path: value for path, value in values.items() if names.get(path) not in own}
    if "levels" in own:  # set together with what they have to fit
        values |= of_quantizer({name: own.pop(name) for name in ("levels", "code_dim") if name in own})
        values |= {CODEBOOK_SIZE: K} if CODEBOOK_SIZE in changes else {}
        K = ANY_SIZE
    config = tokenizer(preset, _sizes(own["method"], K) | own)
    others = {path: value for path, value in overrides.items() if path != CODEBOOK_SIZE}
    if fields := {**others, **values}:
        usual_steps, config = config.steps, config.with_fields(**fields)
        if EMA_DECAY not in fields:
            config = with_window(config, config.steps / usual_steps)
    config = scaled(config, {path: float(factor) for path, factor in times.items()})
    return config.with_fields(**values) if values else config  # once more: what is set is not scaled


def as_held(preset: Preset, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the user sets, as configs hold them: "3e-4", 0.0003 and numpy's are one value. One that no config
    takes stays as it was given, since it is refused where the arms are made."""
    own = {path.removeprefix(TRANSFORMER): overrides[path] for path in overrides if path.startswith(TRANSFORMER)}
    rest = {path: value for path, value in overrides.items() if not path.startswith(TRANSFORMER)}
    held = _of_tokenizer(preset, rest) if rest else {}
    of_transformer = _of_transformer(preset, own) if own else {}
    return held | {TRANSFORMER + path: value for path, value in of_transformer.items()}


def grid_as_held(
    preset: Preset, overrides: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """As `as_held`, of a grid's values, fields of one value together; what is no list of any is refused by the grid."""
    lists = {path: of for path, of in grid.items() if isinstance(of, Sequence) and not isinstance(of, str)}
    fixed = {**overrides, **{path: of[0] for path, of in lists.items() if len(of) == 1}}
    together = as_held(preset, fixed)
    held = {path: [together[path]] for path, of in lists.items() if len(of) == 1}
    for path in lists.keys() - held.keys():
        held[path] = [as_held(preset, {**fixed, path: value})[path] for value in lists[path]]
    return {path: held.get(path, of) for path, of in grid.items()}


_known: dict[tuple[str, str], dict[str, Any]] = {}
"""Results of `_of_tokenizer`: an export tries the same values on many arms."""


def _of_tokenizer(preset: Preset, overrides: Mapping[str, Any]) -> dict[str, Any]:
    from ibq.quantizers import Quantizer  # imports torch, which listing the ablations does without

    key = (preset.name, repr(sorted(overrides.items())))
    for method in () if key in _known else sorted(Quantizer.registry, key=lambda name: name != "vq"):
        try:
            config = tokenizer_config(preset, {METHOD: method}, overrides)
        except (ConfigError, TypeError):
            continue
        flat = flatten(config.to_json_dict())
        _known[key] = {path: value if path == METHOD else flat[path] for path, value in overrides.items()}
        break
    return dict(_known.setdefault(key, dict(overrides)))


def _of_transformer(preset: Preset, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """By their own paths."""
    of = tokenizer_config(preset, {METHOD: "vq"}, {})
    try:
        flat = flatten(transformer_config(preset, of, {}, overrides).to_json_dict())
    except (ConfigError, TypeError):
        return dict(overrides)
    return {path: flat.get(path, value) for path, value in overrides.items()}


def codebook_size(preset: Preset, changes: Mapping[str, Any], overrides: Mapping[str, Any]) -> int:
    """K of an arm: the preset's or the user's, or what the arm makes of it.

    Raises:
        ConfigError: it is not a whole multiple.
    """
    usual, change = overrides.get(CODEBOOK_SIZE, preset.codebook_size), changes.get(CODEBOOK_SIZE)
    if change is not None and not isinstance(change, Times):
        usual = change
    K = tokenizer(preset, {"method": "vq", "codebook_size": usual}).quantizer.codebook_size
    if not isinstance(change, Times):
        return K
    share = Fraction(change.factor) * K
    if share.denominator != 1:
        raise ConfigError(f"quantizer.codebook_size={K} cannot be taken {change} times; choose a multiple of 16")
    return int(share)


def _sizes(method: str, K: int) -> dict[str, Any]:
    """Fields that K decides, of a method whose codebook follows from its config."""
    from ibq.quantizers import Quantizer  # imports torch, which listing the ablations does without

    return Quantizer.registry[method].config_class.sizes(K)


def transformer_config(
    preset: Preset, of: TrainConfig, changes: Mapping[str, Any], overrides: Mapping[str, Any]
) -> TransformerTrainConfig:
    """The config of an arm's transformer on the tokens of a tokenizer; arguments and errors as of
    `tokenizer_config`."""
    given = Given(preset, of.quantizer.codebook_size, transformer(preset, of, {}))
    values = {path: change(given) if callable(change) else change for path, change in changes.items()}
    return transformer(preset, of, {**overrides, **values})
