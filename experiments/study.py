"""A study: which ablations, at which preset, with which seeds and changed fields; and where its runs and report lie."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from experiments import tuning
from experiments.ablations import ABLATIONS, CORE, Ablation, Arm
from experiments.recipes import Preset, get_preset, scaled, tokenizer
from ibq.config import TrainConfig, flatten
from ibq.data import data_hash_of
from ibq.errors import ConfigError, nearest
from ibq.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
LONGEST_NAME = 100


class Search(NamedTuple):
    """What a run of a search is for: the arm, and the value of the tuned field that it tries."""

    arm: str
    value: float


@dataclass(frozen=True)
class Cell:
    """One arm at one seed, or one run of an arm's search. Cells may share a run: the run's id hangs on its config alone."""

    ablation: Ablation
    arm: Arm
    seed: int
    config: TrainConfig
    run: RunDirectory
    search: Search | None = None

    @property
    def name(self) -> str:
        return f"{self.ablation.name}/{self.arm.name} seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """Arguments as on the command line; everything else follows from them.

    Args:
        preset: name of the scale.
        ablations: names; none means the core study.
        seeds: seeds of every arm (0 to seeds - 1); None leaves each arm its own number.
        overrides: fields changed in every arm, by dotted path.

    Raises:
        ConfigError: an unknown preset, ablation or field, seeds below 1, or a config that contradicts itself.
    """

    preset_name: str = "quick"
    ablation_names: tuple[str, ...] = ()
    seeds: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        get_preset(self.preset_name)
        for name in self.ablation_names:
            if name not in ABLATIONS:
                raise ConfigError(f"ablation {name!r} does not exist; {nearest(name, ABLATIONS)}")
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds} must be at least 1")

    @property
    def preset(self) -> Preset:
        return get_preset(self.preset_name)

    @property
    def ablations(self) -> list[Ablation]:
        return [ABLATIONS[name] for name in dict.fromkeys(self.ablation_names or CORE)]

    @property
    def name(self) -> str:
        """Name of the report's folder: the preset, and the changed fields where there are any."""
        changes = "".join(
            f"+{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in sorted(self.overrides.items())
        )
        return file_name(self.preset_name + changes)

    @property
    def runs_folder(self) -> Path:
        """IBQ_RUNS, else runs/ in the repository; the smoke preset lives in a temporary folder of this process."""
        default = _temporary_folder() / "runs" if self.preset_name == "smoke" else ROOT / "runs"
        return Path(os.environ.get("IBQ_RUNS") or default)

    @property
    def report_folder(self) -> Path:
        """IBQ_REPORTS, else reports/ in the repository, and in it a folder of this study's name."""
        default = _temporary_folder() / "reports" if self.preset_name == "smoke" else ROOT / "reports"
        return Path(os.environ.get("IBQ_REPORTS") or default) / self.name

    @cached_property
    def cells(self) -> list[Cell]:
        """Every arm and seed that can be trained now, and the runs of searches.

        Seed 0 of everything comes first, so that a study that is cut short has one row of each arm.
        """
        return self._stages[0]

    @cached_property
    def waiting(self) -> list[Cell]:
        """Arms and seeds whose search is not finished; their config is the one before the choice, and none of it is ever trained."""
        return self._stages[1]

    def advance(self) -> list[Cell]:
        """Let cells whose search has finished in the meantime join `cells`; returns those that are new there."""
        if not self.waiting:
            return []
        now, before = replace(self), {cell.run.path for cell in self.cells}
        if len(now.waiting) < len(self.waiting):
            self.__dict__.update(cells=now.cells, waiting=now.waiting)
        return [cell for cell in self.cells if cell.run.path not in before]

    def only(self, cells: list[Cell]) -> Study:
        """The same study with some of its cells alone."""
        part = replace(self)
        part.__dict__.update(cells=cells, waiting=[])
        return part

    @cached_property
    def _stages(self) -> tuple[list[Cell], list[Cell]]:
        ready: list[Cell] = []
        waiting: list[Cell] = []
        for ablation in self.ablations:
            configs = {arm.name: self._config(ablation, arm) for arm in ablation.arms}
            searches = {arm.name: self._search(ablation, arm, configs[arm.name]) for arm in ablation.arms if not arm.tuned_as}
            ready += [cell for search in searches.values() for cell in search]
            for arm in ablation.arms:
                config, stage = configs[arm.name], ready
                if config.quantizer.codebook_size > max(self.preset.max_codebook_size, self._codebook_size):
                    continue
                if ablation.tuning:
                    search = searches[arm.tuned_as or arm.name]
                    chosen = tuning.best({cell.search.value: tuning.search_loss(cell.run) for cell in search if cell.search})
                    config, stage = (config, waiting) if chosen is None else (config.with_fields(**{ablation.tuning.field: chosen}), ready)
                stage += [self._cell(ablation, arm, config, seed) for seed in ablation.seeds(arm, self.preset, self.seeds)]
        return sorted(ready, key=lambda cell: cell.seed), sorted(waiting, key=lambda cell: cell.seed)

    def _search(self, ablation: Ablation, arm: Arm, config: TrainConfig) -> list[Cell]:
        """The runs that decide an arm's tuned field, by ascending value; none where the ablation tunes nothing."""
        if ablation.tuning is None:
            return []
        field, cells = ablation.tuning.field, []
        for factor in ablation.tuning.factors:
            short = scaled(config, {field: factor, "steps": ablation.tuning.step_share})
            value = flatten(short.to_json_dict())[field]
            candidate = Arm(f"{arm.name}: {field} {value:g}", arm.levels)
            cells.append(replace(self._cell(ablation, candidate, short, seed=0), search=Search(arm.name, value)))
        return cells

    def _config(self, ablation: Ablation, arm: Arm) -> TrainConfig:
        """An arm's config before any search. What arms differ in cannot be set for all of them."""
        fields = ablation.quantizer(arm.levels, self._codebook_size)
        config = tokenizer(self.preset, {"codebook_size": self._codebook_size} | fields)
        config = config.with_fields(**self.overrides) if self.overrides else config
        for path in self.overrides:
            if path == "seed":
                raise ConfigError("--set seed would give every arm one seed; use --seeds, which says how many")
            if path in {f"quantizer.{name}" for name in fields}:
                raise ConfigError(f"{path} is what the arms of {ablation.name} differ in; set another field, or add an arm")
        return scaled(config, ablation.scales(arm.levels))

    @cached_property
    def _codebook_size(self) -> int:
        """K of every arm: the preset's, or the user's."""
        wanted = self.overrides.get("quantizer.codebook_size", self.preset.codebook_size)
        return tokenizer(self.preset, {"method": "vq", "codebook_size": wanted}).quantizer.codebook_size

    def _cell(self, ablation: Ablation, arm: Arm, config: TrainConfig, seed: int) -> Cell:
        config = config.model_copy(update={"seed": seed})
        return Cell(ablation, arm, seed, config, RunDirectory(self.runs_folder / config.run_id(_data_hash(config.data))))


def file_name(text: str) -> str:
    """A text as a file name: plain ASCII, no separators, not hidden, of bounded length; where that changes it, a hash keeps it apart."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "+=._-") else "_" for c in text)
    if safe == text and len(safe) <= LONGEST_NAME and not safe.startswith("."):
        return safe
    return f"{safe[:LONGEST_NAME].lstrip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def unique_runs(cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of each run: what has to be trained."""
    return list({cell.run.path: cell for cell in reversed(list(cells))}.values())[::-1]


_data_hash = cache(data_hash_of)


@cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ibq-smoke-"))
