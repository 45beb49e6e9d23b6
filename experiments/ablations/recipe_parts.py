"""The parts of IBQ's recipe, varied one at a time around VQ and IBQ.

Paper: Table 2 has the steps of one ladder; of single parts no number is reported.
Cost: 26 runs, 16 of them also runs of vq_vs_ibq.  Command: python -m experiments run recipe_parts

A thinned factorial: every factor is varied alone in at least two pairs of arms that differ in nothing else (each change
of the initialisation, and the temperature, in one), and its effect is read from those. vq_fair_softer has twice the
temperature of vq_fair, which makes the logits of its entropy penalty as sharp in z.c as IBQ's.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.ablations import vq_vs_ibq
from experiments.ablations.base import Ablation, Arm, Contrast, Factor
from experiments.ablations.vq_vs_ibq import arm

EQUALLY_SHARP = ("vq_fair_softer", "ibq_fair")


def at_temperature(arm: Arm, temperature: str = "0.01") -> Arm:
    """An arm with a temperature of the entropy penalty; 0.01 is what it has."""
    own = {} if temperature == "0.01" else {"quantizer.entropy_temperature": float(temperature)}
    return replace(arm, levels={**arm.levels, "temperature": temperature}, changes={**arm.changes, **own})


ABLATION = Ablation(
    name="recipe_parts",
    title="The parts of IBQ's recipe",
    notebook=None,
    question="Which part of IBQ's recipe keeps a codebook alive, and which one costs quality?",
    factors=(
        *vq_vs_ibq.FACTORS,
        Factor(
            "temperature",
            ("0.01", "0.02"),
            "of the entropy penalty; at 0.02 the logits of VQ, 2 z.c - |c|^2, are as sharp as IBQ's z.c at 0.01",
        ),
    ),
    arms=(
        *map(at_temperature, vq_vs_ibq.ARMS),
        at_temperature(replace(vq_vs_ibq.ABLATION.arm("vq_fair"), name="vq_fair_softer", focal=False), "0.02"),
        at_temperature(arm("vq_entropy_normal", "VQ", "normal", "on", "codebook")),
        at_temperature(arm("vq_entropy_commitment", "VQ", "uniform", "on", "commitment")),
        at_temperature(arm("ibq_no_entropy", "IBQ", "normal", "off", "codebook", "on")),
        at_temperature(arm("ibq_features", "IBQ", "features", "on", "codebook", "on")),
        at_temperature(arm("ibq_features_commitment", "IBQ", "features", "on", "commitment", "on")),
        at_temperature(arm("ibq_estimator_alone", "IBQ", "features", "off", "commitment")),
        at_temperature(arm("ibq_fair_softer", "IBQ", "features", "on", "commitment"), "0.02"),
    ),
    contrasts=(
        Contrast(
            "equally sharp pair: usage",
            *EQUALLY_SHARP,
            "All else equal, the sharpness of the entropy penalty's logits too, IBQ's estimator uses at least twice "
            "the codes of VQ's.",
            "bits",
            1.0,
        ),
        Contrast(
            "equally sharp pair: quality",
            *EQUALLY_SHARP,
            "All else equal, the sharpness of the entropy penalty's logits too, IBQ's estimator reconstructs better "
            "than VQ's, by at least 0.003 of L1.",
            "l1",
            -0.003,
        ),
    ),
    marker="init",
    fill="entropy",
    figures=("main_effects", "rate_distortion"),
    tables=("arms", "main_effects", "verdicts"),
    columns=vq_vs_ibq.ABLATION.columns,
    paper_source="",
    paper_rows=(),
)
