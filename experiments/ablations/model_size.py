"""The size of encoder and decoder: more ResBlocks a level, under VQ and under IBQ.

Paper: Table 6, more ResBlocks, better rFID (numbers not reported here); in Table 2 "+ deeper model" is the last step,
    to rFID 1.37.
Cost: 9 runs, 3 of them also runs of vq_vs_ibq; four times the ResBlocks take about three times as long, at quick 5
    minutes on 2 cores.
Command: python -m experiments run model_size
"""

from __future__ import annotations

from experiments.ablations import codebook_size as sizes
from experiments.ablations.base import EFFECTIVE_DIMENSIONS, Ablation, Arm, Axis, Contrast, Factor, PaperRow
from experiments.ablations.changes import Times

DEPTHS = {"base": ("×1", 1), "twofold": ("×2", 2), "fourfold": ("×4", 4)}
"""Label and multiple of the ResBlocks by what arms are called."""


ABLATION = Ablation(
    name="model_size",
    title="Model size",
    notebook="06_model_size",
    question="Do deeper encoders and decoders reconstruct better, and do they keep or lose the codebook?",
    factors=(
        Factor("method", tuple(sizes.METHODS), "vq_published, vq_features and ibq_published of notebook 01"),
        Factor(
            "ResBlocks",
            tuple(label for label, _ in DEPTHS.values()),
            "ResBlocks a level of the encoder, as a multiple of the preset's (1 at quick)",
        ),
    ),
    arms=tuple(
        Arm(
            f"{prefix}_{depth}",
            {"method": method, "ResBlocks": label},
            {**sizes.METHODS[method], "model.res_blocks": Times(multiple)},
            focal=depth != "twofold",
        )
        for prefix, method in sizes.PREFIXES.items()
        for depth, (label, multiple) in DEPTHS.items()
    ),
    contrasts=(
        Contrast(
            "IBQ: quality",
            "ibq_base",
            "ibq_fourfold",
            "IBQ reconstructs better with four times the ResBlocks, by at least 0.003 of L1.",
            "l1",
            -0.003,
            paper="Table 6: more ResBlocks, better rFID",
        ),
        Contrast(
            "IBQ: quality in distribution",
            "ibq_base",
            "ibq_fourfold",
            "IBQ's FID[fashion-cnn] is at least 10% lower with four times the ResBlocks.",
            "fid",
            -0.152,
            paper="Table 2: + deeper model, rFID 1.37",
        ),
        Contrast(
            "IBQ: rate",
            "ibq_base",
            "ibq_fourfold",
            "IBQ's rate rises by at least a quarter of a bit a token with four times the ResBlocks.",
            "bits",
            0.25,
        ),
    ),
    axis=Axis("ResBlocks", "config.model.res_blocks", "ResBlocks a level"),
    marker="ResBlocks",
    figures=(
        "scaling",
        "usage_over_training",
        "dimension_over_training",
        "rate_distortion",
        "logits_over_training",
        "reconstructions",
    ),
    tables=("arms", "verdicts", "paper"),
    columns=(
        "parameters",
        "perplexity",
        "usage",
        *EFFECTIVE_DIMENSIONS,
        "bits",
        "l1",
        "psnr_db",
        "ssim",
        "fid",
        "step_ms",
        "peak_memory",
    ),
    paper_source="Table 2 (ImageNet 256x256, 50k validation images); of Table 6 no number is known here",
    paper_rows=(
        PaperRow("before the deeper model", {}, "ibq_base"),
        PaperRow("+ deeper model", {"rFID": 1.37}, "ibq_fourfold"),
    ),
)
