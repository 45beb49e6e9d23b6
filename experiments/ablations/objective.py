"""The terms of the tokenizer's objective, around IBQ as released: pixel error, perceptual term, and a discriminator in
its variants.

Paper: L1, LPIPS on VGG-16 of weight 1 and a PatchGAN of weight 0.1 (hinge, BatchNorm, LeCam 0.05, from step 0) are one
fixed recipe; of leaving out or changing any of them no number is reported. The contrasts are this study's own. The
perceptual term here is the stand-in `fashion-cnn`, features of a classifier of Fashion-MNIST, not LPIPS. The FID of the
tables is in
features of the same classifier, so that this term is judged by the network that it was trained with: its claim says so.
Every other arm is compared with one that has the same perceptual term. The discriminator's size is the preset's:
pictures of 32×32 want fewer channels and layers than the paper's.
Cost: 11 runs, one of them also a run of vq_vs_ibq; an arm with a discriminator takes about half as long again as one
    without.
Command: python -m experiments run objective
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.ablations import vq_vs_ibq
from experiments.ablations.base import EFFECTIVE_DIMENSIONS, Ablation, Arm, Contrast, Factor

NONE = "–"
"""The level of a factor that an arm without discriminator does not have."""

DISCRIMINATORS = ("hinge", "vanilla")
WEIGHTS = {"0.1": False, "0.1, adaptive": True}
STARTS = {"step 0": 0.0, "half the run": 0.5}


def arm(name: str, levels: Mapping[str, str], focal: bool = False) -> Arm:
    """IBQ as released, with all fields of the objective set, so that none is left to the preset."""
    fields: dict[str, Any] = {"loss.pixel": levels["pixel"].lower(), "loss.perceptual": levels["perceptual"]}
    if levels["discriminator"] == "none":
        fields |= {"loss.adversarial.weight": 0.0}
    else:
        fields |= {
            "loss.adversarial.weight": 0.1,
            "loss.adversarial.adaptive": WEIGHTS[levels["weight"]],
            "loss.adversarial.loss": levels["discriminator"],
            "loss.adversarial.lecam_weight": 0.05 if levels["LeCam"] == "on" else 0.0,
            "loss.adversarial.norm": levels["norm"],
            "loss.adversarial.start": STARTS[levels["start"]],
        }
    return Arm(name, levels, {**vq_vs_ibq.ABLATION.arm("ibq_published").changes, **fields}, focal=focal)


def without_discriminator(pixel: str = "L1", perceptual: str = "none") -> Mapping[str, str]:
    absent = dict.fromkeys(("weight", "LeCam", "norm", "start"), NONE)
    return {"pixel": pixel, "perceptual": perceptual, "discriminator": "none", **absent}


def with_discriminator(**changed: str) -> Mapping[str, str]:
    """The whole objective as released, but for the named levels."""
    whole = {
        "pixel": "L1",
        "perceptual": "fashion-cnn",
        "discriminator": "hinge",
        "weight": "0.1",
        "LeCam": "on",
        "norm": "batch",
    }
    return {**whole, "start": "step 0", **changed}


ARMS = (
    arm("pixel_l1", without_discriminator(), focal=True),
    arm("pixel_l2", without_discriminator(pixel="L2"), focal=True),
    arm("perceptual", without_discriminator(perceptual="fashion-cnn"), focal=True),
    arm("gan", with_discriminator(perceptual="none"), focal=True),
    arm("whole", with_discriminator(), focal=True),
    arm("adaptive", with_discriminator(weight="0.1, adaptive"), focal=True),
    arm("vanilla", with_discriminator(discriminator="vanilla")),
    arm("no_lecam", with_discriminator(LeCam="off")),
    arm("group_norm", with_discriminator(norm="group")),
    arm("no_norm", with_discriminator(norm="none")),
    arm("late_start", with_discriminator(start="half the run")),
)

TENTH = 0.152
"""log2 of 1.11: a FID that is 10% lower, or one that is 11% higher."""

ABLATION = Ablation(
    name="objective",
    title="The terms of the objective",
    notebook=None,
    question="What do the perceptual term and the discriminator add to the pixel error under IBQ, and which of their "
    "variants matter?",
    factors=(
        Factor("pixel", ("L1", "L2"), "mean absolute or mean squared difference of pixels"),
        Factor(
            "perceptual",
            ("none", "fashion-cnn"),
            "distance in the features of a classifier of Fashion-MNIST, weight 1; not LPIPS",
        ),
        Factor(
            "discriminator",
            ("none", *DISCRIMINATORS),
            "PatchGAN and its loss; the generator's term is the released one in both",
        ),
        Factor(
            "weight",
            (NONE, *WEIGHTS),
            "of the generator's term: fixed, or times VQGAN's ratio of gradients at the last layer",
        ),
        Factor("LeCam", (NONE, "on", "off"), "LeCam of weight 0.05 on the discriminator"),
        Factor("norm", (NONE, "batch", "group", "none"), "of the discriminator's layers"),
        Factor("start", (NONE, *STARTS), "when discriminator and generator's term begin"),
    ),
    arms=ARMS,
    contrasts=(
        Contrast(
            "pixel",
            "pixel_l1",
            "pixel_l2",
            "Trained for L2 in place of L1, L1 is worse by at least 0.003.",
            "l1",
            0.003,
        ),
        Contrast(
            "perceptual: distribution",
            "pixel_l1",
            "perceptual",
            "The perceptual term lowers FID[fashion-cnn] by at least 10%, in features of the very network that it was "
            "trained with.",
            "fid",
            -TENTH,
        ),
        Contrast(
            "perceptual: pixels",
            "pixel_l1",
            "perceptual",
            "The perceptual term makes L1 worse by less than 0.003.",
            "l1",
            0.003,
            keeps=True,
        ),
        Contrast(
            "GAN: distribution",
            "perceptual",
            "whole",
            "Beside the perceptual term, the discriminator as released lowers FID[fashion-cnn] by at least 10%.",
            "fid",
            -TENTH,
        ),
        Contrast(
            "GAN alone: distribution",
            "pixel_l1",
            "gan",
            "Without the perceptual term, the discriminator as released lowers FID[fashion-cnn] by at least 10%.",
            "fid",
            -TENTH,
        ),
        Contrast(
            "GAN: pixels",
            "perceptual",
            "whole",
            "The discriminator as released makes L1 worse by at least 0.003.",
            "l1",
            0.003,
        ),
        Contrast(
            "rate",
            "pixel_l1",
            "whole",
            "The whole objective costs IBQ less than a quarter of a bit a token against L1 alone.",
            "bits",
            -0.25,
            keeps=True,
        ),
        Contrast(
            "adaptive weight",
            "whole",
            "adaptive",
            "With VQGAN's adaptive weight FID[fashion-cnn] is at least 10% lower than with the fixed one.",
            "fid",
            -TENTH,
        ),
        Contrast(
            "loss",
            "whole",
            "vanilla",
            "Vanilla in place of hinge makes FID[fashion-cnn] worse by at least 11%.",
            "fid",
            TENTH,
        ),
        Contrast(
            "LeCam", "whole", "no_lecam", "Without LeCam FID[fashion-cnn] is worse by at least 11%.", "fid", TENTH
        ),
        Contrast(
            "group norm",
            "whole",
            "group_norm",
            "GroupNorm in place of BatchNorm makes FID[fashion-cnn] worse by less than 11%.",
            "fid",
            TENTH,
            keeps=True,
        ),
        Contrast(
            "no norm", "whole", "no_norm", "Without a norm FID[fashion-cnn] is worse by at least 11%.", "fid", TENTH
        ),
        Contrast(
            "late start",
            "whole",
            "late_start",
            "A discriminator that starts halfway leaves L1 better than one from the first step, by at least 0.003.",
            "l1",
            -0.003,
        ),
    ),
    figures=(
        "usage_over_training",
        "dimension_over_training",
        "discriminator_over_training",
        "rate_distortion",
        "reconstructions",
    ),
    tables=("arms", "verdicts"),
    columns=("l1", "psnr_db", "ssim", "fid", "usage", *EFFECTIVE_DIMENSIONS, "perplexity", "bits"),
    paper_source="no ablation of these terms is reported",
    paper_rows=(),
)
