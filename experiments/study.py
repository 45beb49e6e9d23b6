"""A study: which ablations, at which preset, with which seeds and changed fields; and where its runs and report lie."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from experiments.ablations import ABLATIONS, CORE, Ablation, Arm
from experiments.ablations.changes import (
    CODEBOOK_SIZE,
    TRANSFORMER,
    as_held,
    codebook_size,
    grid_as_held,
    tokenizer_config,
    transformer_config,
)
from experiments.ablations.grid import PUBLISHED_PAIR, grid_ablation, references
from experiments.cells import Cell, Search, Stages, trials
from experiments.recipes import Preset, get_preset
from ibq.config import RunConfig, TrainConfig
from ibq.data import data_hash_of
from ibq.errors import ConfigError, nearest
from ibq.plugins import loaded
from ibq.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
LONGEST_NAME = 100
"""Prefix of the path of a changed field of transformers."""


Settled = dict[str, tuple[dict[str, TrainConfig], dict[str, list[Cell]]]]
"""By ablation each arm's config before any search, and the runs of its search."""


@dataclass(frozen=True)
class Study:
    """Arguments as on the command line; everything else follows from them.

    Values are held as the configs hold them: "3e-4" is 0.0003.

    Args:
        preset: name of the scale.
        ablations: names; none means the core study.
        seeds: seeds of every arm (0 to seeds - 1); None leaves each arm its own number.
        overrides: fields changed in every arm, by dotted path: of its tokenizer, or those of its transformer after
            `transformer.`.
        grid: values by dotted path; in place of ablations, every combination of them is an arm.
        bases: arms that the grid starts from, as "ablation/arm", or the arm alone where one ablation has it; none: the
            published pair.

    Raises:
        ConfigError: an unknown preset, ablation, base or field, a name that is no text, seeds below 1, a grid beside
            ablations, a config that contradicts itself.
    """

    preset_name: str = "quick"
    ablation_names: tuple[str, ...] = ()
    seeds: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    bases: tuple[str, ...] = ()
    chosen: tuple[list[Cell], list[Cell]] | None = field(default=None, compare=False, repr=False)
    """The cells and the waiting cells that `only` has chosen; None: all."""
    settled: Settled = field(default_factory=dict, init=False, compare=False, repr=False)
    """Memo of `next_cells`: what no finished run changes."""

    def __post_init__(self) -> None:
        _check_types(self)
        get_preset(self.preset_name)
        for name in self.ablation_names:
            if name not in ABLATIONS:
                raise ConfigError(f"ablation {name!r} does not exist; {nearest(name, ABLATIONS)}")
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds} must be at least 1")
        if self.grid and self.ablation_names:
            raise ConfigError(
                f"--grid is a study of its own; leave out {' '.join(self.ablation_names)}, and name arms to start from "
                f"by --base"
            )
        if self.bases and not self.grid:
            raise ConfigError(
                f"--base {self.bases[0]} names what a grid starts from; give the grid too, e.g. --grid "
                f"optim.lr=1e-4,1e-3"
            )
        if both := [path for path in self.grid if path in self.overrides]:
            raise ConfigError(f"{both[0]} is in --grid and in --set; leave one out")
        object.__setattr__(self, "overrides", as_held(self.preset, self.overrides))
        object.__setattr__(self, "grid", grid_as_held(self.preset, self.overrides, self.grid))
        _ = self.ablations  # a grid that cannot be is refused at once
        if self._of_transformers and not any(has_transformers(ablation) for ablation in self.ablations):
            path, value = next(iter(self._of_transformers.items()))
            named = ", ".join(ablation.name for ablation in self.ablations)
            having = ", ".join(ablation.name for ablation in ABLATIONS.values() if ablation.of_transformers)
            remedy = f"leave it out, or study {having}" if having and not self.grid else "leave it out"
            raise ConfigError(
                f"transformer.{path}={value} is of a transformer, and no arm of {named} has one; {remedy}"
            )

    @property
    def preset(self) -> Preset:
        return get_preset(self.preset_name)

    @cached_property
    def ablations(self) -> list[Ablation]:
        if self.grid:
            return [grid_ablation(self.grid, self.bases)]
        return [ABLATIONS[name] for name in dict.fromkeys(self.ablation_names or CORE)]

    @property
    def _of_tokenizers(self) -> dict[str, Any]:
        """The overrides of tokenizers."""
        return {path: value for path, value in self.overrides.items() if not path.startswith(TRANSFORMER)}

    @property
    def _of_transformers(self) -> dict[str, Any]:
        """The overrides of transformers, by their own paths."""
        return {
            path.removeprefix(TRANSFORMER): value
            for path, value in self.overrides.items()
            if path.startswith(TRANSFORMER)
        }

    def overrides_of(self, *ablations: Ablation) -> dict[str, Any]:
        """The overrides without those of transformers, where none of these ablations has any: what a study of these
        alone accepts."""
        return dict(self.overrides) if any(map(has_transformers, ablations)) else self._of_tokenizers

    @property
    def name(self) -> str:
        """Name of the report's folder: the preset, the changed fields where there are any, the grid, and plugins."""
        changes = "".join(
            f"+{path}={value if isinstance(value, str) else json.dumps(value)}"
            for path, value in sorted(self.overrides.items())
        )
        if self.grid:
            base, *fields = self.ablations[0].factors
            changes += "+grid" + "".join(
                f"+{of.name}={','.join(of.levels)}" for of in sorted(fields, key=lambda of: of.name)
            )
            bases = references(self.bases)
            changes += f"+{base.name}={','.join(bases)}" if bases != PUBLISHED_PAIR else ""
        changes += "".join(f"+plugin={plugin.name}" for plugin in loaded())
        return file_name(self.preset_name + changes)

    @property
    def runs_folder(self) -> Path:
        """IBQ_RUNS, else runs/ in the repository; the smoke preset lives in a temporary folder of this process."""
        return runs_folder(_temporary_folder() / "runs" if self.preset_name == "smoke" else None)

    @property
    def report_folder(self) -> Path:
        """IBQ_REPORTS, else reports/ in the repository, and in it a folder of this study's name."""
        default = _temporary_folder() / "reports" if self.preset_name == "smoke" else ROOT / "reports"
        return Path(os.environ.get("IBQ_REPORTS") or default) / self.name

    @cached_property
    def cells(self) -> list[Cell]:
        """Every arm and seed that can be trained now, the runs of searches and the tokenizers of transformers.

        Seed 0 of everything comes first, so that a study that is cut short has one row of each arm.
        """
        return self.chosen[0] if self.chosen else self.stages.ready

    @cached_property
    def waiting(self) -> list[Cell]:
        """Cells that cannot be trained yet: arms and seeds whose search is not finished, with the config before the
        choice, none of which is ever trained; transformers whose tokenizer is not; and arms between others that are
        not, which are trained only if these disagree."""
        return self.chosen[1] if self.chosen else self.stages.waiting

    @property
    def left_out(self) -> list[str]:
        """Arms with more codes than the preset is for, as "ablation/arm"; the user's own K counts as what it is for."""
        return self.stages.too_large

    @property
    def agreeing(self) -> list[str]:
        """Arms of maps that are not trained, since the two that they are between agree, as "ablation/arm"."""
        return self.stages.agreeing

    @property
    def beyond(self) -> list[str]:
        """Arms of maps that are not trained, since there are as many as there may be without them, as
        "ablation/arm"."""
        return self.stages.beyond

    @cached_property
    def stages(self) -> Stages:
        """Every cell of the study by what can be done with it, as its runs were at the first look."""
        return next_cells(self)

    def only(self, cells: list[Cell], waiting: list[Cell] | None = None) -> Study:
        """The same study with some of its cells alone."""
        return replace(self, chosen=(cells, waiting or []))

    def of(self, *ablation_names: str) -> Study:
        """All cells of other ablations, with the same preset, seeds and fields."""
        return replace(self, ablation_names=ablation_names, chosen=None)

    def config_of(self, ablation: Ablation, arm: Arm) -> TrainConfig:
        """An arm's config before any search.

        Raises:
            ConfigError: it contradicts itself, or what arms differ in was set for all of them.
        """
        try:
            return self._build_config(ablation, arm)
        except ConfigError as error:
            if not self.grid:
                raise
            raise ConfigError(f"{arm.name}: {error}") from None  # of many points one is wrong: say which

    def _build_config(self, ablation: Ablation, arm: Arm) -> TrainConfig:
        overrides = self._of_tokenizers
        config = tokenizer_config(self.preset, arm.changes, overrides)  # first, since a value may be wrong by itself
        for path in overrides:
            if path == "seed":
                raise ConfigError("--set seed would give every arm one seed; use --seeds, which says how many")
            if path.startswith("quantizer.") and path != CODEBOOK_SIZE and path in arm.changes:
                remedy = f"give it as --grid {path}=VALUE" if self.grid else "set another field, or add an arm"
                raise ConfigError(f"{path} is what the arms of {ablation.name} differ in; {remedy}")
        return config

    def cell(self, ablation: Ablation, arm: Arm, config: RunConfig, seed: int) -> Cell:
        config = config.model_copy(update={"seed": seed})
        return Cell(
            ablation, arm, seed, config, RunDirectory(self.runs_folder / config.run_id(_data_hash(config.data)))
        )

    def transformer_cell(self, ablation: Ablation, arm: Arm, of: Cell) -> Cell:
        """An arm's transformer on the tokens of a tokenizer.

        Raises:
            ConfigError: its config contradicts itself, or what arms differ in was set for all of them.
        """
        assert arm.transformer is not None
        assert isinstance(of.config, TrainConfig)
        for path in self._of_transformers:
            if path == "seed":
                raise ConfigError(
                    "--set transformer.seed would give every arm one seed; use --seeds, which says how many"
                )
            if path.partition(".")[0] in ("tokenizer", "tokenizer_sha256"):
                raise ConfigError(
                    f"transformer.{path} is of a tokenizer, which the study trains; set its fields without "
                    f"transformer.tokenizer."
                )
            if path in arm.transformer:
                raise ConfigError(
                    f"transformer.{path} is what the arms of {ablation.name} differ in; set another field, or add an "
                    f"arm"
                )
        try:
            config = transformer_config(self.preset, of.config, arm.transformer, self._of_transformers)
        except ConfigError as error:
            raise ConfigError(f"transformer of {arm.name}: {error}") from None
        return replace(self.cell(ablation, arm, config, of.seed), tokenizer=of)


