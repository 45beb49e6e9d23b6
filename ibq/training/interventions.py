"""Changes of a run while it trains: which fields may change, how a run records them, and how a resume replays them.

A run with interventions is a function of its config and of `interventions.jsonl` in its directory, where each is
written before it takes effect. Its config.json stays what it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Protocol

from pydantic import Field, ValidationError

from ibq.config import TrainConfig
from ibq.distributed import world_size
from ibq.errors import ConfigError, nearest, one_sentence
from ibq.run_directory import RunDirectory, append_line, read_lines
from ibq.schema import Frozen, flatten

LIVE_FIELDS = (
    "quantize_from",
    "optim.lr",
    "loss.pixel_weight",
    "loss.perceptual_weight",
    "loss.adversarial.weight",
    "quantizer.beta",
    "quantizer.beta_on",
    "quantizer.commitment_weight",
    "quantizer.entropy_weight",
    "quantizer.entropy_temperature",
    "quantizer.double",
    "quantizer.logit_scale",
)
"""Settings that a step reads anew: weights and rates, those of a quantizer also where it is of the parts
(`quantizer.inner`), and 0 for `quantize_from`, which switches the quantizer on. All else (sizes, initialisation, data)
is decided before the first step."""


class Intervention(Frozen):
    """A change before the update that follows `step` finished ones: fields by dotted path, or dead codes put on
    features, or both."""

    step: int = Field(0, strict=True, ge=0)
    fields: dict[str, float | bool | str] = Field(default_factory=dict)
    restart_dead: bool = Field(False, strict=True)
    """Codes without a token since the last log step but one begin anew on features of the coming batch, each on another
    one."""
    line: int = Field(0, strict=True, ge=0)
    """Of the run's control.jsonl, which asked for it; 0: a script did."""


Asked = Callable[[int], Iterable[Intervention]]


def live_fields(config: TrainConfig) -> tuple[str, ...]:
    """Those of LIVE_FIELDS that a config has, and that mean something in it."""
    idle = {
        "loss.perceptual_weight": config.loss.perceptual == "none",
        "loss.adversarial.weight": config.loss.adversarial.weight == 0,
        "quantize_from": config.quantize_from == 0,
    }
    present = flatten(config.to_json_dict())
    of_parts = [path.replace("quantizer.", "quantizer.inner.") for path in LIVE_FIELDS if path.startswith("quantizer.")]
    return tuple(path for path in (*LIVE_FIELDS, *of_parts) if path in present and not idle.get(path))


def amended(config: TrainConfig, fields: Mapping[str, Any]) -> TrainConfig:
    """The config with live fields changed.

    Raises:
        ConfigError: a field that cannot change while a run trains (the nearest that can is named), or a value that does
            not fit.
    """
    allowed = live_fields(config)
    for path in fields:
        if path not in allowed:
            raise ConfigError(f"{path!r} cannot change while this run trains; {nearest(path, allowed)}")
    if (share := fields.get("quantize_from", 0)) != 0:
        raise ConfigError(
            f"quantize_from={share!r} cannot be set while a run trains; 0 switches the quantizer on at the next step"
        )
    if fields.get("loss.adversarial.weight") == 0:
        raise ConfigError(
            "loss.adversarial.weight=0 would leave the discriminator to train for nothing; give a small weight, e.g. "
            "1e-6"
        )
    return config.with_fields(**fields) if fields else config


def after(config: TrainConfig, intervention: Intervention) -> TrainConfig:
    """The config once an intervention has taken effect.

    Raises:
        ConfigError: as `amended`, or dead codes cannot be restarted by this method.
    """
    if intervention.restart_dead and not config.quantizer.places_codes:
        raise ConfigError(
            f"method={config.quantizer.method!r} has no codes that can be placed one by one; restart none"
        )
    return amended(config, intervention.fields)


def read_interventions(run: RunDirectory) -> list[Intervention]:
    """Interventions recorded in a run's directory, in the order of their steps: a run that went on from an earlier
    checkpoint may have been changed before a record that it is yet to repeat. ConfigError: a line is damaged."""
    try:
        records = [Intervention.model_validate(line) for line in read_lines(run.interventions)]
    except ValidationError as error:
        raise ConfigError(f"{run.interventions} cannot be read ({one_sentence(error)}); forget the run") from None
    return sorted(records, key=lambda record: record.step)


def scheduled(interventions: Iterable[Intervention]) -> Asked:
    """Interventions of a list, each at its step: for a script that repeats what was done by hand."""
    planned = list(interventions)
    return lambda step: [each for each in planned if each.step == step]


class Requests(Protocol):
    """Interventions that are asked for from outside while a run trains (`ibq.training.control`)."""

    def take(self) -> Iterable[Intervention]:
        """Those that have come since the last call, in their order."""

    def refuse(self, line: int, reason: str) -> None:
        """Answer that the intervention of a line does not fit."""


class Journal:
    """The interventions of a run: those recorded, which a resume replays, then those asked for now.

    Args:
        run: its directory.
        config: what it began with.
        step: finished updates; what was recorded before has had its effect on weights.
        asked: what to ask before every step; None: nothing.
        control: what the run is asked through its control.jsonl; None: nothing.

    Raises:
        ConfigError: several processes train the run; a recorded line is damaged or does not fit the config.
    """

    def __init__(
        self, run: RunDirectory, config: TrainConfig, step: int, asked: Asked | None, control: Requests | None = None
    ) -> None:
        self.run, self.config, self._asked, self._control = run, config, asked, control
        recorded = read_interventions(run)
        if world_size() > 1 and (recorded or asked):
            raise ConfigError(
                f"a run with interventions is trained by one process, not by {world_size()}; start it without torchrun"
            )
        self.number = len(recorded)
        for each in recorded:
            if each.step < step:
                self.config = after(self.config, each)
        self._ahead = [each for each in recorded if each.step >= step]

    def due(self, step: int) -> list[Intervention]:
        """Interventions that take effect now; `config` is then the amended one.

        Raises:
            ConfigError: an intervention of a script does not fit; it is not recorded. One of control.jsonl is refused
                there, and training goes on.
        """
        replayed = [each for each in self._ahead if each.step == step]
        self._ahead = [each for each in self._ahead if each.step > step]
        fresh = (
            []
            if self._asked is None
            else [each.model_copy(update={"step": step, "line": 0}) for each in self._asked(step)]
        )
        done = [each.model_copy(update={"line": 0}) for each in replayed]
        fresh = [each for each in fresh if each not in done]  # a script that goes on asks for them again
        for each in chain(replayed, fresh):
            self.config = after(self.config, each)
        for each in self._control.take() if self._control else ():
            try:
                self.config = after(self.config, each)
            except ConfigError as error:
                self._control.refuse(each.line, str(error))  # type: ignore[union-attr]
            else:
                fresh.append(each.model_copy(update={"step": step}))
        for each in fresh:
            append_line(self.run.interventions, each.model_dump(mode="json"))
            self.number += 1
        return replayed + fresh
