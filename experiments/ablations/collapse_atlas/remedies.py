"""Remedies of the atlas, each beside the case of collapse that it is for."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.ablations.collapse_atlas.arms import name


@dataclass(frozen=True)
class Remedy:
    """An arm that shows what mends a collapse: the case that it is of, what was done, and whether it is the case
    itself, unmended or its counterpart that never collapsed."""

    case: str
    what: str
    arm: str
    reference: bool = False


OUTSIDE_CASE, LONG_CASE = "outside its recipe", "the whole recipe, codes drawn 4 times as long"
TRIED = (
    Remedy(OUTSIDE_CASE, "D = 32", name("outside", "fast", 32), reference=True),
    Remedy(OUTSIDE_CASE, "D = 256", name("outside", "fast", 256), reference=True),
    Remedy(
        OUTSIDE_CASE,
        "D = 32 with codes as long as at D = 256",
        name("outside", "fast", 32, length="×2.8"),
        reference=True,
    ),
    Remedy(OUTSIDE_CASE, "codes as long as at D = 32", name("outside", "fast", 256, length="×0.35")),
    Remedy(OUTSIDE_CASE, "logits over √D", name("outside", "fast", 256, remedy="logits over √D")),
    Remedy(OUTSIDE_CASE, "logits over 4", name("outside", "fast", 256, remedy="logits over 4")),
    Remedy(OUTSIDE_CASE, "entropy temperature ×16", name("outside", "fast", 256, remedy="entropy temperature ×16")),
    Remedy(OUTSIDE_CASE, "entropy weight ×4", name("outside", "fast", 256, remedy="entropy weight ×4")),
    Remedy(OUTSIDE_CASE, "0.25 on the codebook term", name("ibq_single", "fast", 256)),
    Remedy(OUTSIDE_CASE, "double term", name("outside", "fast", 256, remedy="double term")),
    Remedy(OUTSIDE_CASE, "a third of the rate", name("outside", "usual", 256)),
    Remedy(LONG_CASE, "D = 32", name("ibq", "usual", 32, length="×4"), reference=True),
    Remedy(LONG_CASE, "D = 256", name("ibq", "usual", 256, length="×4"), reference=True),
    Remedy(LONG_CASE, "logits over √D", name("ibq", "usual", 256, length="×4", remedy="logits over √D")),
    Remedy(LONG_CASE, "codes of N(0, 1)", name("ibq", "usual", 256)),
    Remedy(LONG_CASE, "codes as long as at D = 32", name("ibq", "usual", 256, length="×0.35")),
)