def _check_types(study: Study) -> None:
    """ConfigError: a name that is no text, or seeds that are no whole number, as from a script or a notebook."""
    names = [("preset", study.preset_name), *(("ablation", name) for name in study.ablation_names)]
    names += [("field", path) for path in (*study.overrides, *study.grid)]
    names += [("base", name) for name in study.bases]
    for kind, name in names:
        if not isinstance(name, str):
            raise ConfigError(f"the {kind} {name!r} is of type {type(name).__name__}; name it by a text")
    if study.seeds is not None and type(study.seeds) is not int:
        raise ConfigError(f"seeds={study.seeds!r} is of type {type(study.seeds).__name__}; give a whole number")


def next_cells(study: Study) -> Stages:
    """The cells of a study by what can be done with them, from the rows there are."""
    stages, settled = Stages([], [], [], [], []), _settled(study)
    ready, waiting = stages.ready, stages.waiting
    largest: float = math.inf  # of a grid, whose K was asked for
    if not study.grid:
        largest = max(study.preset.max_codebook_size, codebook_size(study.preset, {}, study.overrides))
    for ablation in study.ablations:
        configs, searches = settled[ablation.name]
        wanted = {name: ablation.adaptive.wanted(trials(search, ablation, name)) for name, search in searches.items()}
        ready += [
            cell
            for name, search in searches.items()
            for cell in search
            if cell.run in [trial.run for trial in wanted[name]]
        ]
        small = [arm for arm in ablation.arms if configs[arm.name].quantizer.codebook_size <= largest]
        stages.too_large.extend(f"{ablation.name}/{arm.name}" for arm in ablation.arms if arm not in small)
        runs = {arm.name: study.cell(ablation, arm, configs[arm.name], 0).run for arm in small}
        fates = ablation.adaptive.fates(ablation.arms, runs, ablation.adaptive.most_arms(study.preset))
        for arm in small:
            fate = fates[arm.name]
            if fate in ("agreeing", "beyond"):
                (stages.agreeing if fate == "agreeing" else stages.beyond).append(f"{ablation.name}/{arm.name}")
                continue
            chosen = ablation.adaptive.choice(wanted[arm.tuned_as or arm.name], configs[arm.name])
            stage = waiting if chosen is None or fate == "waits" else ready
            config = chosen or configs[arm.name]
            cells = [study.cell(ablation, arm, config, seed) for seed in ablation.seeds(arm, study.preset, study.seeds)]
            if not ablation.of_transformers:
                stage += cells
                continue
            for cell in cells:
                tokenizer = replace(cell, arm=Arm(f"tokenizer of {arm.name}", {}), tokenizer_of=arm.name)
                transformer = study.transformer_cell(ablation, arm, tokenizer)
                stage.append(tokenizer)
                can_be_trained = stage is ready and (tokenizer.run.finished or transformer.run.finished)
                (ready if can_be_trained else waiting).append(transformer)
    for cells in (ready, waiting):
        cells.sort(key=lambda cell: cell.seed)
    return stages


