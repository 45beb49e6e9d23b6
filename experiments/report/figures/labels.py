"""Small texts beside points that keep out of each other's way."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

OFFSETS = ((5, 2), (5, -10), (-4, 2), (-4, -10), (5, 11), (5, -19), (-4, 11), (-4, -19))
"""Places of a text, in points from what it is of, in the order in which places are tried; to the left it ends
there."""
WIDTH, HEIGHT = 0.66, 1.15
"""Of a character, in its font size."""


class Labels:
    """Texts of one panel; those put first have the first choice, so put first what matters most. Limits and scales have
    to be final."""

    def __init__(self, axis: Axes, size: float) -> None:
        self._axis, self._size = axis, size
        axis.autoscale_view()  # which else waits for the drawing
        points = 72 / axis.figure.dpi
        self._extent = (
            axis.bbox.width * points,
            axis.bbox.height * points,
        )  # before the layout, which changes it little
        self._taken: list[tuple[float, float, float, float]] = []

    def put(self, text: str, x: float, y: float, must: bool = True) -> None:
        """A text beside a point, in the first place that is free; where none is, in the first, or nowhere unless it
        `must`."""
        at = self._axis.transAxes.inverted().transform(self._axis.transData.transform((x, y))) * self._extent
        boxes = {offset: self._box(text, at[0], at[1], offset) for offset in OFFSETS}
        free = [offset for offset, box in boxes.items() if not any(_overlap(box, other) for other in self._taken)]
        if not free and not must:
            return
        offset = free[0] if free else OFFSETS[0]
        self._taken.append(boxes[offset])
        side = "left" if offset[0] > 0 else "right"
        style: dict[str, Any] = {"fontsize": self._size, "ha": side, "va": "bottom", "zorder": 5}
        self._axis.annotate(text, (x, y), xytext=offset, textcoords="offset points", **style)

    def _box(self, text: str, x: float, y: float, offset: tuple[float, float]) -> tuple[float, float, float, float]:
        width, height = WIDTH * self._size * len(text), HEIGHT * self._size
        left = x + offset[0] - (width if offset[0] < 0 else 0)
        return left, y + offset[1], left + width, y + offset[1] + height


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
