"""A grid over config fields that nobody foresaw: an ablation made on the command line, from arms of other ablations and
lists of values.

Cost: bases times the product of the values; `plan` says it first.
Command: python -m experiments run --grid quantizer.codebook_size=256,1024 --grid optim.lr=1e-4,1e-3 --base vq_fair

Every point is a base arm with the fields of the grid set as they stand, after all else that the base sets or scales, so
that a point which equals an arm of another ablation is that arm's run. A base that derives fields from K (D = log2 K of
LFQ) derives them from the grid's K. Nothing is claimed beforehand, so there are no contrasts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from experiments.ablations import ABLATIONS
from experiments.ablations.base import COLUMNS, Ablation, Arm, Factor
from experiments.ablations.changes import Times
from ibq.config import TrainConfig
from ibq.errors import ConfigError, nearest
from ibq.metrics import METRICS
from ibq.schema import flatten

PUBLISHED_PAIR = ("vq_vs_ibq/vq_published", "vq_vs_ibq/ibq_published")
MOST_ARMS = 700
"""As many as there are letters from A to ZZ, which is what tables and figures call arms by."""
MOST_CURVES, MOST_POINTS = 9, 50
"""Arms that have a colour each in figures of curves, and arms whose letters can be told apart in a figure of points."""
BASE = "base"
"""Name of the first factor."""
GRID_COLUMNS = tuple(name for name, metric in METRICS.items() if metric.headline)
"""Outcomes that the pivot table and the heat map show where they were measured; the table of arms has more."""


class Base(NamedTuple):
    """An arm that a grid starts from."""

    ablation: Ablation
    arm: Arm

    @property
    def reference(self) -> str:
        return f"{self.ablation.name}/{self.arm.name}"

    @property
    def method(self) -> str:
        return str(self.arm.changes["quantizer.method"])


def grid_ablation(grid: Mapping[str, Sequence[Any]], base_names: Sequence[str] = ()) -> Ablation:
    """The ablation that a grid is.

    Args:
        grid: values by dotted path of a config field.
        base_names: arms to start from, as "ablation/arm", or the arm alone where one ablation has it; none: the
            published pair.

    Raises:
        ConfigError: a base or a field that does not exist, a field that a base's method does not have, no value or the
            same one twice, or more than MOST_ARMS arms. Whether values fit, the configs say.
    """
    bases = [find_base(name) for name in references(base_names)]
    names = [base.arm.name for base in bases]
    by_label = {base.arm.name if names.count(base.arm.name) == 1 else base.reference: base for base in bases}
    levels = {field: _levels(field, values) for field, values in grid.items()}
    for field in grid:
        _check_field(field, bases)
    if (size := len(bases) * math.prod(map(len, levels.values()))) > MOST_ARMS:
        counts = " × ".join(
            [
                f"{len(bases)} base{'s' if len(bases) > 1 else ''}",
                *(f"{len(of)} of {field}" for field, of in levels.items()),
            ]
        )
        raise ConfigError(
            f"the grid has {size:,} arms ({counts}); give at most {MOST_ARMS}, in several grids if need be"
        )

    arms = []
    for label, *point in product(by_label, *levels.values()):
        at = dict(zip(grid, point, strict=True))
        changes = {**by_label[label].arm.changes, **{field: levels[field][level] for field, level in at.items()}}
        arms.append(Arm(" ".join([label, *_equations(at)]), {BASE: label} | at, changes, focal=size <= MOST_CURVES))
    return Ablation(
        name="grid",
        title=f"Grid over {', '.join(grid)}",
        notebook=None,
        question=f"How do usage and quality of {', '.join(by_label)} change with {', '.join(grid)}? Nothing was "
        f"claimed beforehand.",
        factors=(
            Factor(BASE, tuple(by_label), _meaning(bases, grid)),
            *(Factor(field, tuple(levels[field]), "config field, set as it stands") for field in grid),
        ),
        arms=tuple(arms),
        figures=_figures(size),
        tables=("grid", "arms"),
        columns=(*COLUMNS, "fid"),
        paper_source="",
        paper_rows=(),
    )


def references(base_names: Sequence[str]) -> tuple[str, ...]:
    """The bases that are meant, each once, as "ablation/arm"."""
    return tuple(dict.fromkeys(find_base(name).reference for name in base_names or PUBLISHED_PAIR))


def find_base(name: str) -> Base:
    """An arm of any ablation, by "ablation/arm" or by its own name.

    Raises:
        ConfigError: no arm has that name (the nearest is named), several that differ have, or it is a transformer's.
    """
    bases = [Base(ablation, arm) for ablation in ABLATIONS.values() for arm in ablation.arms]
    found = [base for base in bases if name in (base.reference, base.arm.name)]
    if not found:
        known = [base.reference if "/" in name else base.arm.name for base in bases]
        raise ConfigError(f"base {name!r} is no arm of any ablation; {nearest(name, known)}")
    if len({repr((base.arm.changes, base.arm.transformer)) for base in found}) > 1:
        raise ConfigError(
            f"base {name!r} is an arm of several ablations; write {' or '.join(base.reference for base in found)}"
        )
    if found[0].ablation.of_transformers:
        raise ConfigError(
            f"base {name!r} is a transformer, and a grid is of tokenizers; name an arm of another ablation"
        )
    return found[0]


def varied(ablation: Ablation) -> list[Factor]:
    """The fields of a grid that have more than one value, in the order given; the first field where none has."""
    fields = ablation.factors[1:]
    return [field for field in fields if len(field.levels) > 1] or [fields[0]]


def strips(ablation: Ablation) -> list[tuple[str, ...]]:
    """Maps of two fields: every base with every combination of the fields beyond the second."""
    return list(product(ablation.factors[0].levels, *(field.levels for field in varied(ablation)[2:])))


def numbers(levels: Sequence[str]) -> list[float] | None:
    """The levels as numbers, None where one is none."""
    try:
        return [float(level) for level in levels]
    except ValueError:
        return None


def text(value: Any) -> str:
    """A value in short: text as it is, unless it would read as several values; all else as JSON."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return value if isinstance(value, str) and "," not in value else json.dumps(value)