def advance(study: Study) -> tuple[Study, list[Cell]]:
    """The study as its runs are now, and the cells that have joined since it was made: their search, tokenizer or
    neighbours have finished in the meantime."""
    if study.chosen or not study.waiting:
        return study, []
    now, before = replace(study), {cell.run.path for cell in study.cells}
    now.settled.update(study.settled)
    return now, [cell for cell in now.cells if cell.run.path not in before]


def possible(study: Study) -> list[Cell]:
    """Waiting cells without the last arms of a map where more wait than can still be trained."""
    cells = study.waiting
    for ablation in study.ablations:
        ready = {cell.arm.name for cell in study.cells if cell.ablation is ablation}
        waiting = list(dict.fromkeys(cell.arm.name for cell in study.waiting if cell.ablation is ablation))
        too_many = waiting[max(0, ablation.adaptive.most_arms(study.preset) - len(ready)) :]
        cells = [cell for cell in cells if cell.ablation is not ablation or cell.arm.name not in too_many]
    return cells


def _search(study: Study, ablation: Ablation, arm: Arm, config: TrainConfig) -> list[Cell]:
    """The runs that decide an arm's tuned field, by ascending value; none where the ablation tunes nothing."""
    cells = []
    for value, trial in ablation.adaptive.trials(config).items():
        candidate = Arm(f"{arm.name}: {ablation.adaptive.tuned} {value:g}", arm.levels)
        cells.append(replace(study.cell(ablation, candidate, trial, seed=0), search=Search(arm.name, value)))
    return cells


