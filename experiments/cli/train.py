"""The command that trains one recipe, alone or in each process of torchrun: train."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from experiments.cli.base import DeviceOption, SetOption, app, changes, one_sentence_errors, say
from experiments.imagenet256 import recipe_of
from experiments.recipes import get_preset
from experiments.runner import torchrun
from ibq.cli.common import read_tokenizer
from ibq.config import TrainConfig, TransformerTrainConfig
from ibq.errors import ConfigError
from ibq.models.tokenizer import Tokenizer
from ibq.schema import set_fields


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
) -> None:
    """Train one recipe in the foreground; again: it goes on. Several GPUs: torchrun --nproc-per-node N -m experiments
    train RECIPE."""
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
        _say_of_another(config.tokenizer, network.config)
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


def on_tokenizer(
    config: TransformerTrainConfig, tokenizer: Tokenizer, overrides: dict[str, Any]
) -> TransformerTrainConfig:
    """A transformer's config on another tokenizer, tied to its weights, with fields set by dotted path; validated once
    all is in its place.

    The tokenizer may be any, also of another method, K or grid than the recipe's: they are the tokenizer's choice and
    not the recipe's, and who names one by its path has chosen it, while batch, schedule and transformer of the recipe
    serve every tokenizer. That the recipe's expected numbers are then of something else is said in a line. What cannot
    go together (sub-tokens that do not make K, another number of channels, a grid that does not divide the images) the
    config refuses.

    Raises:
        ConfigError: a path names no field, or one of the tokenizer, which is trained already; or the result contradicts
            itself.
    """
    for path in overrides:
        if path.split(".")[0] in ("tokenizer", "tokenizer_sha256"):
            raise ConfigError(
                f"--set {path} cannot change the tokenizer of --tokenizer, which is trained already; leave it out"
            )
    tree = config.to_json_dict() | {
        "tokenizer": tokenizer.config.to_json_dict(),
        "tokenizer_sha256": tokenizer.digest(),
    }
    return TransformerTrainConfig.parse(set_fields(tree, overrides))


def _say_of_another(usual: TrainConfig, given: TrainConfig) -> None:
    """A line, by the first process alone, where the tokens are of another kind than the recipe's."""
    theirs, ours = (
        f"{config.quantizer.method} with {config.quantizer.codebook_size:,} codes, f = {config.model.downsampling}"
        for config in (given, usual)
    )
    if theirs != ours and os.environ.get("RANK", "0") == "0":
        say(f"the tokenizer is {theirs}; the recipe has {ours}, and its expected numbers are for that")
