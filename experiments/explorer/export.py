"""The settings of a run as something that trains it elsewhere: a recipe, which is a whole Python file, and a
command."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from experiments.ablations import ABLATIONS
from experiments.ablations.grid import Base
from experiments.explorer.trainer import runtime_of
from experiments.recipes import PRESETS
from experiments.runner.plan import command
from experiments.study import Study
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.schema import flatten
from ibq.training.interventions import Intervention

T = TypeVar("T")

RECIPE = '''\
"""A run of the collapse explorer as a recipe: as a script it trains into a folder beside it, or goes on where it was
stopped."""

from __future__ import annotations

from pathlib import Path

from ibq.config import TrainConfig
from ibq.training.interventions import Intervention, scheduled
from ibq.training.runtime import Runtime
from ibq.training.tokenizer import train_tokenizer


def recipe() -> TrainConfig:
    """What the run began with."""
    return TrainConfig.parse(
{config}
    )


INTERVENTIONS: list[Intervention] = {interventions}
"""What was changed by hand while it trained, each before the update that follows `step` finished ones."""


def main() -> None:
    runtime = Runtime(log_every={log_every})  # a restart of dead codes goes by the tokens since the last log step
    for event in train_tokenizer(recipe(), Path(__file__).with_suffix(""), runtime, intervene=scheduled(INTERVENTIONS)):
        usage = f", usage {{event.record['usage']:.3f}}" if "usage" in event.record else ""
        print(f"step {{event.step}} of {{event.steps}}: loss {{event.record['loss']:.4f}}{{usage}}", flush=True)


if __name__ == "__main__":
    main()
'''


def recipe_text(config: TrainConfig, interventions: Iterable[Intervention] = ()) -> str:
    """A Python file: `recipe()` returns the config, `INTERVENTIONS` holds what was changed by hand, and run as a script
    it trains both.

    Args:
        config: what the run began with.
        interventions: in the order in which they took effect.
    """
    done = list(interventions)
    listed = "".join(textwrap.indent(_intervention(each), "    ") + ",\n" for each in done)
    return RECIPE.format(
        config=textwrap.indent(_literal(config.to_json_dict()), 8 * " ").rstrip(),
        interventions=f"[\n{listed}]" if done else "[]",
        log_every=runtime_of(config).log_every,
    )


def command_text(config: TrainConfig) -> str:
    """The command that trains this very config headless, as a grid of one point; of the seeds below the config's, too,
    where it has any.

    It starts from the preset and the arm that need the fewest changes.

    Raises:
        ConfigError: no arm of any ablation has the method.
    """
    ablations = [each for each in ABLATIONS.values() if not (each.on_request or each.of_transformers)]
    bases = [Base(ablation, arm) for ablation in ablations for arm in ablation.arms]
    bases = [base for base in bases if base.method == config.quantizer.method]
    if not bases:
        raise ConfigError(
            f"no arm of any ablation has method={config.quantizer.method!r}, which a command could start from; use the "
            f"recipe"
        )
    presets = [preset for preset in PRESETS.values() if config.seed < preset.max_seeds]
    studies = [
        study
        for preset in _distinct(presets, lambda preset: preset.fields)
        for base in _distinct(bases, lambda base: base.arm.changes)
        if (study := _study(config, preset.name, base.reference))
    ]
    return command(min(studies, key=lambda study: len(study.grid)))


def _distinct(items: list[T], of: Callable[[T], object]) -> list[T]:
    """The first of those that are alike: presets of one scale, arms that many ablations have."""
    return list({repr(of(item)): item for item in reversed(items)}.values())[::-1]


def _study(config: TrainConfig, preset: str, base: str) -> Study | None:
    """The study that has the config alone, or at all seeds up to its own; None where it cannot be made so."""
    wanted = flatten(config.to_json_dict())
    grid = {"steps": [config.steps]}
    while True:
        try:
            study = Study(preset, seeds=config.seed + 1, grid=grid, bases=(base,))
            made = study.config_of(study.ablations[0], study.ablations[0].arms[0])
        except ConfigError:
            return None
        found = flatten(made.model_copy(update={"seed": config.seed}).to_json_dict())
        differing = [field for field, value in wanted.items() if found.get(field) != value]
        if not differing:
            return study
        if all(field in grid for field in differing):
            return None
        grid |= {field: [wanted[field]] for field in differing}


def _intervention(intervention: Intervention) -> str:
    fields = (
        f"    fields={textwrap.indent(_literal(intervention.fields), '    ').lstrip()},\n"
        if intervention.fields
        else ""
    )
    restart = "    restart_dead=True,\n" if intervention.restart_dead else ""
    return f"Intervention(\n    step={intervention.step},\n{fields}{restart})"


def _literal(value: Any) -> str:
    """A value as Python source: a dict an entry a line, a long string in parts, all else on one line."""
    if isinstance(value, dict):
        return (
            "{\n"
            + "".join(f'    "{key}": {textwrap.indent(_literal(of), "    ").lstrip()},\n' for key, of in value.items())
            + "}"
        )
    if isinstance(value, str):
        parts = _parts(value)
        return parts[0] if len(parts) == 1 else "(\n" + "".join(f"    {part}\n" for part in parts) + ")"
    return repr(value)


def _parts(text: str) -> list[str]:
    """A text as string literals in plain ASCII, each of which fits on a line."""
    length = (
        80 if text.isascii() and text.isprintable() and not {'"', "\\"} & set(text) else 10
    )  # what is escaped takes up to ten signs
    parts = [text[i : i + length] for i in range(0, max(1, len(text)), length)]
    return ['"' + part.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"' for part in parts]