def _levels(field: str, values: Sequence[Any]) -> dict[str, Any]:
    """Values by their level; numbers ascend, all else stays in the order given."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"the grid's values {field}={values!r} are not a list; give e.g. [{values!r}]")
    if not values or "" in values:
        raise ConfigError(
            f"the grid's values {field}={','.join(map(text, values))} hold an empty one; write e.g. {field}=VALUE,VALUE"
        )
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ConfigError(f"the grid has {field}={text(value)} twice; leave one out")
    all_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return {text(value): value for value in (sorted(values) if all_numbers else values)}


def _check_field(field: str, bases: Sequence[Base]) -> None:
    """Refuse a field that cannot be swept, or that a base does not have."""
    if field == "seed":
        raise ConfigError(
            "the grid cannot have the field seed, since seeds are averaged; use --seeds, which says how many"
        )
    if field.startswith("transformer."):
        raise ConfigError(
            f"the grid cannot have the field {field}, since it is of a transformer and a grid is of tokenizers; use "
            f"--set {field}=VALUE"
        )
    if field == "quantizer.method":
        raise ConfigError(
            "the grid cannot have the field quantizer.method, since methods have different fields; name arms by --base "
            "instead"
        )
    shared = set(
        flatten(TrainConfig.parse({"quantizer": {"method": "vq"}}).model_dump(mode="json", exclude={"quantizer"}))
    )
    from ibq.quantizers import Quantizer  # imports torch, which listing the ablations does without

    def own(method: str, prefix: str = "quantizer.") -> set[str]:
        return {prefix + name for name in Quantizer.registry[method].config_class.model_fields}

    own_of = {base.reference: own(base.method) for base in bases}
    for base in bases:
        if inner := base.arm.changes.get("quantizer.inner"):
            own_of[base.reference] |= own(inner["method"], "quantizer.inner.")
    if field not in shared.union(*map(own, Quantizer.registry), *own_of.values()):
        known = shared.union(*own_of.values()) - {"seed", "quantizer.method"}
        raise ConfigError(f"the grid's field {field!r} does not exist; {nearest(field, known)}")
    for base in bases:
        if field not in shared | own_of[base.reference]:
            raise ConfigError(
                f"base {base.reference}, whose method is {base.method!r}, has no field {field!r}; leave out one of the "
                f"two"
            )


def _equations(point: Mapping[str, str]) -> list[str]:
    """field=value, fields by their last part where that is enough."""
    leaves = [field.rsplit(".", 1)[-1] for field in point]
    return [
        f"{leaf if leaves.count(leaf) == 1 else field}={level}"
        for leaf, (field, level) in zip(leaves, point.items(), strict=True)
    ]


def _figures(arms: int) -> tuple[str, ...]:
    """The map always, points and curves while they can be told apart."""
    points = ["rate_distortion"] if arms <= MOST_POINTS else []
    curves = ["usage_over_training", "dimension_over_training", "reconstructions"] if arms <= MOST_CURVES else []
    return ("heat_map", *curves[:1], *points, *curves[1:])


def _meaning(bases: Sequence[Base], grid: Mapping[str, Sequence[Any]]) -> str:
    """Meaning of the factor of bases: the arms, and what they bring along that the grid does not set: scaled numbers, a
    search that is left out."""
    named = []
    for base in bases:
        scaled = [
            f"{field} {change}"
            for field, change in base.arm.changes.items()
            if isinstance(change, Times) and change.factor != 1 and field not in grid
        ]
        tuned = base.ablation.adaptive.tuned
        untuned = [f"{tuned} not searched"] if tuned and tuned not in grid else []
        named.append(" ".join([base.reference, *([f"({', '.join(scaled + untuned)})"] if scaled + untuned else [])]))
    return f"the arm that the grid starts from: {', '.join(named)}"
