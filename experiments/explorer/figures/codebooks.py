"""The newest moment of each run: its codes by use and norm, codes among features, reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.analysis.projections import Projection, reduce
from experiments.explorer.figures.parts import REFERENCE, color, say
from experiments.explorer.view import View
from experiments.report.figures.codebooks import draw_map as draw_projection
from experiments.report.figures.codebooks import draw_strip, map_legend, ranks, uniform_ranks
from experiments.report.figures.theme import MARKERS

WAITING = "Nothing yet: the first moment is still to come."
PICTURES = 8


def draw_codebook(figure: Figure, views: Sequence[View]) -> None:
    frequency, norms = figure.subplots(1, 2)
    counted = [view for view in views if "counts" in view.tensors and view.tensors["counts"].any()]
    for view in counted:
        positions, shares = ranks(view.tensors["counts"])
        label = f"{view.letter}: {len(positions):,} of {view.codebook_size:,} codes, step {view.tensors_step}"
        marker = {"marker": MARKERS[view.slot], "ms": 5, "markevery": [len(positions) - 1]}
        frequency.plot(positions, shares, color=color(view), lw=1.6, label=label, **marker)
    for tokens, K in {(int(view.tensors["counts"].sum()), view.codebook_size) for view in counted}:
        frequency.plot(*uniform_ranks(tokens, K), color=REFERENCE, ls="--", lw=1)
    if counted:
        frequency.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="share of tokens")
        frequency.legend(loc="lower left", framealpha=1)
    else:
        say(frequency, "Nothing is counted yet: the first tokens are still to come.")
    frequency.set_title("How often codes are chosen", loc="left", fontweight="bold")
    measured = [view for view in views if "code_norms" in view.tensors]
    for view in measured:
        norms_K = view.tensors["code_norms"].sort(descending=True).values.numpy()
        marker = {"marker": MARKERS[view.slot], "ms": 5, "markevery": [0]}
        norms.plot(100 * np.arange(1, len(norms_K) + 1) / len(norms_K), norms_K, color=color(view), lw=1.6, **marker)
    if measured:
        norms.set(xlabel="codes, % of K, largest first", ylabel="norm of the code", xlim=(0, 100))
        if all(bool((view.tensors["code_norms"] > 0).all()) for view in measured):
            norms.set_yscale("log")
    else:
        say(norms, WAITING)
    norms.set_title("Norms of the codes", loc="left", fontweight="bold")


def draw_map(figure: Figure, views: Sequence[View]) -> None:
    """A column a run: principal components, and UMAP below where some run has it."""
    rows = 2 if any(view.projection for view in views) else 1
    axes = figure.subplots(rows, len(views), squeeze=False)
    for column, view in enumerate(views):
        _draw_codes(axes[0, column], view, _principal(view), WAITING)
        if rows == 2:
            _draw_codes(
                axes[1, column],
                view,
                view.projection,
                "No UMAP of this run yet: press UMAP, which projects all runs shown.",
            )
    map_legend(figure)


def _principal(view: View) -> Projection | None:
    if not {"codes", "features", "counts", "code_indices"} <= view.tensors.keys():
        return None
    codes_kD, features_ND = view.tensors["codes"].float(), view.tensors["features"].float()
    points = torch.cat([codes_kD, features_ND])
    if not points.isfinite().all():
        return None
    xy = reduce(points.numpy(), "pca")
    used_k = (view.tensors["counts"][view.tensors["code_indices"]] > 0).numpy()
    return Projection("pca", view.tensors_step, xy[: len(codes_kD)], xy[len(codes_kD) :], used_k)


def _draw_codes(axis: Axes, view: View, projection: Projection | None, absent: str) -> None:
    if projection is None:
        axis.set_title(f"{view.letter}", loc="left", color=color(view), fontweight="bold")
        say(axis, absent)
        return
    draw_projection(axis, projection, size=10)
    method = "PCA" if projection.method == "pca" else "UMAP"
    axis.set_title(f"{view.letter}  {method}, step {projection.step}", loc="left", color=color(view), fontweight="bold")
    for spine in axis.spines.values():
        spine.set_color(color(view))


def draw_images(figure: Figure, views: Sequence[View]) -> None:
    """A row a run, below its originals where those are not the row's above."""
    strips: list[tuple[str, Any, torch.Tensor | None]] = []
    shown: torch.Tensor | None = None
    for view in views:
        originals = view.pictures.get("images_BCHW")
        if originals is not None and (
            shown is None or originals.shape != shown.shape or not bool((originals == shown).all())
        ):
            strips.append(("original", "0.2", originals))
            shown = originals
        strips.append(
            (f"{view.letter}  step {view.tensors_step}", color(view), view.pictures.get("reconstructions_BCHW"))
        )
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (name, its_color, images_BCHW) in zip(axes, strips, strict=True):
        if images_BCHW is None:
            say(axis, "No reconstruction yet.")
        else:
            draw_strip(axis, images_BCHW[:PICTURES])
            axis.set_axis_off()
        axis.set_title(name, loc="left", color=its_color, fontweight="bold")
