"""The animation of the README: one round of the playground as a GIF that loops where it began."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.playground.drawing import Board
from experiments.playground.simulation import STEPS_A_ROUND, Playground, Settings
from ibq.errors import ConfigError
from ibq.run_directory import replacing

METHODS_SHOWN = ("VQ", "VQ, restarts", "VQ, moving averages", "SimVQ", "IBQ as released", "IBQ, no entropy")
COLUMNS = 3
FRAMES = 60
FRAME_MS = 110
LAST_FRAME_MS = 2000
LARGEST_MB = 3


def write_animation(
    out: Path,
    methods: Sequence[str] = METHODS_SHOWN,
    settings: Settings = Settings(),
    frames: int = FRAMES,
    say: Callable[[str], None] = print,
) -> None:
    """One round of the mixture, `frames` pictures of it, written in one step.

    Features are at the end where they were at the beginning; codes are not, so the last picture stays for two seconds.

    Args:
        out: ends with .gif; its folder is made where it is missing.
        methods: labels of `experiments.playground.METHODS`.
        settings: with a speed above 0.
        frames: from 2 to 500, a step each at least.
        say: told about progress, line by line.

    Raises:
        ConfigError: another suffix, a mixture that stands still, or a number of frames out of range.
    """
    if out.suffix.lower() != ".gif":
        raise ConfigError(f"the animation {out.name!r} must be a GIF; name it {out.with_suffix('.gif').name!r}")
    if not 2 <= frames <= STEPS_A_ROUND:
        raise ConfigError(f"frames={frames} must lie between 2 and {STEPS_A_ROUND}, the steps of a round at speed 1")
    if settings.speed == 0:
        raise ConfigError("speed=0.0 leaves the mixture where it is, so that a round never ends; give a speed above 0")
    playground = Playground(methods, settings)
    board = Board(playground, COLUMNS)
    ends = np.linspace(0, STEPS_A_ROUND / settings.speed, frames + 1).round().astype(int)[1:]
    images = []
    for i, end in enumerate(ends):
        playground.advance(max(int(end) - playground.steps, 1))
        board.update(playground.observe())
        images.append(Image.fromarray(board.image()))
        if (i + 1) % max(frames // 10, 1) == 0:
            say(f"frame {i + 1} of {frames}")
    palette = board.palette()
    indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [FRAME_MS] * (frames - 1) + [LAST_FRAME_MS]
    with replacing(out) as temporary:
        indexed[0].save(
            temporary, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=True
        )
    megabytes = out.stat().st_size / 1e6
    say(
        f"{out}: {frames} frames, {megabytes:.2f} MB"
        + (f", more than {LARGEST_MB} MB; give fewer --frames" * (megabytes > LARGEST_MB))
    )
