"""The command that trains one recipe, alone or in each process of torchrun: train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from experiments import foreground
from experiments.cli.base import DeviceOption, SetOption, app, changes, one_sentence_errors, say
from experiments.imagenet256 import recipe_of
from experiments.recipes import get_preset
from ibq.errors import ConfigError


@app.command()
@one_sentence_errors
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="its name, as list shows it")],
    data: Annotated[str, typer.Option(help="folder of images with train/ and val/; default: the folder IBQ_IMAGENET")] = "",
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="the run's own folder; default: runs/<its id>")] = None,
    device: DeviceOption = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="processes that decode pictures, of each training process")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the networks")] = False,
    checkpoint_activations: Annotated[bool, typer.Option("--checkpoint-activations", help="less memory, about a third more time")] = False,
) -> None:
    """Train one recipe in the foreground; again: it goes on. Several GPUs: torchrun --nproc-per-node N -m experiments train RECIPE."""
    config = recipe_of(recipe)()
    overrides = changes(set_)
    if data:
        if "data.name" in overrides:
            raise ConfigError(f"--data {data} and --set data.name={overrides['data.name']} name two data sets; leave one out")
        overrides["data.name"] = f"imagefolder:{data}"
    config = config.with_fields(**overrides)
    if config.data.folder and not Path(config.data.folder).is_dir():
        raise ConfigError(f"there is no folder {config.data.folder}; name the folder of the images by --data PATH or in IBQ_IMAGENET")
    runtime = replace(get_preset("paper").runtime, device=device, compile=compile, checkpoint_activations=checkpoint_activations)
    runtime = runtime if workers is None else replace(runtime, workers=workers)
    foreground.train(config, runtime, out, say)
