"""Entry of notebook 09: the interface, or, where nobody looks, runs through the same engine and the same figures as
plain output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from IPython.display import Image, Markdown, display

from experiments.explorer.drawing import Shown, draw_png
from experiments.explorer.panel import FIGURE_SIZE, Panel
from experiments.explorer.run import WORKERS, ExplorerRun, new_run
from experiments.explorer.tabs import TABS
from experiments.explorer.view import LETTERS, describe
from experiments.recipes import get_preset, tokenizer
from experiments.study import Study
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.evaluation.diagnosis import diagnose

PAIR = ("vq", "ibq")
CODES = 256
"""Settings that the form begins with: few enough that a collapse takes seconds."""
IMPLIED: dict[str, dict[str, Any]] = {
    "fsq": {"codebook_size": 256, "code_dim": 4, "levels": (4, 4, 4, 4)},
    "lfq": {"codebook_size": 256, "code_dim": 8},
    "bsq": {"codebook_size": 256, "code_dim": 8},
}
"""Sizes of methods whose codebook follows from them."""
LONGEST_S = 3600.0
_shown: list[Panel] = []
"""The interface of this kernel, if there is one."""


def explore(
    preset: str = "quick", autostart: Sequence[str] = (), headless: bool | None = None
) -> Panel | list[ExplorerRun]:
    """Display the explorer, or train and display without it.

    Args:
        preset: the scale of new runs.
        autostart: methods that begin to train at once; headless: those that are trained, VQ and IBQ if there are none.
        headless: train, wait, and show figures and findings as plain output; None: at smoke alone, where nobody looks.

    Returns:
        the interface, or the runs.

    Raises:
        ConfigError: an unknown preset or method, or, headless, more than four methods or a run that failed.
    """
    if preset == "smoke":  # what a test trains stays in a folder of its own
        os.environ.setdefault("IBQ_RUNS", str(Study("smoke").runs_folder))
    if headless or (headless is None and preset == "smoke"):
        return show_headless([settings(preset, method) for method in autostart or PAIR])
    panel = Panel(settings(preset, "vq"))
    for old in _shown:
        old.close()
    runs = [card.run for old in _shown for card in old.cards]  # the cell was run again: what was shown still is
    _shown[:] = [panel]
    panel.start()
    for run in runs:
        panel.add(run)
    for method in autostart:
        panel.train(settings(preset, method))
    display(panel.widget)
    return panel


def settings(preset: str, method: str) -> TrainConfig:
    """A method at its defaults, at a preset's scale, with `CODES` codes where it can have them."""
    scale = get_preset(preset)
    sizes = {"codebook_size": min(CODES, scale.codebook_size)}
    return tokenizer(scale, {"method": method, **IMPLIED.get(method, sizes)})


def show_headless(configs: Sequence[TrainConfig]) -> list[ExplorerRun]:
    """Train runs side by side, wait for them, display every figure of them and what is seen in words; no process is
    left.

    Raises:
        ConfigError: there are more runs than places, or a run failed.
    """
    if len(configs) > len(LETTERS):
        raise ConfigError(
            f"{len(configs)} runs were asked for and {len(LETTERS)} have room side by side; train fewer at a time"
        )
    runs = [new_run(config) for config in configs]
    try:
        for run in runs:
            run.train()
        for run in runs:
            if not run.wait(LONGEST_S) or run.state != "finished":
                raise ConfigError(
                    f"run {run.name} is {run.state} after {run.step} steps of {run.steps}: "
                    f"{run.reason or 'it takes too long'}"
                )
    finally:
        WORKERS.close(timeout_s=20.0)
    shown = tuple(Shown(str(run.directory.path), slot) for slot, run in enumerate(runs))
    for name, tab in TABS.items():
        display(Markdown(f"**{tab.title}.** *{tab.caption}*"))
        drawn = draw_png(name, shown, FIGURE_SIZE)
        if drawn.problem:
            raise RuntimeError(drawn.problem)
        display(Image(data=drawn.png, format="png"))
    for letter, run in zip(LETTERS, runs, strict=False):
        sentences = (
            "".join(f"\n- {finding.sentence}" for finding in diagnose(run.directory.read_history()))
            or "\n- Nothing wrong is seen."
        )
        display(Markdown(f"**Diagnosis of {letter}, {describe(run.config)}, after {run.step} steps**\n{sentences}"))
    return runs
