"""The figures of the explorer by name: what stands on their tabs and below them. Nothing is drawn here: the interface
reads it."""

from __future__ import annotations

from typing import NamedTuple


class Tab(NamedTuple):
    title: str
    caption: str


TABS = {
    "overview": Tab(
        "Overview",
        "Dashed in the first two: what uniform sampling of as many tokens gives. Effective dimension: how many of D "
        "dimensions are spanned (exponential of the entropy of the covariance's eigenvalues; d_99: the fewest that "
        "hold 99% of the variance). Reconstruction error: on training batches. Gap: Fréchet distance between codes and "
        "features over the variance of the features (1: a single point).",
    ),
    "losses": Tab(
        "Losses",
        "Every term of the loss as it is (solid) and as it counts with its weight (dashed), at single training steps.",
    ),
    "codebook": Tab(
        "Codebook",
        "Share of the newest tokens by rank of the code (dashed: uniform sampling of as many), and the norms of all "
        "codes, sorted.",
    ),
    "geometry": Tab(
        "Geometry",
        "Mean norms; effective dimension of all codes and of the features; squared distance of a feature to its code "
        "over the variance of features; the gap for all codes, for those in use, and for the others.",
    ),
    "assignment": Tab(
        "Assignment",
        "How decisive assignments are (means over tokens), how many codes the gradient reaches (exponential of the "
        "entropy of its norms), "
        "and how hard the entropy term pulls at the features, against all other terms.",
    ),
    "map": Tab(
        "Map",
        "Features (grey) and at most 1,024 codes in one projection a panel, so that positions compare within a panel "
        "alone. Above: the "
        "first two principal components at the newest moment; below, on demand: UMAP.",
    ),
    "images": Tab("Images", "The first test images, and what each run makes of them at its newest moment."),
}
