"""In which order an ablation's page shows its figures and tables; one that no section names comes at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Item:
    """A figure, or a table where `html` is given: its name, its file without the suffix, its caption, and a note below
    it."""

    name: str
    file: str
    caption: str
    html: str | None = None
    note: str = ""


class Section(NamedTuple):
    """A heading and the names of the figures and tables below it; a figure stands before the table of the same name."""

    heading: str
    names: tuple[str, ...]


SECTIONS = (
    Section("The grid", ("heat_map", "grid")),
    Section("What the transformers draw", ("samples",)),
    Section("Guidance", ("guidance_sweep",)),
    Section("Bits and quality", ("bits_and_distortion",)),
    Section("Over size", ("scaling", "depth_scaling")),
    Section("Usage over training", ("usage_over_training", "usage_of_each")),
    Section(
        "Effective dimension over training", ("usage_against_dimension", "dimension_over_training", "dimension_of_each")
    ),
    Section("Loss over training", ("loss_over_training",)),
    Section("The search before it", ("search",)),
    Section("Necessary and sufficient", ("parts",)),
    Section("Which part does it", ("main_effects",)),
    Section("Usage and quality side by side", ("rate_distortion", "arms", "reconstructions")),
    Section(
        "How codes and features look",
        (
            "code_frequency",
            "code_map",
            "map_over_training",
            "gap_over_training",
            "logits_over_training",
            "geometry",
            "gradient_reach",
        ),
    ),
    Section("Beside the paper", ("paper",)),
)
LAST = "More"
ELSEWHERE = ("verdicts",)
"""Shown at the head of the page."""


def arrange(items: list[Item]) -> list[tuple[str, list[Item]]]:
    """Items under their headings, in the order of SECTIONS; headings without items are left out."""
    arranged = [
        (section.heading, [item for name in section.names for item in items if item.name == name])
        for section in SECTIONS
    ]
    known = {name for section in SECTIONS for name in section.names} | set(ELSEWHERE)
    arranged.append((LAST, [item for item in items if item.name not in known]))
    return [(heading, below) for heading, below in arranged if below]
