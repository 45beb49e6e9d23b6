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
from typing import Any

from experiments.ablations import ABLATIONS, Ablation, Arm
from experiments.recipes import Preset, get_preset, tokenizer
from ibq.config import TrainConfig
from ibq.data import data_hash_of
from ibq.errors import ConfigError, nearest
from ibq.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
LONGEST_NAME = 100


@dataclass(frozen=True)
class Cell:
    """One arm at one seed. Arms of several ablations may share a run: the run's id hangs on its config alone."""

    ablation: Ablation
    arm: Arm
    seed: int
    config: TrainConfig
    run: RunDirectory

    @property
    def name(self) -> str:
        return f"{self.ablation.name}/{self.arm.name} seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """Arguments as on the command line; everything else follows from them.

    Args:
        preset: name of the scale.
        ablations: names; none means all.
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
        return [ABLATIONS[name] for name in dict.fromkeys(self.ablation_names or ABLATIONS)]

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
        """Every arm and seed: seed 0 of everything first, so that a study that is cut short has one row of each arm."""
        cells = [cell for ablation in self.ablations for arm in ablation.arms for cell in self._seeds_of(ablation, arm)]
        return sorted(cells, key=lambda cell: cell.seed)

    def only(self, cells: list[Cell]) -> Study:
        """The same study with some of its cells alone."""
        part = replace(self)
        part.__dict__["cells"] = cells
        return part

    def _seeds_of(self, ablation: Ablation, arm: Arm) -> list[Cell]:
        """An arm at each of its seeds. What arms differ in cannot be set for all of them."""
        fields = ablation.quantizer(arm.levels)
        config = tokenizer(self.preset, fields)
        config = config.with_fields(**self.overrides) if self.overrides else config
        for path in self.overrides:
            if path == "seed":
                raise ConfigError("--set seed would give every arm one seed; use --seeds, which says how many")
            if path in {f"quantizer.{name}" for name in fields}:
                raise ConfigError(f"{path} is what the arms of {ablation.name} differ in; set another field, or add an arm")
        data = _data_hash(config.data)
        configs = [config.model_copy(update={"seed": seed}) for seed in ablation.seeds(arm, self.preset, self.seeds)]
        return [Cell(ablation, arm, c.seed, c, RunDirectory(self.runs_folder / c.run_id(data))) for c in configs]


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
