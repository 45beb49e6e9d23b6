"""The figures of the explorer, each of up to four runs in one theme; a panel without data says in words what is not
there yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from experiments.explorer.figures.codebooks import draw_codebook, draw_images, draw_map
from experiments.explorer.figures.curves import draw_assignment, draw_geometry, draw_losses, draw_overview
from experiments.explorer.figures.parts import legend, new_figure, say
from experiments.explorer.view import View
from experiments.report.figures.theme import theme

FIGURES: dict[str, Callable[[Figure, Sequence[View]], None]] = {
    "overview": draw_overview,
    "losses": draw_losses,
    "codebook": draw_codebook,
    "geometry": draw_geometry,
    "assignment": draw_assignment,
    "map": draw_map,
    "images": draw_images,
}


def draw(name: str, views: Sequence[View], size: tuple[float, float] = (9.4, 5.4)) -> Figure:
    """One figure by name.

    Args:
        name: one of `experiments.explorer.tabs.TABS`.
        views: up to four runs, each with a slot of its own.
        size: width and height in inches.
    """
    theme()
    figure = new_figure(size)
    if not views:
        say(figure.add_subplot(), "No run is shown yet. Choose settings and press Train, or load a run of the study.")
        return figure
    FIGURES[name](figure, views)
    legend(figure, views, interventions=name not in ("codebook", "map", "images"))
    return figure
