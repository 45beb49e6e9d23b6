"""The number of codes: VQ, the VQ of notebook 01 that reconstructs best, and IBQ as released with 64 times as many.

Paper: Table 4, IBQ with 1,024, 8,192, 16,384 and 262,144 codes of dimension 256: rFID 2.24, 1.87, 1.37, 1.00 at 99, 98,
96, 84% usage. Of VQGAN Table 1 has 44% usage of 1,024 codes and 5.9% of 16,384, at rFID 7.94 and 4.98 (the recipes
differ).
Cost: 12 runs at quick, 3 of them also runs of vq_vs_ibq, those with 4,096 codes three times as long as those with
1,024; about 5 minutes on
2 cores.  Command: python -m experiments run codebook_size

Sizes are multiples of the preset's K: at quick 64 to 4,096 codes, at gpu the paper's 1,024 to 262,144. Batch, steps,
learning rate and the temperature of the entropy penalty do not follow K, as in the paper; the tokens of a batch bound
the entropy of their mean assignment.
"""

from __future__ import annotations

from fractions import Fraction

from experiments.ablations import vq_vs_ibq
from experiments.ablations.base import EFFECTIVE_DIMENSIONS, Ablation, Arm, Axis, Contrast, Factor, PaperRow
from experiments.ablations.changes import CODEBOOK_SIZE, Times

SIZES = {
    "sixteenth": ("×1/16", Fraction(1, 16)),
    "quarter": ("×1/4", Fraction(1, 4)),
    "base": ("×1", Fraction(1)),
    "fourfold": ("×4", Fraction(4)),
    "sixteenfold": ("×16", Fraction(16)),
}
"""Label and multiple of the factor K by what arms are called."""
LABELS = tuple(label for label, _ in SIZES.values())

METHODS = {
    "VQ": vq_vs_ibq.ABLATION.arm("vq_published").changes,
    "VQ, features": vq_vs_ibq.ABLATION.arm("vq_features").changes,
    "IBQ": vq_vs_ibq.ABLATION.arm("ibq_published").changes,
}
"""Changes by method, those of arms of vq_vs_ibq, so that the arms at the preset's K share its runs."""

AXIS = Axis("K", "codebook_size", "codebook size K")


def times(size: str) -> dict[str, Times]:
    """The change of K that a size is."""
    return {CODEBOOK_SIZE: Times(SIZES[size][1])}


def arm(prefix: str, method: str, size: str) -> Arm:
    levels = {"method": method, "K": SIZES[size][0]}
    return Arm(f"{prefix}_{size}", levels, {**METHODS[method], **times(size)}, focal=size in ("sixteenth", "fourfold"))


PREFIXES = {"vq": "VQ", "vq_features": "VQ, features", "ibq": "IBQ"}

ABLATION = Ablation(
    name="codebook_size",
    title="Codebook size",
    notebook="03_codebook_size",
    question="Do more codes mean better reconstructions, and does the codebook stay in use as it grows?",
    factors=(
        Factor(
            "method",
            tuple(METHODS),
            "of notebook 01: vq_published, vq_features (codes that begin as features, 0.25 on the commitment term; of "
            "its VQs the one with the lowest L1 and FID[fashion-cnn] in every seed) and ibq_published",
        ),
        Factor("K", LABELS, "number of codes, as a multiple of the preset's"),
    ),
    arms=tuple(arm(prefix, method, size) for prefix, method in PREFIXES.items() for size in SIZES),
    contrasts=(
        Contrast(
            "IBQ: quality",
            "ibq_sixteenth",
            "ibq_fourfold",
            "IBQ reconstructs better with 64 times as many codes, by at least 0.003 of L1.",
            "l1",
            -0.003,
            paper="Table 4: rFID 2.24 with 1,024 codes, 1.00 with 262,144",
        ),
        Contrast(
            "IBQ: quality in distribution",
            "ibq_sixteenth",
            "ibq_fourfold",
            "IBQ's FID[fashion-cnn] is at least 10% lower with 64 times as many codes.",
            "fid",
            -0.152,
            paper="Table 4: rFID 2.24 with 1,024 codes, 1.00 with 262,144",
        ),
        Contrast(
            "IBQ: usage kept",
            "ibq_sixteenth",
            "ibq_fourfold",
            "With 64 times as many codes the share of them that IBQ uses falls by less than 20 points.",
            "usage",
            -20,
            paper="Table 4: usage 99% of 1,024 codes, 84% of 262,144",
            keeps=True,
        ),
        Contrast(
            "IBQ against VQ: usage",
            "vq_fourfold",
            "ibq_fourfold",
            "With four times the preset's codes IBQ uses at least 50 points more of them than VQ.",
            "usage",
            50,
            paper="Tables 1 and 4: with 16,384 codes IBQ uses 96%, VQGAN 5.9%",
        ),
        Contrast(
            "VQ: usage",
            "vq_sixteenth",
            "vq_fourfold",
            "The share of its codes that VQ uses falls by at least 10 points with 64 times as many.",
            "usage",
            -10,
            paper="Table 1: VQGAN uses 44% of 1,024 codes, 5.9% of 16,384",
        ),
        Contrast(
            "VQ, features: quality",
            "vq_features_fourfold",
            "ibq_fourfold",
            "With four times the preset's codes IBQ reconstructs better than the VQ of best quality, by at least 0.003 "
            "of L1.",
            "l1",
            -0.003,
        ),
    ),
    axis=AXIS,
    marker="K",
    figures=(
        "scaling",
        "usage_over_training",
        "dimension_over_training",
        "rate_distortion",
        "logits_over_training",
        "gap_over_training",
        "reconstructions",
    ),
    tables=("arms", "verdicts", "paper"),
    columns=(
        "codebook_size",
        "perplexity",
        "usage",
        *EFFECTIVE_DIMENSIONS,
        "bits",
        "l1",
        "psnr_db",
        "ssim",
        "fid",
        "quantization_error",
        "gap",
        "step_ms",
    ),
    paper_source="Tables 1 and 4 (ImageNet 256x256, 50k validation images, D = 256)",
    paper_rows=(
        PaperRow("VQGAN, K = 1,024", {"rFID": 7.94, "usage %": 44.0}, "vq_sixteenth"),
        PaperRow("VQGAN, K = 16,384", {"rFID": 4.98, "usage %": 5.9}, "vq_base"),
        PaperRow("IBQ, K = 1,024", {"rFID": 2.24, "usage %": 99.0}, "ibq_sixteenth"),
        PaperRow("IBQ, K = 8,192", {"rFID": 1.87, "usage %": 98.0}, "ibq_quarter"),
        PaperRow("IBQ, K = 16,384", {"rFID": 1.37, "usage %": 96.0}, "ibq_base"),
        PaperRow("IBQ, K = 262,144", {"rFID": 1.00, "usage %": 84.0}, "ibq_fourfold"),
    ),
)
