"""State of an arm's codebook by its rows: it lives, or has collapsed by a threshold stated beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Codebook:
    """The state of an arm's codebook over its finished seeds; `alive` is None where they disagree or there is none.

    A seed that did not stay finite counts as collapsed; `share` is the mean perplexity over K of the others.
    """

    arm: str
    share: float
    alive: bool | None
    seeds: int
    diverged: int


def codebook_of(rows: pd.DataFrame, arm: str, collapse: float) -> Codebook:
    """An arm's codebook, which has collapsed where its perplexity is below `collapse` times K."""
    mine = rows[rows["arm"] == arm]
    finished = mine[mine["status"] == "ok"]
    shares = [] if finished.empty else finished["perplexity_share"].astype(float).tolist()
    diverged = int((mine["status"] == "nan").sum())
    alive = {share >= collapse for share in shares} | ({False} if diverged else set())
    mean = sum(shares) / len(shares) if shares else float("nan")
    return Codebook(arm, mean, alive.pop() if len(alive) == 1 else None, len(shares) + diverged, diverged)
