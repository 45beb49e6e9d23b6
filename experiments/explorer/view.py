"""View of one run, read from its folder alone: a run of the explorer that trains, or any tokenizer's
run of the study.

Nothing here waits for a lock or trusts a file: a trainer may be writing, or may have been killed, at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from experiments.analysis.projections import Projection, project
from experiments.explorer.live import load, newest_tensors, read_live_umap
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.evaluation.diagnosis import Finding, diagnose
from ibq.run_directory import RunDirectory, read_lines
from ibq.schema import flatten
from ibq.training.interventions import Intervention

LETTERS = "ABCD"
QUANTIZE = "quantize_from"
SHORT_NAMES = {
    "optim.lr": "learning rate",
    "loss.pixel_weight": "pixel weight",
    "loss.perceptual_weight": "perceptual weight",
    "loss.adversarial.weight": "adversarial weight",
    "quantizer.beta": "beta",
    "quantizer.beta_on": "beta on",
    "quantizer.commitment_weight": "commitment weight",
    "quantizer.entropy_weight": "entropy weight",
    "quantizer.entropy_temperature": "entropy temperature",
    "quantizer.double": "double term",
    "quantizer.logit_scale": "logit scale",
}


@dataclass(frozen=True, eq=False)
class View:
    """A run as the figures show it.

    Attributes:
        name: of the run's folder.
        slot: its place among the runs side by side, 0 to 3, which decides letter, colour and marker.
        config: what it began with.
        history: a line a log step, each step once, sorted by `step`.
        tensors: of the newest whole snapshot (`ibq.training.logging.take_snapshot`); {} while there is none.
        tensors_step: finished updates at that snapshot.
        interventions: in the order of their steps.
        findings: what `diagnose` says of the history.
        pictures: `images_BCHW` and `reconstructions_BCHW`, uint8; {} while there are none.
        projection: the newest UMAP of codes and features, if one has been made.
    """

    name: str
    slot: int
    config: TrainConfig
    history: list[dict[str, float]]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    tensors_step: int = 0
    interventions: list[Intervention] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)
    projection: Projection | None = None

    @property
    def letter(self) -> str:
        return LETTERS[self.slot]

    @property
    def label(self) -> str:
        return f"{self.letter}  {describe(self.config)}"

    @property
    def step(self) -> int:
        """Of the newest line."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def steps(self) -> list[float]:
        return [line["step"] for line in self.history]

    @property
    def codebook_size(self) -> int:
        return self.config.quantizer.codebook_size


def describe(config: TrainConfig) -> str:
    """A run in a few words: method, sizes and learning rate."""
    quantizer = config.quantizer
    return f"{quantizer.method.upper()} K={quantizer.codebook_size:,} D={quantizer.code_dim} lr={config.optim.lr:g}"


def short_name(path: str) -> str:
    """What a field that can change while a run trains is called."""
    return SHORT_NAMES[path.replace(".inner.", ".")]


def in_words(intervention: Intervention) -> str:
    """Changes in a phrase, e.g. "quantizer on, learning rate 0.0001, restart of dead codes"."""
    changes = {path: value for path, value in intervention.fields.items() if path != QUANTIZE}
    words = ["quantizer on"] if QUANTIZE in intervention.fields else []
    words += [f"{short_name(path)} {_value(value)}" for path, value in changes.items()]
    return ", ".join(words + (["restart of dead codes"] if intervention.restart_dead else []))


def _value(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else f"{value:g}"


def read_view(run: RunDirectory, slot: int = 0) -> View:
    """Everything that is whole in a run's folder now.

    Args:
        run: of a tokenizer; it may be training, finished, damaged or a moment old.
        slot: 0 to 3, see `View`.

    Raises:
        ConfigError: there is no config that can be read, or it is a transformer's.
    """
    records = clean_history(run)
    tensors, step = newest_tensors(run)
    pictures = tensors if "reconstructions_BCHW" in tensors else load(run.evaluation)
    return View(
        name=run.path.name,
        slot=slot,
        config=tokenizer_config(run),
        history=records,
        tensors=tensors,
        tensors_step=step,
        interventions=sorted(read_interventions(run), key=lambda intervention: intervention.step),
        findings=diagnose(records),
        pictures=pictures if "reconstructions_BCHW" in pictures else {},
        projection=_newest_projection(run),
    )


def tokenizer_config(run: RunDirectory) -> TrainConfig:
    """The config that a tokenizer's run began with.

    Raises:
        ConfigError: as `read_view`.
    """
    config = run.read_config()
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"{run.path.name} is a transformer's run, and the explorer shows tokenizers'; give a tokenizer's run"
        )
    return config


def clean_history(run: RunDirectory) -> list[dict[str, float]]:
    """The lines of the history that are numbers by name, each step once (the newest line of it counts), ascending."""
    lines = (line for line in read_lines(run.history) if isinstance(line, dict) and isinstance(line.get("step"), int))
    by_step = {
        line["step"]: {name: value for name, value in line.items() if isinstance(value, (int, float))} for line in lines
    }
    return [by_step[step] for step in sorted(by_step)]


def read_interventions(run: RunDirectory) -> Iterator[Intervention]:
    """Those that can be read."""
    for line in read_lines(run.interventions):
        try:
            yield Intervention.model_validate(line)
        except ValidationError:
            continue


def _newest_projection(run: RunDirectory) -> Projection | None:
    """The one that was asked for here, else the one that the study made of the newest snapshot."""
    try:
        kept = project(run, "umap", run.snapshot_steps()[-1:], compute=False)
    except (OSError, SafetensorError):
        kept = []
    return read_live_umap(run) or next(iter(kept), None)


def fields_that_differ(configs: list[TrainConfig]) -> list[str]:
    """Dotted paths in which configs differ, in the order of the first one's fields."""
    flat = [flatten(config.to_json_dict()) for config in configs]
    paths = dict.fromkeys(path for each in flat for path in each)
    return [path for path in paths if len({json.dumps(each.get(path)) for each in flat}) > 1]
