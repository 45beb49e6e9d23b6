"""The command that trains one recipe, alone or in each process of torchrun: train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from experiments.cli.base import DeviceOption, PluginOption, SetOption, app, say, use_plugins
from ibq.cli.boundary import one_sentence_errors
from ibq.cli.settings import changes
from ibq.errors import ConfigError


@app.command()
@one_sentence_errors
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="its name, as list shows it")],
    data: Annotated[
        str, typer.Option(help="folder of images with train/ and val/; default: the folder IBQ_IMAGENET")
    ] = "",
    tokenizer: Annotated[
        str,
        typer.Option(
            help="of a transformer: folder of a finished run or of Tokenizer.save, or a released checkpoint (.ckpt)"
        ),
    ] = "",
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="the run's own folder; default: runs/<its id>")] = None,
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that decode pictures, of each training process")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the networks")] = False,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="less memory, about a third more time")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(help="of a transformer: images that it is evaluated on, at each guidance")
    ] = None,
    sharding: Annotated[
        Literal["ddp", "fsdp"], typer.Option(help="of a transformer: what each GPU holds, all or a part of every layer")
    ] = "ddp",
    plugin: PluginOption = None,
) -> None:
    """Train one recipe in the foreground; again: it goes on. Several GPUs: torchrun --nproc-per-node N -m experiments
    train RECIPE."""
    use_plugins(plugin)
    from experiments.imagenet256 import recipe_of
    from experiments.imagenet256.on_tokenizer import on_tokenizer, say_of_another
    from experiments.recipes import get_preset
    from experiments.runner import torchrun
    from ibq.cli.common import read_tokenizer
    from ibq.config import TransformerTrainConfig

    config = recipe_of(recipe)()
    overrides = changes(set_)
    if data:
        if "data.name" in overrides:
            raise ConfigError(
                f"--data {data} and --set data.name={overrides['data.name']} name two data sets; leave one out"
            )
        overrides["data.name"] = f"imagefolder:{data}"
    if isinstance(config, TransformerTrainConfig):
        if not tokenizer:
            raise ConfigError(
                f"{recipe} trains a transformer on the tokens of a tokenizer; name that by --tokenizer PATH, the "
                f"folder of a finished run or "
                "of Tokenizer.save, or a released checkpoint (.ckpt)"
            )
        network, _ = read_tokenizer(tokenizer)
        say_of_another(config.tokenizer, network.config, say)
        config = on_tokenizer(config, network, overrides)
    else:
        given = {
            "--tokenizer": tokenizer or None,
            "--samples": samples,
            "--sharding": None if sharding == "ddp" else sharding,
        }
        if idle := [f"{option} {value}" for option, value in given.items() if value is not None]:
            raise ConfigError(
                f"{recipe} trains a tokenizer, and {idle[0]} is for recipes of transformers; leave it out"
            )
        network, config = None, config.with_fields(**overrides)
    if config.data.folder and not Path(config.data.folder).is_dir():
        raise ConfigError(
            f"there is no folder {config.data.folder}; name the folder of the images by --data PATH or in IBQ_IMAGENET"
        )
    runtime = get_preset("paper").runtime
    runtime = replace(
        runtime,
        device=device,
        compile=compile,
        checkpoint_activations=checkpoint_activations,
        workers=runtime.workers if workers is None else workers,
        samples=runtime.samples if samples is None else samples,
        sharding=sharding,
    )
    torchrun.train(config, runtime, out, say, network)
