"""The dimension of a code: where VQ and cosine VQ lose their codebook, and whether IBQ gains by it.

Paper: code dimension under IBQ, "usage rises markedly with D and rFID improves" (numbers not reported). Table 1 has
LlamaGen (cosine VQ, K = 16,384): 97% usage and rFID 2.19 at D = 8, 0.29% and 9.21 at D = 256. Users of IBQ say that
outside its recipe usage drops to 0% at D = 256 and not at D = 32 (SEED-Voken #59), which the arms without entropy
penalty look into.
Cost: 16 runs at quick, 3 of them also runs of vq_vs_ibq; about 6 minutes on 2 cores.
Command: python -m experiments run code_dimension

Encoder and decoder keep their width, so above the preset's z_channels (32 at quick) the features are a linear map of
fewer channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.ablations import recipe_parts, vq_vs_ibq
from experiments.ablations.base import EFFECTIVE_DIMENSIONS, Ablation, Arm, Axis, Contrast, Factor, PaperRow
from experiments.ablations.changes import of_quantizer

DIMENSIONS = (8, 32, 64, 256)
VQ = vq_vs_ibq.ABLATION.arm("vq_published").changes
METHODS: dict[str, Mapping[str, Any]] = {
    "VQ": VQ,
    "cosine VQ": {**VQ, **of_quantizer({"distance": "cosine", "codebook_init": "normal", "beta_on": "commitment"})},
    "IBQ": vq_vs_ibq.ABLATION.arm("ibq_published").changes,
    "IBQ without entropy": recipe_parts.ABLATION.arm("ibq_no_entropy").changes,
}
"""Changes by method; three are those of arms of recipe_parts, so that they share its runs at the preset's D."""

PREFIXES = {"vq": "VQ", "cosine": "cosine VQ", "ibq": "IBQ", "ibq_no_entropy": "IBQ without entropy"}


ABLATION = Ablation(
    name="code_dimension",
    title="Code dimension",
    notebook="04_code_dimension",
    question="Why does VQ want codes of few dimensions, and is IBQ the better the more it has?",
    factors=(
        Factor(
            "method",
            tuple(METHODS),
            "vq_published, the same with cosine distance as in LlamaGen (N(0, 1) codes, 0.25 on the commitment term), "
            "ibq_published, and "
            "that without its entropy penalty",
        ),
        Factor("D", tuple(str(D) for D in DIMENSIONS), "dimension of a code"),
    ),
    arms=tuple(
        Arm(
            f"{prefix}_{D}",
            {"method": method, "D": str(D)},
            {**METHODS[method], "quantizer.code_dim": D},
            focal=D in (8, 256),
        )
        for prefix, method in PREFIXES.items()
        for D in DIMENSIONS
    ),
    contrasts=(
        Contrast(
            "IBQ: usage",
            "ibq_8",
            "ibq_256",
            "IBQ uses at least 10 points more of its codes at D = 256 than at D = 8.",
            "usage",
            10,
            paper="Code dimension: usage rises markedly with D",
        ),
        Contrast(
            "IBQ: quality",
            "ibq_8",
            "ibq_256",
            "IBQ reconstructs better at D = 256 than at D = 8, by at least 0.003 of L1.",
            "l1",
            -0.003,
            paper="Code dimension: rFID improves with D",
        ),
        Contrast(
            "IBQ: quality in distribution",
            "ibq_8",
            "ibq_256",
            "IBQ's FID[fashion-cnn] is at least 10% lower at D = 256 than at D = 8.",
            "fid",
            -0.152,
            paper="Code dimension: rFID improves with D",
        ),
        Contrast(
            "VQ: usage",
            "vq_8",
            "vq_256",
            "VQ uses at most half as many codes (perplexity) at D = 256 as at D = 8.",
            "bits",
            -1.0,
            paper="Background: VQ's usage is the worse the larger D",
        ),
        Contrast(
            "cosine VQ: usage",
            "cosine_8",
            "cosine_256",
            "Cosine VQ uses at least 20 points fewer of its codes at D = 256 than at D = 8.",
            "usage",
            -20,
            paper="Table 1: LlamaGen uses 97% at D = 8, 0.29% at D = 256",
        ),
        Contrast(
            "cosine VQ: quality",
            "cosine_8",
            "cosine_256",
            "Cosine VQ reconstructs worse at D = 256 than at D = 8, by at least 0.003 of L1.",
            "l1",
            0.003,
            paper="Table 1: LlamaGen has rFID 2.19 at D = 8, 9.21 at D = 256",
        ),
        Contrast(
            "cosine VQ: quality in distribution",
            "cosine_8",
            "cosine_256",
            "Cosine VQ's FID[fashion-cnn] is at least 10% higher at D = 256 than at D = 8.",
            "fid",
            0.1375,
            paper="Table 1: LlamaGen has rFID 2.19 at D = 8, 9.21 at D = 256",
        ),
        Contrast(
            "IBQ outside its recipe",
            "ibq_no_entropy_32",
            "ibq_no_entropy_256",
            "Without the entropy penalty IBQ loses at least half of its codes (perplexity) between D = 32 and D = 256.",
            "bits",
            -1.0,
        ),
    ),
    axis=Axis("D", "code_dim", "code dimension D"),
    marker="D",
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
        "parameters",
        "step_ms",
    ),
    paper_source="Table 1 (ImageNet 256x256, 50k validation images, K = 16,384)",
    paper_rows=(
        PaperRow("LlamaGen, D = 8", {"rFID": 2.19, "usage %": 97.0}, "cosine_8"),
        PaperRow("LlamaGen, D = 256", {"rFID": 9.21, "usage %": 0.29}, "cosine_256"),
        PaperRow("VQGAN, D = 256", {"rFID": 4.98, "usage %": 5.9}, "vq_256"),
        PaperRow("IBQ, D = 256", {"rFID": 1.37, "usage %": 96.0}, "ibq_256"),
    ),
)
