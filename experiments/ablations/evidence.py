"""The headline claims at several scales: on grey and on natural colour images, under L1 alone and under a whole
objective, trained for 1, 3 and 10 times the steps.

Every method has a learning rate of its own for each setting, searched at 1 times the steps with seed 0, which is not
reported; longer runs take the same rate. Seeds are 10 to 14, or 10 to 12 where a run is long. What two cores cannot do
in a night is left out: the whole objective is trained with the arms of the headline claims alone, and ten times the
steps with the published pair alone.

The whole objective has a GAN, and on Fashion-MNIST a perceptual term in the features of fashion-cnn. It has none on
landscapes: the one network that knows colour images, EfficientNet-Lite0, is the judge in both, and no loss uses it.

How far Adam can carry a code is the sum of the learning rates, 0.23 at 300 steps of quick and 165 in the paper, for
codes drawn from N(0, 1). IBQ with codes drawn short (N(0, 0.02²)) has at 3,000 steps nearly the paper's ratio of this
reach to the length of a code.
Command: python -m experiments run evidence --preset night
"""

from __future__ import annotations

from typing import Any

from experiments.ablations import vq_vs_ibq
from experiments.ablations.base import Ablation, Arm, Contrast, Factor
from experiments.ablations.changes import Times, of_quantizer
from experiments.ablations.crossing import crossed, thinned
from experiments.ablations.quantizers import METHODS
from experiments.ablations.quantizers.tuning import Tuning

SHORT_CODES = 0.02
IBQ = vq_vs_ibq.fields("IBQ", "normal", "on", "codebook", "on")
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("VQ, naive", vq_vs_ibq.fields("VQ", "uniform", "off", "codebook")),
    "vq_features": ("VQ, features init", vq_vs_ibq.fields("VQ", "features", "off", "commitment")),
    "vq_alive": ("VQ kept alive", vq_vs_ibq.fields("VQ", "features", "on", "commitment")),
    "ibq": ("IBQ, as released", IBQ),
    "ibq_short": ("IBQ, codes drawn short", IBQ | {"init_scale": SHORT_CODES}),
    "ibq_paper": ("IBQ, the paper's loss order", IBQ | {"beta_on": "commitment"}),
    "lfq": ("LFQ", METHODS["signs, D = log2 K (LFQ)"]),
}
HEADLINE = ("vq", "vq_features", "ibq", "ibq_short")
PUBLISHED = ("vq", "ibq")

L1: dict[str, Any] = {"loss.pixel": "l1", "loss.perceptual": "none", "loss.adversarial.weight": 0.0}
GAN: dict[str, Any] = {
    "loss.pixel": "l1",
    "loss.adversarial.weight": 0.1,
    "loss.adversarial.loss": "hinge",
    "loss.adversarial.lecam_weight": 0.05,
    "loss.adversarial.norm": "batch",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Fashion-MNIST, L1": L1 | {"data.name": "fashion-mnist"},
    "Fashion-MNIST, whole": GAN | {"data.name": "fashion-mnist", "loss.perceptual": "fashion-cnn"},
    "landscapes, L1": L1 | {"data.name": "landscapes"},
    "landscapes, whole": GAN | {"data.name": "landscapes", "loss.perceptual": "none"},
}
STEPS: dict[str, dict[str, Any]] = {f"×{times}": {"steps": Times(times)} for times in (1, 3, 10)}


def seeds(arm: Arm) -> int:
    """Of an arm; 0: it is left out, since two cores cannot train it in a night."""
    method, steps, whole = arm.levels["method"], arm.levels["steps"], arm.levels["setting"].endswith("whole")
    names = {FIELDS[name][0] for name in (PUBLISHED if steps == "×10" else HEADLINE)}
    if steps == "×1" and not whole:
        return 5
    return (3 if steps == "×10" else 5) if method in names else 0


BASE = Ablation(
    name="evidence",
    title="The headline claims at several scales",
    notebook=None,
    question="Do the answers of small runs hold on natural images, under a whole objective, and with longer training?",
    factors=(Factor("method", tuple(method for method, _ in FIELDS.values()), "the quantizer and its start"),),
    arms=tuple(Arm(name, {"method": method}, of_quantizer(fields)) for name, (method, fields) in FIELDS.items()),
    contrasts=(
        Contrast(
            "usage",
            *PUBLISHED,
            "IBQ as released uses at least twice the codes of naive VQ (perplexity).",
            "bits",
            1.0,
            paper="Tables 1 and 4: with 16,384 codes IBQ uses 96%, VQGAN 5.9%",
        ),
        Contrast(
            "quality",
            *PUBLISHED,
            "IBQ as released reconstructs better than naive VQ, by at least 0.003 of L1.",
            "l1",
            -0.003,
            paper="Tables 1 and 4: with 16,384 codes rFID 1.37 of IBQ, 4.98 of VQGAN",
        ),
        Contrast(
            "quality in distribution",
            *PUBLISHED,
            "FID[efficientnet-lite0] of IBQ as released is at least 10% lower than that of naive VQ.",
            "fid_lite0",
            -0.152,
            paper="Tables 1 and 4: with 16,384 codes rFID 1.37 of IBQ, 4.98 of VQGAN",
        ),
        Contrast(
            "best pair: quality",
            "vq_features",
            "ibq_short",
            "IBQ with codes drawn short reconstructs better than VQ whose codes begin at features, by at least 0.003 "
            "of L1.",
            "l1",
            -0.003,
        ),
        Contrast(
            "best pair: quality in distribution",
            "vq_features",
            "ibq_short",
            "FID[efficientnet-lite0] of IBQ with codes drawn short is at least 10% lower than that of VQ whose codes "
            "begin at features.",
            "fid_lite0",
            -0.152,
        ),
    ),
    adaptive=Tuning("optim.lr", factors=(0.1, 0.3, 1.0, 3.0, 10.0), step_share=1.0, first=(0.3, 1.0, 3.0)),
    first_seed=10,
    figures=("effect_over_steps", "search"),
    tables=("arms", "verdicts"),
    columns=("learning_rate", "perplexity", "usage", "dimension_used", "l1", "psnr_db", "fid_lite0", "fid", "step_ms"),
    paper_source="",
    paper_rows=(),
    on_request=True,
)
ABLATION = thinned(
    crossed(
        crossed(BASE, Factor("setting", tuple(SETTINGS), "data and objective"), SETTINGS),
        Factor("steps", tuple(STEPS), "multiple of the preset's steps"),
        STEPS,
        tuned_at="×1",
    ),
    seeds,
)
