"""The command that draws the playground's animation: playground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.base import app, say
from ibq.cli.boundary import one_sentence_errors


@app.command()
@one_sentence_errors
def playground(
    out: Annotated[Path, typer.Option("--out", metavar="FILE.gif", help="where the GIF goes")],
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="a panel, e.g. 'VQ, linear codes'; repeatable; none: six")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="pictures of the round; default: 60")] = None,
    seed: Annotated[int, typer.Option(help="of features, codes and restarts")] = 0,
    lr: Annotated[float, typer.Option(help="Adam's learning rate")] = 0.01,
    speed: Annotated[float, typer.Option(help="of the drift, in rounds per 500 steps")] = 1.0,
    distance: Annotated[float, typer.Option(help="of the mixture from the origin; 0: it only turns")] = 2.0,
) -> None:
    """Draw 64 codes and a drifting mixture in the plane, the methods side by side, as an animation that loops."""
    import torch

    from experiments.playground.animation import FRAMES, METHODS_SHOWN, write_animation
    from experiments.playground.simulation import Settings

    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second thread, which would only wait
    settings = Settings(seed, lr, speed, distance)
    write_animation(out, tuple(methods or METHODS_SHOWN), settings, FRAMES if frames is None else frames, say)
