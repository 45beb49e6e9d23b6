"""Arms as points: coloured by method, with the shape and the filling of the factors that the ablation names for
them."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.ablations import Ablation
from experiments.report.figures.theme import MARKERS, method_colors


class Points:
    """Style of the points of the arms in rows, and the legend of it."""

    def __init__(self, ablation: Ablation, rows: pd.DataFrame) -> None:
        self._ablation, self._colors = ablation, method_colors(ablation)
        self._method = ablation.factors[0].name
        self._present = [ablation.arm(name).levels for name in rows["arm"].unique()]
        self._shapes = self._levels_of(ablation.marker) if ablation.marker else []
        self._fills = self._levels_of(ablation.fill)[::-1] if ablation.fill else []

    def style(self, arm: str) -> dict[str, Any]:
        """Colour, marker and face of an arm's points, as a Line2D takes them."""
        levels = self._ablation.arm(arm).levels
        color = self._colors[levels[self._method]]
        marker = MARKERS[self._shapes.index(levels[self._ablation.marker])] if self._ablation.marker else "o"
        filled = not self._ablation.fill or self._is_filled(levels[self._ablation.fill])
        return {"color": color, "marker": marker, "mfc": color if filled else "white", "mew": 1.2}

    def draw(self, axis: Axes, arm: str, x: float, y: float, beside: tuple[float, float] = (5, 3)) -> None:
        """A point with the arm's letter beside it."""
        axis.plot([x], [y], ls="", ms=5.8, zorder=3, **self.style(arm))
        axis.annotate(self._ablation.letter(arm), (x, y), xytext=beside, textcoords="offset points", fontsize=7.5)

    def handles(self) -> list[Line2D]:
        """Of a legend: methods, shapes and fillings that are there."""
        style: dict[str, Any] = {"ls": "", "mew": 1.2, "ms": 6}
        handles = [
            Line2D([], [], marker="o", color=self._colors[name], label=name, **style)
            for name in self._levels_of(self._method)
        ]
        for marker, name in zip(MARKERS, self._shapes, strict=False):
            handles.append(Line2D([], [], marker=marker, color="0.4", label=f"{self._ablation.marker} {name}", **style))
        for name in self._fills:
            face = "0.4" if self._is_filled(name) else "white"
            handles.append(
                Line2D([], [], marker="o", color="0.4", mfc=face, label=f"{self._ablation.fill} {name}", **style)
            )
        return handles

    def _is_filled(self, level: str) -> bool:
        return bool(self._ablation.fill) and level == self._ablation.factor(str(self._ablation.fill)).levels[-1]

    def _levels_of(self, factor: str) -> list[str]:
        """The levels of a factor that arms have, in its order."""
        there = {levels[factor] for levels in self._present}
        return [level for level in self._ablation.factor(factor).levels if level in there]
