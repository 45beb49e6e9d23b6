"""Source of the features: a mixture of Gaussians that wanders round the origin, turns, and jumps to the other
side.

Suffixes: N features, G components, D = 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

COMPONENTS = 6
RADII = (1.0, 0.55)
"""Distances of the components from the middle of the mixture, alternately."""


@dataclass(frozen=True)
class Drift:
    """The mixture at a phase; a phase of 1 is one round, after which everything is where it began.

    The middle goes a quarter of the way round the origin, jumps to the other side at phase 1/2, and goes on for another
    quarter; meanwhile the mixture turns once about its middle.

    Args:
        distance: of the middle from the origin, at least 0. At 0 the mixture stays and only turns.
        spread: standard deviation of a component, above 0.
    """

    distance: float = 2.0
    spread: float = 0.3
    jump_at: float = field(default=0.5, init=False)

    def middle(self, phase: float) -> torch.Tensor:
        """(2,), float32."""
        turns, rest = divmod(phase, 1.0)
        angle = math.pi * (2 * turns + rest + (rest >= self.jump_at))
        return self.distance * torch.tensor([math.cos(angle), math.sin(angle)])

    def centers(self, phase: float) -> torch.Tensor:
        """(G, 2), float32."""
        angle_G = 2 * math.pi * (torch.arange(COMPONENTS) / COMPONENTS + phase)
        radius_G = torch.tensor(RADII).repeat(COMPONENTS // len(RADII))
        return self.middle(phase) + torch.stack([radius_G * angle_G.cos(), radius_G * angle_G.sin()], 1)

    def features(self, phase: float, count: int, generator: torch.Generator) -> torch.Tensor:
        """(N, 2), float32, every component equally likely; drawn from the generator."""
        component_N = torch.randint(COMPONENTS, (count,), generator=generator)
        return self.centers(phase)[component_N] + self.spread * torch.randn(count, 2, generator=generator)
