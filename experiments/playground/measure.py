"""Ends of rounds of the playground over seeds, and which codes a dot product can choose at all.

Suffixes: N directions, K codes, D code dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from experiments.playground.drawing import Board
from experiments.playground.simulation import CODES, METHODS, STEPS_A_ROUND, Playground, Settings
from ibq.errors import ConfigError, nearest

DISTANCES = (0.0, 2.0)
"""A mixture that turns about the origin and never leaves it, and the one that wanders and jumps."""


@dataclass(frozen=True)
class Scale:
    """Size of a measurement: seeds, and steps of each."""

    seeds: int
    steps: int


SCALES = {"smoke": Scale(2, 30), "quick": Scale(5, STEPS_A_ROUND)}


def scale_of(preset: str) -> Scale:
    """
    Raises:
        ConfigError: there is no such preset here.
    """
    if preset not in SCALES:
        raise ConfigError(f"the playground has no preset {preset!r}; {nearest(preset, SCALES)}")
    return SCALES[preset]


def stills(
    methods: Sequence[str], settings: Settings, steps: int, moments: Sequence[float]
) -> Iterator[tuple[int, bytes]]:
    """The board after each of some shares of so many steps, ascending: the step, and a PNG file."""
    playground = Playground(methods, settings)
    board = Board(playground, columns=3)
    for moment in moments:
        while playground.steps < max(round(moment * steps), 1):
            playground.advance(1)
            if playground.steps % 5 == 0:
                board.add(playground.observe())
        board.update(playground.observe())
        yield playground.steps, board.png()


def measure(
    scale: Scale, methods: Sequence[str] = tuple(METHODS), distances: Sequence[float] = DISTANCES
) -> pd.DataFrame:
    """A row for every method, distance and seed, with what is observed after the last step."""
    rows = []
    for distance in distances:
        for seed in range(scale.seeds):
            playground = Playground(methods, Settings(seed, distance=distance))
            playground.advance(scale.steps)
            rows += [
                {
                    "method": label, "distance": distance, "seed": seed, "in use": seen.in_use,
                    "perplexity": seen.perplexity, "pulled": seen.pulled, "reach": seen.reach, "error": seen.error,
                }
                for label, seen in playground.observe().items()
            ]  # fmt: skip
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds: codes in use and error at each distance; perplexity, pulled codes and reach
    at the last one."""
    digits = {"in use": 1, "error": 3, "perplexity": 1, "pulled": 1, "reach": 1}
    distances = list(dict.fromkeys(rows["distance"]))
    shown = [(name, distance) for name in ("in use", "error") for distance in distances]
    shown += [(name, distances[-1]) for name in ("perplexity", "pulled", "reach")]
    lines = []
    for method in dict.fromkeys(rows["method"]):
        line = {"method": method}
        for name, distance in shown:
            values = rows[(rows["method"] == method) & (rows["distance"] == distance)][name]
            line[f"{name}, distance {distance:g}"] = (
                f"{values.mean():.{digits[name]}f} ± {values.std():.{digits[name]}f}"
            )
        lines.append(line)
    return pd.DataFrame(lines)


def sentences(rows: pd.DataFrame) -> list[str]:
    """Sentences on VQ and on IBQ as released, whichever way it comes out."""
    said = []
    for distance in dict.fromkeys(rows["distance"]):
        mean = rows[rows["distance"] == distance].groupby("method").mean(numeric_only=True)
        vq, ibq = mean.loc["VQ"], mean.loc["IBQ as released"]
        usage, error = ("more" if ibq[name] > vq[name] else "not more" for name in ("in use", "error"))
        best = mean["in use"].idxmax()
        said.append(
            f"Distance {distance:g}: a step pulls {vq['pulled']:.0f} of {CODES} codes under VQ and {ibq['pulled']:.0f} "
            f"under IBQ as released (effective reach {vq['reach']:.0f} and {ibq['reach']:.0f}). IBQ ends with {usage} "
            f"codes in use than VQ ({ibq['in use']:.0f} and {vq['in use']:.0f}) and {error} error ({ibq['error']:.3f} "
            f"and {vq['error']:.3f}). Most codes in use: {best}, {mean.loc[best, 'in use']:.0f}, at an error of "
            f"{mean.loc[best, 'error']:.3f}."
        )
    return said


def choosable(dims: Sequence[int] = (2, 4, 8, 16), seeds: int = 5, directions: int = 2**14) -> pd.DataFrame:
    """Number of 64 codes at N(0, 1) that some feature can choose by dot product: those that any of many random
    directions chooses.

    These are corners of the codes' convex hull, and a lower bound of their number.
    """
    lines = []
    for D in dims:
        found = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            codes_KD, z_ND = torch.randn(CODES, D, generator=generator), torch.randn(directions, D, generator=generator)
            found.append(len((z_ND @ codes_KD.T).argmax(1).unique()))
        counts = pd.Series(found)
        lines.append(
            {"D": D, f"codes of {CODES} that a dot product can choose": f"{counts.mean():.1f} ± {counts.std():.1f}"}
        )
    return pd.DataFrame(lines)