def _settled(study: Study) -> Settled:
    """By ablation what no finished run changes: each arm's config before any search, and the runs of its search."""
    if study.settled:
        return study.settled
    for ablation in study.ablations:
        configs = {arm.name: study.config_of(ablation, arm) for arm in ablation.arms}
        searches = {
            arm.name: _search(study, ablation, arm, configs[arm.name]) for arm in ablation.arms if not arm.tuned_as
        }
        study.settled[ablation.name] = configs, searches
    return study.settled


def runs_folder(default: Path | None = None) -> Path:
    """IBQ_RUNS, else the default, which is runs/ in the repository."""
    return Path(os.environ.get("IBQ_RUNS") or default or ROOT / "runs")


def has_transformers(ablation: Ablation) -> bool:
    """True if transformers are arms of an ablation, or of the one that has the other half of its question."""
    others = {claim.partition("/")[0] for claim in ablation.shows_too}
    return any(each.of_transformers for each in [ablation, *(ABLATIONS[name] for name in others)])


def file_name(text: str) -> str:
    """A text as a file name: plain ASCII, no separators, not hidden, of bounded length; where that changes it, a hash
    keeps it apart."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "+=._-") else "_" for c in text)
    if safe == text and len(safe) <= LONGEST_NAME and not safe.startswith("."):
        return safe
    return f"{safe[:LONGEST_NAME].lstrip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


_data_hash = cache(data_hash_of)


@cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ibq-smoke-"))
