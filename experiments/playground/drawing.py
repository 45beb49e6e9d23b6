"""The board: a panel for each method and the codes in use over time below, drawn once and then only updated.

Suffixes: K codes, N features, D = 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from scipy.spatial import ConvexHull

from experiments.playground.simulation import CODES, METHODS, Observation, Playground
from experiments.report.figures.theme import COLORS, LINE_COLORS, theme
from ibq.metrics.codebook import ADAM_EPS

LIMIT = 3.9
"""Half the width of a panel, around the origin."""
FEATURES_DRAWN = 192
DECADES = 4
SHORTEST, LONGEST = 0.22, 0.75
"""Of an arrow, in the plane's units: of one that is 10^-4 of the panel's largest or less, and of the largest."""
DPI = 100
UNUSED = COLORS[3]
ARROWS = colormaps["viridis_r"]
DOT_PRODUCT = [
    label
    for label, fields in METHODS.items()
    if fields["method"] in ("ibq", "gumbel") and fields.get("similarity") != "cosine"
]
STYLES = ("-", "--", "-.", ":")


class Board:
    """A figure of one playground; `update` shows how it stands, `image` and `png` give pixels.

    Args:
        playground: what is drawn. It has not been advanced yet, or what has happened before is left out of the curves.
        columns: panels side by side.
        panel: width of a panel in pixels, which is also about its height.
        arrows: whether the pulls are drawn.
    """

    def __init__(self, playground: Playground, columns: int, panel: int = 300, arrows: bool = True) -> None:
        theme()
        self.playground = playground
        self.arrows = arrows
        labels = [learner.label for learner in playground.learners]
        columns = min(columns, len(labels))
        rows = -(-len(labels) // columns)
        width, title, curves, legend = columns * panel, 38, 150, 70
        height = rows * (panel - 24 + title) + curves + legend
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.figure.set_layout_engine("none")
        self._canvas = FigureCanvasAgg(self.figure)
        self._panels = {}
        for i, label in enumerate(labels):
            left, top = (i % columns) * panel + 6, (i // columns) * (panel - 24 + title) + title
            axes = self.figure.add_axes(_box(left, top, panel - 12, panel - 30, width, height))
            axes.set(
                xlim=(-LIMIT, LIMIT), ylim=(-LIMIT * (panel - 30) / (panel - 12), LIMIT * (panel - 30) / (panel - 12))
            )
            self._panels[label] = _Panel(axes, label, i, unit_inches=(panel - 12) / DPI / (2 * LIMIT))
        axes = self.figure.add_axes(_box(46, height - legend - curves + 14, width - 58, curves - 48, width, height))
        self._curves = _Curves(axes, labels)
        _legend(self.figure, legend / height, columns)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self.figure.bbox)

    def update(self, observations: Mapping[str, Observation]) -> None:
        """Move every artist to where the playground stands, and the curves on."""
        self.redraw(observations)
        self.add(observations)

    def add(self, observations: Mapping[str, Observation]) -> None:
        """The curves alone."""
        self._curves.update(self.playground.steps, {label: seen.in_use for label, seen in observations.items()})

    def redraw(self, observations: Mapping[str, Observation]) -> None:
        """The panels alone, after `arrows` was set."""
        probe_ND = self.playground.probe()[:FEATURES_DRAWN].numpy()
        for label, observation in observations.items():
            self._panels[label].update(probe_ND, observation, self.arrows)

    def image(self) -> np.ndarray:
        """(height, width, 3), uint8. What never changes is copied, and only the artists that move are drawn."""
        if self._curves.rescale():
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(self.figure.bbox)
        self._canvas.restore_region(self._background)
        for panel in self._panels.values():
            panel.draw()
        self._curves.draw()
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()

    def png(self) -> bytes:
        """The image as a PNG file, packed quickly rather than small."""
        file = BytesIO()
        Image.fromarray(self.image()).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def palette(self) -> Image.Image:
        """At most 256 colours for all images of this board: those that it draws with, each also paler as the edges of
        marks have it."""
        drawn = [*(LINE_COLORS[i % len(LINE_COLORS)] for i in range(len(self._panels))), COLORS[0], UNUSED]
        drawn += [ARROWS(i / 11)[:3] for i in range(12)]
        colors = [(gray, gray, gray) for gray in np.linspace(0.1, 1, 8)]
        colors += [tuple(1 - share * (1 - np.array(color))) for color in drawn for share in (1.0, 0.5)]
        image = Image.new("P", (1, 1))
        image.putpalette((np.array(colors) * 255).round().astype(np.uint8).tobytes())
        return image


class _Part:
    """Axes, and the artists in them that move."""

    axes: Axes
    artists: Sequence[Artist]

    def draw(self) -> None:
        for artist in self.artists:
            self.axes.draw_artist(artist)


class _Panel(_Part):
    """One method: features, codes in use and not, arrows, and its numbers."""

    def __init__(self, axes: Axes, label: str, position: int, unit_inches: float) -> None:
        self.axes = axes
        self._hull: Line2D | None = None
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set(visible=True, color="0.8", linewidth=0.8)
        color = LINE_COLORS[position % len(LINE_COLORS)]
        axes.text(0.0, 1.06, label, transform=axes.transAxes, fontsize=9.5, fontweight="bold", va="bottom", color=color)
        moving: dict[str, Any] = {"animated": True}
        self._features = axes.scatter([], [], s=5, color="0.78", linewidths=0, **moving)
        if label in DOT_PRODUCT:
            (self._hull,) = axes.plot([], [], color="0.45", lw=0.8, ls=(0, (4, 3)), **moving)
        self._restarted = axes.scatter([], [], s=55, facecolors="none", edgecolors=COLORS[0], linewidths=1.2, **moving)
        self._unused = axes.scatter([], [], s=17, color=UNUSED, marker="x", linewidths=1.0, **moving)
        zeros_K = np.zeros(CODES)
        self._arrows = axes.quiver(
            zeros_K, zeros_K, zeros_K, zeros_K, zeros_K, cmap=ARROWS, norm=Normalize(-DECADES, 0), angles="uv",
            units="inches",
            scale_units="inches", scale=1 / unit_inches, width=0.016, headwidth=3.6, headlength=4.2,
            headaxislength=3.8, **moving,
        )  # fmt: skip
        self._used = axes.scatter([], [], s=15, color="0.1", linewidths=0, **moving)
        text: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom", "animated": True}
        self._in_use = axes.text(1.0, 1.06, "", ha="right", fontsize=9, color="0.1", **text)
        self._numbers = axes.text(0.0, 1.01, "", fontsize=8, color="0.3", **text)
        texts = (self._in_use, self._numbers)
        self.artists = [
            artist
            for artist in (self._features, self._hull, self._unused, self._arrows, self._used, self._restarted, *texts)
            if artist is not None
        ]

    def update(self, probe_ND: np.ndarray, seen: Observation, arrows: bool) -> None:
        codes_KD, used_K = seen.codes_KD.numpy(), (seen.counts_K > 0).numpy()
        self._features.set_offsets(probe_ND)
        self._used.set_offsets(codes_KD[used_K])
        self._unused.set_offsets(codes_KD[~used_K])
        self._restarted.set_offsets(codes_KD[seen.restarted_K.numpy()])
        if self._hull is not None:
            self._hull.set_data(*convex_hull(codes_KD).T)
        direction_KD, exponent_K = arrow_shapes(seen.pull_KD)
        hidden_K = np.isnan(exponent_K) | (not arrows)
        masked_KD = np.ma.array(direction_KD, mask=np.repeat(hidden_K[:, None], 2, 1))
        self._arrows.set_offsets(codes_KD)
        self._arrows.set_UVC(masked_KD[:, 0], masked_KD[:, 1], np.ma.array(exponent_K, mask=hidden_K))
        self._in_use.set_text(f"{seen.in_use} of {CODES} in use")
        self._numbers.set_text(
            f"perplexity {seen.perplexity:.1f} · pulled {seen.pulled}, reach {seen.reach:.0f} · error {seen.error:.3f}"
        )


class _Curves(_Part):
    """Codes in use against steps, a line a method."""

    def __init__(self, axes: Axes, labels: Sequence[str]) -> None:
        self.axes = axes
        self._steps: list[int] = []
        self._in_use: dict[str, list[int]] = {label: [] for label in labels}
        self._lines = {
            label: axes.plot(
                [],
                [],
                color=LINE_COLORS[i % len(LINE_COLORS)],
                ls=STYLES[i % len(STYLES)],
                lw=1.5,
                label=label,
                animated=True,
            )[0]
            for i, label in enumerate(labels)
        }
        self._end = 500
        axes.set(xlim=(0, self._end), ylim=(0, CODES + 1), yticks=[0, 16, 32, 48, 64])
        axes.tick_params(labelsize=7.5, pad=1)
        axes.set_xlabel("steps", fontsize=8, labelpad=0)
        axes.set_ylabel("codes in use", fontsize=8)
        lines = self._lines.items()
        axes.figure.legend(
            handles=[Line2D([], [], color=line.get_color(), ls=line.get_linestyle(), lw=1.5, label=label) for label,
            line in lines],
            loc="lower center", bbox_to_anchor=(0.5, 1.0), bbox_transform=axes.transAxes, ncols=len(labels),
            frameon=False, fontsize=8,
            handlelength=2.6, columnspacing=1.4, borderaxespad=0.1,
        )  # fmt: skip
        self.artists = list(self._lines.values())

    def update(self, steps: int, in_use: Mapping[str, int]) -> None:
        self._steps.append(steps)
        for label, count in in_use.items():
            self._in_use[label].append(count)
            self._lines[label].set_data(self._steps, self._in_use[label])

    def rescale(self) -> bool:
        """A longer axis where the curves have outgrown it; True if so."""
        if not self._steps or self._steps[-1] <= self._end:
            return False
        self._end *= 2
        self.axes.set_xlim(0, self._end)
        return True


def arrow_shapes(pull_KD: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Arrows (K, 2) in the plane's units and log10 (K,) of their size relative to the largest, in [-4, 0].

    Directions are those of the pull, lengths go with the logarithm of its size. Where the pull is below Adam's eps, so
    that the code hardly moves, the second is not a number.
    """
    norm_K = pull_KD.double().norm(dim=1)
    largest = float(norm_K.max())
    exponent_K = torch.where(
        norm_K / 2**0.5 > ADAM_EPS, (norm_K / (largest or 1.0)).log10().clamp_min(-DECADES), float("nan")
    )
    length_K = SHORTEST + (LONGEST - SHORTEST) * (1 + exponent_K / DECADES)
    direction_KD = pull_KD.double() / norm_K.clamp_min(1e-300)[:, None] * length_K.nan_to_num(0.0)[:, None]
    return direction_KD.numpy(), exponent_K.numpy()


