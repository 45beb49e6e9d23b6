"""Figures of an ablation, in one theme, from rows and run directories alone; each is None while it has no data."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from experiments.ablations import Ablation
from experiments.report.figures.codebooks import code_frequency, code_map, map_over_training, reconstructions
from experiments.report.figures.collapse import collapse_axes, collapse_map, saturation
from experiments.report.figures.comparisons import (
    main_effects,
    rate_distortion,
    scaling,
    search,
    usage_against_dimension,
)
from experiments.report.figures.generation import bits_and_distortion, depth_scaling, guidance_sweep, samples
from experiments.report.figures.heat_map import heat_map
from experiments.report.figures.horizon import effect_over_steps
from experiments.report.figures.theme import COLORS, LINE_COLORS, theme
from experiments.report.figures.training import (
    dimension_of_each,
    dimension_over_training,
    discriminator_over_training,
    gap_over_training,
    geometry,
    gradient_reach,
    logits_over_training,
    loss_over_training,
    usage_of_each,
    usage_over_training,
)
from experiments.rows import of_arms
from experiments.study import Study
from ibq.metrics.dimension import IN_WORDS

__all__ = ["COLORS", "FIGURES", "LINE_COLORS", "caption", "compact", "draw", "plt", "save", "theme"]

FIGURES: dict[str, tuple[Callable[[Study, Ablation, pd.DataFrame], Figure | None], str]] = {
    "usage_over_training": (
        usage_over_training,
        "Codes used and perplexity over training, counted on the training tokens between two log steps (dashed: as "
        "many uniform tokens); a line a seed.",
    ),
    "search": (
        search,
        "The search before the comparison: reconstruction error on the training batches of the last third of each "
        "short run; rings mark what the arms were then trained with.",
    ),
    "usage_of_each": (
        usage_of_each,
        "Perplexity and codes used over training, a panel an arm, seed 0, counted on the training tokens between two "
        "log steps.",
    ),
    "dimension_over_training": (
        dimension_over_training,
        f"Effective dimension over training: {IN_WORDS}. Used: by a training token between two log steps, weighted "
        "by their tokens; all codes: all alike; features: of a step. At most D; a line a seed.",
    ),
    "dimension_of_each": (
        dimension_of_each,
        "Effective dimension of the codes in use and of the features over training, a panel an arm, seed 0: "
        f"{IN_WORDS}.",
    ),
    "effect_over_steps": (
        effect_over_steps,
        "Each claim at several lengths of training: mean paired difference over seeds with its 95% interval, a line a "
        "setting; dashed: the claimed change. Steps of the settings are drawn a little apart.",
    ),
    "main_effects": (
        main_effects,
        "Main effects. A point is a pair of arms that differ in the named factor alone, at one seed (letters: the "
        "arms); bars are means over pairs.",
    ),
    "usage_against_dimension": (
        usage_against_dimension,
        "Usage against effective dimension: perplexity and d_99 of the codes in use, means over seeds, bars from the "
        "least to the largest; dotted lines join arms that differ in the filling alone.",
    ),
    "rate_distortion": (
        rate_distortion,
        "Rate against distortion on the test split, every arm and seed; more codes in use need not mean a lower error.",
    ),
    "code_frequency": (
        code_frequency,
        "Share of the test split's tokens by rank of the code; codes without a token are counted in the legend.",
    ),
    "code_map": (
        code_map,
        "Codes (at most 1,024) and test features of each arm in one projection ({projection}) at the end of training, "
        "raw weights, seed 0; in use: by a training token since the snapshot before.",
    ),
    "scaling": (
        scaling,
        "Usage and quality on the test split against {axis}: a point a seed, lines through the means; averaged "
        "weights.",
    ),
    "map_over_training": (
        map_over_training,
        "Codes (at most 1,024) and test features over training, raw weights, seed 0. Every panel is a projection of "
        "its own ({projection}), so positions compare within a panel alone: whether codes lie among features or apart "
        "from them. In use: by a training token since the snapshot before; before the first step nothing is counted.",
    ),
    "gap_over_training": (
        gap_over_training,
        "Gap between features and codes: Fréchet distance of the two clouds over the variance of the features (0: the "
        "same cloud; 1: a single point at the features' mean), for all codes (at most 1,024), all of them and the "
        "features at unit length (a dot product hardly minds lengths), those in use by a training token since the "
        "snapshot before, and the others; raw weights, a line a seed. Where codes are drawn long, as from N(0, 1), few "
        "steps of Adam cannot bring them back: the gap is then that of the initialisation.",
    ),
    "logits_over_training": (
        logits_over_training,
        "How decisive assignments are: standard deviation of a token's logits over the codes, and the largest "
        "probability of its softmax at temperature 1 (dashed: 1/K), means over tokens of a step. Logits are those that "
        "the search goes by: z·c for IBQ, -|z - c|² elsewhere.",
    ),
    "geometry": (
        geometry,
        "Norms of codes and features, and how far apart they are: squared distance of a feature to its code over the "
        "variance of features, at single training steps.",
    ),
    "gradient_reach": (
        gradient_reach,
        "How many codes the gradient of the whole loss reaches at a step; 'non-zero' would say nothing of a softmax.",
    ),
    "discriminator_over_training": (
        discriminator_over_training,
        "The discriminator over training: mean logits that it gives to a step's training images and to their "
        "reconstructions, and the generator's term with its weight (nothing before the discriminator begins); a line a "
        "seed, arms with a discriminator.",
    ),
    "heat_map": (
        heat_map,
        "The grid: mean over seeds on the test split, one scale an outcome; brighter is more codes in use, or a lower "
        "error. Hatched or ×: no result, and why; n of m: seeds that have one.",
    ),
    "collapse_map": (
        collapse_map,
        "Where codebooks collapse over learning rate and code dimension, with the preset's number of codes: mean over "
        "seeds, test split, averaged weights, one scale an outcome; brighter is more codes in use, or a lower error.",
    ),
    "collapse_axes": (
        collapse_axes,
        "Along the other axes: perplexity and error against the number of codes, the tokens of a mean assignment of "
        "the entropy penalty, and the length of codes when training began (root of D times the factor). A line joins "
        "arms that differ in that alone.",
    ),
    "saturation": (
        saturation,
        "Does the softmax saturate? Perplexity on the test split against the standard deviation of a token's logits "
        "and the largest probability of its softmax at temperature 1, at the first and the last logged step; IBQ in "
        "all its arms. Letters: arms of the table of remedies.",
    ),
    "samples": (
        samples,
        "Generated images, seed 0: a row a class, the first samples of each, at the guidance where the arm's "
        "FID[fashion-cnn] is lowest.",
    ),
    "guidance_sweep": (
        guidance_sweep,
        "Guidance, which stands at the points: FID[fashion-cnn] against IS[fashion-cnn], and precision against recall "
        "in the same features; a line an arm and seed, a ring where its FID is lowest.",
    ),
    "bits_and_distortion": (
        bits_and_distortion,
        "Why bits alone compare nothing: bits that the transformer needs for an image of the test split, against the "
        "error of its "
        "tokenizer's reconstructions and against FID[fashion-cnn] of what it generates; a point an arm and seed.",
    ),
    "depth_scaling": (
        depth_scaling,
        "The size of the transformer: bits for an image of the test split, FID[fashion-cnn] and label agreement "
        "against its parameters; a point an arm and seed, lines through the means of arms that differ in depth alone.",
    ),
    "loss_over_training": (
        loss_over_training,
        "Cross-entropy of the training tokens over the transformer's training (dashed: tokens drawn uniformly); a line "
        "a seed. Arms compare only where they have the same tokenizer.",
    ),
    "reconstructions": (reconstructions, "Test images and their reconstructions, seed 0."),
}


def draw(name: str, study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """One figure by name, in the theme."""
    theme()
    return FIGURES[name][0](study, ablation, of_arms(rows[rows["ablation"] == ablation.name]))


def caption(name: str, study: Study, ablation: Ablation) -> str:
    method = "UMAP, 15 neighbours, fixed random state" if study.preset.projection == "umap" else "PCA"
    return FIGURES[name][1].format(projection=method, axis=ablation.axis.label if ablation.axis else "")


def save(figure: Figure, folder: Path, name: str) -> None:
    """PNG and PDF (embedded fonts, no dates: equal figures are equal files)."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    (folder / f"{name}.png").write_bytes(compact(picture.getvalue()))
    figure.set_layout_engine("none")  # as it was laid out for the PNG
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    plt.close(figure)


def compact(png: bytes) -> bytes:
    """The picture in 256 colours, a third of the size, where no eye sees the difference: a mean error of half a level
    or less."""
    picture = Image.open(BytesIO(png)).convert("RGB")
    reduced, smaller = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE), BytesIO()
    reduced.save(smaller, "png", optimize=True)
    error = np.abs(np.asarray(reduced.convert("RGB"), dtype=int) - np.asarray(picture, dtype=int)).mean()
    return smaller.getvalue() if error <= 0.5 and len(smaller.getvalue()) < len(png) else png
