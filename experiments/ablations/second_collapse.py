"""The second collapse: codes that are all in use, and span few dimensions; and what quantizing later does about it.

Papers: arXiv 2605.06870 reports that the codes of VQ tokenizers with a usage near 100% span 3 to 5 of 256 dimensions
(d_99), that training without the quantizer first brings 17 to 19, and an rFID lower by 17 to 35%; 2603.17052 defers
quantization too. IBQ (2412.02692) argues that all codes need a gradient; NS-VQ, Wasserstein VQ and VQBridge move all
codes without index backpropagation, by a kernel, by moments, or by a network that all codes pass through.

Every method stands here twice, quantized from the start and after a third of the run, at the learning rate that its
search chose (as in `quantizers`, whose runs from the start, seed 0, and searches are these); the late run takes the
same rate. Claims are about test images, at three seeds.
Cost: 27 runs of the search and 54 of the comparison, 9,450 steps at quick, since arms take half of the preset's steps:
about 40 minutes on 2 cores at 2 GHz (0.38 s a step).
Command: python -m experiments run second_collapse
"""

from __future__ import annotations

from experiments.ablations.base import Ablation, Arm, Contrast, Factor
from experiments.ablations.changes import Times, of_quantizer
from experiments.ablations.quantizers import METHODS, STEP_SHARE, TUNING

LATE_FROM = 1 / 3
START, LATE = "from the start", "after a third"
COMPARED = {
    "vq": ("VQ", "Euclidean search, straight-through copy"),
    "vq_best": ("VQ kept alive", "k-means init and entropy penalty"),
    "ibq": ("IBQ", "as released"),
    "lfq": ("LFQ", "signs, D = log2 K (LFQ)"),
    "simvq": ("SimVQ", "learnt linear map of frozen codes (SimVQ)"),
    "diveq": ("DiVeQ", "error vector with a gradient to the code (DiVeQ)"),
    "vqbridge": ("VQBridge", "codes through a small ViT (FVQ / VQBridge)"),
    "wasserstein": ("Wasserstein VQ", "codes drawn to the features' Gaussian (Wasserstein VQ)"),
    "nsvq": ("NS-VQ", "codes follow by a kernel of distance (NS-VQ)"),
}
"""Arms of `quantizers` by their names: what they are called here, and what there."""
FOCAL = ("vq_best", "ibq")
SEEDS = 3


def arms_of(name: str, method: str, described: str) -> tuple[Arm, Arm]:
    """A method quantized from the start, and late."""
    changes = {**of_quantizer(METHODS[described]), "steps": Times(STEP_SHARE)}
    late = changes | {"quantize_from": LATE_FROM}
    return (
        Arm(name, {"method": method, "quantized": START}, changes, seeds=SEEDS, focal=name in FOCAL),
        Arm(
            f"{name}_late",
            {"method": method, "quantized": LATE},
            late,
            seeds=SEEDS,
            focal=name in FOCAL,
            tuned_as=name,
        ),
    )


def buys(name: str, method: str) -> tuple[Contrast, Contrast]:
    """The two claims on late quantization of a method."""
    paper = "arXiv 2605.06870: d_99 of 3 to 5 becomes 17 to 19 of 256, rFID falls by 17 to 35%"
    return (
        Contrast(
            f"late quantization of {method}: dimension",
            name,
            f"{name}_late",
            f"Quantized after a third of the run, the codes in use of {method} span at least 3 dimensions more (d_99).",
            "dimension99_used",
            3.0,
            paper=paper,
        ),
        Contrast(
            f"late quantization of {method}: quality",
            name,
            f"{name}_late",
            f"Quantized after a third of the run, {method} has an FID[fashion-cnn] at least 10% lower.",
            "fid",
            -0.152,
            paper=paper,
        ),
    )


def moved_otherwise(name: str, method: str, how: str) -> Contrast:
    """The control of IBQ's argument: all codes are moved, without index backpropagation."""
    return Contrast(
        f"IBQ against {method}: quality",
        name,
        "ibq",
        f"IBQ as released reconstructs better than {method}, which moves unselected codes {how}, by at least 0.003 of "
        f"L1.",
        "l1",
        -0.003,
    )


ABLATION = Ablation(
    name="second_collapse",
    title="The second collapse",
    notebook="12_second_collapse",
    question="Does high usage hide a low dimension, what does late quantization buy, and is IBQ's gradient to "
    "unselected codes needed where they are moved otherwise?",
    factors=(
        Factor("method", tuple(method for method, _ in COMPARED.values()), "the quantizer, as in `quantizers`"),
        Factor(
            "quantized",
            (START, LATE),
            "until then the decoder gets the features themselves; then codes begin as their k-means",
        ),
    ),
    arms=tuple(arm for name, (method, described) in COMPARED.items() for arm in arms_of(name, method, described)),
    contrasts=(
        Contrast(
            "usage hides dimension",
            "vq",
            "vq_best",
            "VQ kept alive has at least four times the perplexity of VQ, and yet its codes in use span less than 3 "
            "dimensions more (d_99).",
            "dimension99_used",
            3.0,
            keeps=True,
            paper="arXiv 2605.06870: usage near 100% at a d_99 of 3 to 5 of 256",
        ),
        *buys("vq", "VQ"),
        *buys("vq_best", "VQ kept alive"),
        *buys("ibq", "IBQ"),
        moved_otherwise("nsvq", "NS-VQ", "by a kernel of distance"),
        moved_otherwise("wasserstein", "Wasserstein VQ", "by the moments of all codes"),
        moved_otherwise("vqbridge", "VQBridge", "by a network that all codes pass through"),
    ),
    adaptive=TUNING,
    fill="quantized",
    figures=(
        "usage_against_dimension",
        "dimension_over_training",
        "dimension_of_each",
        "usage_over_training",
        "rate_distortion",
        "reconstructions",
        "code_map",
    ),
    tables=("arms", "verdicts"),
    columns=(
        "learning_rate",
        "perplexity",
        "usage",
        "dimension99_used",
        "dimension_used",
        "dimension99_features",
        "dimension_features",
        "l1",
        "fid",
        "quantization_error",
        "step_ms",
    ),
    paper_source="",
    paper_rows=(),
)
