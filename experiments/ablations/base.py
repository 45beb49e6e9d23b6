"""Parts of an ablation: a claim stated before its numbers, arms that differ in named factors, and what the paper
reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from experiments.recipes import Preset
from ibq.config import TrainConfig

if TYPE_CHECKING:
    from ibq.run_directory import RunDirectory  # imports torch, which listing the ablations does without

EFFECTIVE_DIMENSIONS = ("dimension_used", "dimension_features")
"""Beside usage in every table: how many dimensions the codes in use span, and how many the features offer."""
COLUMNS = (
    "perplexity",
    "usage",
    *EFFECTIVE_DIMENSIONS,
    "dead_codes",
    "bits",
    "l1",
    "psnr_db",
    "ssim",
    "quantization_error",
    "train_seconds",
)
NO_LIMIT = 1_000_000
"""More arms than any ablation has."""


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
    followed: bool = False
    """Its codes and features are projected at several moments of training."""
    tuned_as: str | None = None
    """The arm whose search decides this arm's value too, where the ablation tunes a field; None: it has a search of its
    own."""
    between: tuple[str, str] | None = None
    """Two arms before it, on a map: it is trained only if exactly one of them has collapsed."""


Fate = Literal["trained", "waits", "agreeing", "beyond"]
"""Of an arm: it is trained, it waits for others, its neighbours agree, or there is no room for it among the most
arms."""


class Trial(NamedTuple):
    """A short run that comes before an arm: the value that it tries, the run, and its steps."""

    value: float
    run: RunDirectory
    steps: int


@dataclass(frozen=True)
class Adaptive:
    """Plan of an ablation by the runs that have finished. This one decides nothing: every arm is trained as it is."""

    @property
    def tuned(self) -> str:
        """Dotted path of the field that trials choose; empty: none."""
        return ""

    @property
    def protocol(self) -> str:
        """The sentence that a reader of the numbers has to know; empty: none."""
        return ""

    def trials(self, config: TrainConfig) -> dict[float, TrainConfig]:
        """Runs that come before an arm, by the value of the tuned field that they try."""
        return {}

    def wanted(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        """Trials to run, as far as those that have finished tell; by ascending value, as all of them are given."""
        return trials

    def choice(self, trials: Sequence[Trial], config: TrainConfig) -> TrainConfig | None:
        """An arm's config after its trials; None while they are not finished."""
        return config

    def most_arms(self, preset: Preset) -> int:
        """Most arms that are trained."""
        return NO_LIMIT

    def fates(self, arms: Sequence[Arm], runs: Mapping[str, RunDirectory], most_arms: int) -> dict[str, Fate]:
        """Fate of each arm.

        Args:
            arms: those of the ablation.
            runs: by arm the run of seed 0; an arm that is not among them is not in the study.
            most_arms: how many are trained at most.
        """
        return dict.fromkeys(runs, "trained")

    def columns(self, arm: Arm, trials: Sequence[Trial]) -> dict[str, str]:
        """Columns of an arm in the table of what is planned."""
        return {}

    def facts(self, run: RunDirectory, is_trial: bool) -> dict[str, float]:
        """Columns of the row of a finished run."""
        return {}

    def waits_for(self, arm: Arm, trials: Sequence[Trial], neighbours: Sequence[RunDirectory]) -> str:
        """Reason why an arm waits, in a phrase; of its neighbours it gets the runs that do not wait themselves."""
        raise NotImplementedError

    def waiting(self, count: int) -> str:
        """The sentence that so many runs wait."""
        raise NotImplementedError


AS_IT_IS = Adaptive()


@dataclass(frozen=True)
class Factor:
    """A named choice and its levels, in the order in which a change counts as positive."""

    name: str
    levels: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class Contrast:
    """A claim and the pair of arms that tests it.

    Stated before the numbers, and registered (`experiments.analysis.registration`): the mean of `outcome` (one of
    `ibq.metrics.METRICS`) over seeds changes from `without` to `with_` by at least `effect`, the threshold, whose sign
    is the direction; or, where the claim is that something `keeps`, by less than that. `paper` says where the paper
    makes this claim; empty: the question is this study's own.
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
    """Columns that the paper's rows report, in the registry of the tables."""
    beside_paper: tuple[str, ...] = ("usage", "share", "l1")
    """The columns that the closest arms show beside them."""
    marker: str | None = None
    """The factor that rate against distortion shows by the shape of a point."""
    fill: str | None = None
    """The factor whose last level it shows by a filled point."""
    axis: Axis | None = None
    adaptive: Adaptive = AS_IT_IS
    """Plan by finished runs: which arms are trained, and with which value of a field."""
    shows_too: tuple[str, ...] = ()
    """Claims of one other ablation that answer the other half of the question, as "ablation/contrast"; their arms are
    shown too."""
    shown_elsewhere: tuple[Contrast, ...] = ()
    """Claims of the same family, for which verdicts are corrected together, that are not shown here."""
    first_seed: int = 0
    """Of every arm; searches have seed 0, which is reported only where this is 0."""
    on_request: bool = False
    """True: it is trained only where it is named, and is not part of 'all'."""

    @property
    def of_transformers(self) -> bool:
        """True if the arms are transformers."""
        return any(arm.transformer is not None for arm in self.arms)

    @cached_property
    def mapped(self) -> tuple[Arm, ...]:
        """The arms whose codes and features are projected: the focal ones, since UMAP takes some eight seconds each."""
        if "code_map" not in self.figures:
            return ()
        return tuple(arm for arm in self.arms if arm.focal or arm.followed)

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
        return range(self.first_seed, self.first_seed + min(wanted or arm.seeds, preset.max_seeds))
