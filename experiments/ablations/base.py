"""What an ablation is: a claim stated before its numbers, arms that differ in named factors, and what the paper
reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_uppercase
from typing import Any

from experiments.recipes import Preset

COLUMNS = ("perplexity", "usage", "dead_codes", "bits", "l1", "psnr_db", "ssim", "quantization_error", "train_seconds")


@dataclass(frozen=True)
class Arm:
    """One configuration of an ablation: the preset's config with changes.

    Attributes:
        name: in commands, tables and figures.
        levels: what the arm is to people, a label of each factor; nothing is read back out of them.
        changes: of the tokenizer's config by dotted path, as `experiments.ablations.changes` has them.
        transformer: changes of the transformer's config, where the arm is a transformer on the tokens of that
            tokenizer, which is trained first; None: the arm is a tokenizer.
    """

    name: str
    levels: Mapping[str, str]
    changes: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] | None = None
    seeds: int = 1
    focal: bool = False
    """Drawn in colour, and kept in the figures that show only a few arms."""
    tuned_as: str | None = None
    """The arm whose search decides this arm's value too, where the ablation tunes a field; None: it has a search of its
    own."""
    between: tuple[str, str] | None = None
    """Two arms before it, where the ablation has a border: it is trained only if exactly one of them has collapsed."""


@dataclass(frozen=True)
class Factor:
    """A named choice and its levels, in the order in which a change counts as positive."""

    name: str
    levels: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class Contrast:
    """A claim and the pair of arms that tests it.

    Stated before the numbers: `outcome` (one of `ibq.metrics.METRICS`) changes from `without` to
    `with_` by at least `effect` (its sign is the direction) in every seed; or, where the claim is that something
    `keeps`, by less than that. `paper` says where the paper makes this claim; empty: the question is this study's own.
    """

    name: str
    without: str
    with_: str
    claim: str
    outcome: str
    effect: float
    paper: str = ""
    keeps: bool = False


@dataclass(frozen=True)
class Tuning:
    """A search before the comparison: each arm is trained shortly at several values of one field and takes the best.

    Args:
        field: dotted path of a number in the config.
        factors: ascending multiples of the recipe's own value.
        step_share: length of a search run over that of the arm.
    """

    field: str
    factors: tuple[float, ...]
    step_share: float


@dataclass(frozen=True)
class Part:
    """A part of a method: the arm that lacks it alone, and the arm that has it alone, each None where there is no such
    thing."""

    name: str
    removed: str | None
    alone: str | None


@dataclass(frozen=True)
class Anatomy:
    """What a method is made of.

    Stated before the numbers: a codebook whose perplexity is below `collapse` times K has collapsed, and so has one
    whose run did not stay finite. A part is necessary if `whole` without it collapses, and sufficient if `bare`, which
    collapses, does not once it has this part.
    """

    whole: str
    bare: str
    parts: tuple[Part, ...]
    collapse: float


@dataclass(frozen=True)
class Remedy:
    """An arm that shows what mends a collapse: the case that it is of, what was done, and whether it is the case
    itself, unmended or its counterpart that never collapsed."""

    case: str
    what: str
    arm: str
    reference: bool = False


@dataclass(frozen=True)
class Border:
    """A map of where codebooks collapse, which is drawn coarsely first and then along its border by arms `between`
    others.

    Stated before the numbers: a codebook whose perplexity is below `collapse` times K has collapsed, and so has one
    whose run did not stay finite. Seed 0 decides for all seeds. At most `most_arms` are trained: those that are between
    no others come first, then the others in their order.
    """

    collapse: float
    most_arms: int
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class Axis:
    """The factor whose levels are sizes, and the column of a row that says how large: what figures of scaling have
    below."""

    factor: str
    column: str
    label: str


@dataclass(frozen=True)
class PaperRow:
    """A row of a table of the paper: its numbers by column, those that it does not report left out; `arm` is the arm
    that comes closest to it, if there is one."""

    method: str
    reported: Mapping[str, float]
    arm: str | None = None


@dataclass(frozen=True)
class Continuation:
    """The other half of a question, which another ablation answers: its name, a title, and the arms and contrasts that
    belong to it."""

    ablation: str
    title: str
    arms: tuple[str, ...]
    contrasts: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    """One study: see `experiments/ablations/`.

    Figures choose colours by the first factor; `figures`,
    `tables` and `columns` name what the report shows, in the registries of those modules.
    """

    name: str
    title: str
    notebook: str | None
    question: str
    factors: tuple[Factor, ...]
    arms: tuple[Arm, ...]
    paper_source: str
    paper_rows: tuple[PaperRow, ...]
    figures: tuple[str, ...]
    tables: tuple[str, ...]
    contrasts: tuple[Contrast, ...] = ()
    columns: tuple[str, ...] = COLUMNS
    paper_columns: tuple[str, ...] = ("rFID", "usage %")
    """What the paper's rows report, in the registry of the tables."""
    beside_paper: tuple[str, ...] = ("usage", "share", "l1")
    """The columns that the closest arms show beside them."""
    marker: str | None = None
    """The factor that rate against distortion shows by the shape of a point."""
    fill: str | None = None
    """The factor whose last level it shows by a filled point."""
    axis: Axis | None = None
    followed: tuple[str, ...] = ()
    """The arms whose codes and features are projected at several moments of training."""
    tuning: Tuning | None = None
    anatomy: Anatomy | None = None
    border: Border | None = None
    continued: Continuation | None = None
    core: bool = True
    """Whether it belongs to the core study, which is what a study without names is."""
    on_request: bool = False
    """Whether it is trained only where it is named, and is not part of 'all'."""

    @property
    def of_transformers(self) -> bool:
        """True if the arms are transformers."""
        return any(arm.transformer is not None for arm in self.arms)

    @cached_property
    def mapped(self) -> tuple[Arm, ...]:
        """The arms whose codes and features are projected: the focal ones, since UMAP takes some eight seconds each."""
        if "code_map" not in self.figures:
            return ()
        return tuple(arm for arm in self.arms if arm.focal or arm.name in self.followed)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def factor(self, name: str) -> Factor:
        return next(factor for factor in self.factors if factor.name == name)

    def sizes(self) -> list[tuple[Arm, ...]]:
        """Sets of arms that differ in the factor of the axis alone; an arm that has no other is a set by itself."""
        sets: dict[tuple[str, ...], list[Arm]] = {}
        for arm in self.arms:
            others = tuple(level for name, level in arm.levels.items() if not self.axis or name != self.axis.factor)
            sets.setdefault(others, []).append(arm)
        return [tuple(arms) for arms in sets.values()]

    def letter(self, name: str) -> str:
        """The key under which figures name an arm, A to Z, then AA to ZZ; the table spells it out."""
        hundreds, units = divmod([arm.name for arm in self.arms].index(name), len(ascii_uppercase))
        return (ascii_uppercase[hundreds - 1] if hundreds else "") + ascii_uppercase[units]

    def seeds(self, arm: Arm, preset: Preset, wanted: int | None) -> range:
        """Seeds of an arm: its own number, or as many as the user wants."""
        return range(min(wanted or arm.seeds, preset.max_seeds))