def convex_hull(points_KD: np.ndarray) -> np.ndarray:
    """Corners of the convex hull of at least three points, the first one again at the end."""
    corners = ConvexHull(points_KD, qhull_options="QJ").vertices  # joggled, as points on one line have no hull
    return points_KD[[*corners, corners[0]]].astype(np.float64)


def _box(
    left: float, top: float, box_width: float, box_height: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """A rectangle in pixels from the top left corner as matplotlib's fractions from the bottom left."""
    return left / width, 1 - (top + box_height) / height, box_width / width, box_height / height


def _legend(figure: Figure, share: float, columns: int) -> None:
    """Legend of the marks, and the scale of the arrows."""
    handles = [
        Line2D([], [], ls="", marker="o", ms=3, color="0.7", label="features"),
        Line2D([], [], ls="", marker="o", ms=4.5, color="0.1", label="code in use"),
        Line2D([], [], ls="", marker="x", ms=5, color=UNUSED, label="code not in use"),
        Line2D([], [], ls="", marker="o", ms=8, markerfacecolor="none", color=COLORS[0], label="restarted just now"),
        Line2D([], [], lw=0.9, ls=(0, (4, 3)), color="0.45", label="convex hull: all that a dot product can choose"),
    ]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, share), ncols=5 if columns > 2 else 3,
        frameon=False, fontsize=8,
        handletextpad=0.4, columnspacing=1.4,
    )  # fmt: skip
    axes = figure.add_axes((0.56, share * 0.27, 0.2, share * 0.14))
    axes.imshow(np.linspace(-DECADES, 0, 128)[None], aspect="auto", cmap=ARROWS, extent=(-DECADES, 0, 0, 1))
    axes.set(yticks=[], xticks=range(-DECADES, 1), xticklabels=["≤10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"])
    axes.tick_params(labelsize=7, length=0, pad=1)
    axes.grid(False)
    figure.text(
        0.545,
        share * 0.34,
        "arrow: where the loss pulls a code; size, of the panel's largest:",
        fontsize=8,
        ha="right",
        va="center",
    )
