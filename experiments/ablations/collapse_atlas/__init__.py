"""The atlas of collapse: where over learning rate, D and K codebooks die, for VQ, VQ from features, and IBQ with
parts taken away.

Paper: with 16,384 codes of D = 256 and a rate of 1e-4, IBQ uses 96% of them and VQGAN 5.9%. Users who took the class
out of its recipe saw 0% usage at D = 256 and not at D = 32 (SEED-Voken #59), and got no answer. Leaving out the entropy
penalty alone does not do it here (see code_dimension). Short runs beforehand tried other ways out of the recipe at both
dimensions (120 steps at quick's sizes). Two kill D = 256
alone:
    outside     no double term, the paper's order of beta, three times the rate: perplexity 212 at D = 32, 38 at D = 256
    long codes  the whole recipe, codes drawn 4 times as long: 224 at D = 32, 24 at D = 256 (logits times 4 instead:
                384 and 59)
The largest probability of an assignment was 0.35 and 0.87 at the end of the first pair, 0.19 and 0.60 when the second
was first logged. None of the remedies but a third of the rate had been tried when the claims on them were written.

Mechanism to be tested: z.c spreads as the codes are long, and codes of N(0, 1) are as long as the root of D. The
softmax saturates, and then a token hears of one code alone. If so, codes as long as at D = 32 mend D = 256, and codes
as long as at D = 256 break D = 32.

Coarse first, then along the border: arms `between` two others are trained only if exactly one of these has collapsed.
Corners are 0.3 and 3 times the preset's rate at D = 16 and 256; of methods that were dead wherever they were tried
before (quantizers), only two opposite corners are certain, and the other two lie between these. At most 60 arms, in the
order below.
Cost: 300 steps each at quick; 30 to 50 minutes on 2 cores with one seed. Not part of `run all`.
Command: python -m experiments run collapse_atlas
"""

from __future__ import annotations

from experiments.ablations.base import EFFECTIVE_DIMENSIONS, Ablation, Contrast, Factor, PaperRow
from experiments.ablations.collapse_atlas.arms import (
    AXES,
    CONDITIONAL,
    CORNERS,
    DIMENSIONS,
    LENGTHS,
    MEANS,
    METHODS,
    QUESTION,
    RATES,
    REMEDIES,
    SIZES,
)
from experiments.ablations.collapse_atlas.bisection import COLLAPSE, Bisection

ABLATION = Ablation(
    name="collapse_atlas",
    title="Collapse atlas",
    notebook="11_collapse_atlas",
    question="Where over learning rate, D and K do codebooks collapse, why does IBQ fall to 0% at D = 256 and not at D "
    "= 32 outside its "
    "recipe, and what mends it?",
    factors=(
        Factor(
            "method",
            tuple(METHODS),
            "vq_published, vq_features and ibq_published of notebook 01; IBQ without double term and with 0.25 on the "
            "commitment term (outside "
            "its recipe); ibq_published with one part taken away",
        ),
        Factor("rate", tuple(label for label, _ in RATES.values()), "learning rate, as a multiple of the preset's"),
        Factor("D", tuple(map(str, DIMENSIONS)), "dimension of a code"),
        Factor("K", tuple(SIZES), "number of codes, as a multiple of the preset's"),
        Factor(
            "tokens a mean",
            tuple(MEANS),
            "share of a step's tokens that one mean assignment of the entropy penalty is of",
        ),
        Factor("initial length", tuple(LENGTHS), "factor on the codes drawn from N(0, 1)"),
        Factor("remedy", tuple(REMEDIES), "what is set on top of the method"),
    ),
    arms=(*QUESTION, *CORNERS, *AXES, *CONDITIONAL),
    contrasts=(
        Contrast(
            "outside: D",
            "outside_fast_32",
            "outside_fast_256",
            "Outside its recipe, at three times the rate, IBQ loses at least half of its codes (perplexity) between D "
            "= 32 and D = 256.",
            "bits",
            -1.0,
        ),
        Contrast(
            "long codes: D",
            "ibq_usual_32_long",
            "ibq_usual_256_long",
            "With codes drawn 4 times as long, IBQ as released loses at least half of its codes between D = 32 and D = "
            "256.",
            "bits",
            -1.0,
        ),
        Contrast(
            "mechanism: short codes",
            "outside_fast_256",
            "outside_fast_256_short",
            "At D = 256, outside the recipe, codes as long as those of D = 32 bring back at least twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "mechanism: long codes",
            "outside_fast_32",
            "outside_fast_32_longer",
            "At D = 32, outside the recipe, codes as long as those of D = 256 lose at least half of the codes in use.",
            "bits",
            -1.0,
        ),
        Contrast(
            "remedy: root of D",
            "outside_fast_256",
            "outside_fast_256_root",
            "Logits over the root of D bring back at least twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "remedy: root of D, quality",
            "outside_fast_256",
            "outside_fast_256_root",
            "Logits over the root of D lower L1 by at least 0.003.",
            "l1",
            -0.003,
        ),
        Contrast(
            "remedy: temperature",
            "outside_fast_256",
            "outside_fast_256_quarter_logits",
            "Logits over 4 bring back at least twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "remedy: temperature of the entropies",
            "outside_fast_256",
            "outside_fast_256_warm_entropy",
            "A temperature 16 times as high in the entropy penalty alone brings back at least twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "remedy: entropy weight",
            "outside_fast_256",
            "outside_fast_256_strong_entropy",
            "An entropy penalty 4 times as strong brings back at least twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "remedy: order of beta",
            "outside_fast_256",
            "ibq_single_fast_256",
            "The released order, 0.25 on the codebook term, brings back less than twice the codes.",
            "bits",
            1.0,
            keeps=True,
        ),
        Contrast(
            "remedy: double term",
            "outside_fast_256",
            "outside_fast_256_double",
            "The double term brings back at least twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "remedy: rate",
            "outside_fast_256",
            "outside_usual_256",
            "A third of the rate brings back at least twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "long codes: root of D",
            "ibq_usual_256_long",
            "ibq_usual_256_long_root",
            "Under the whole recipe with codes 4 times as long too, logits over the root of D bring back at least "
            "twice the codes.",
            "bits",
            1.0,
        ),
        Contrast(
            "IBQ: short codes, quality",
            "ibq_usual_256",
            "ibq_usual_256_short",
            "Under the recipe as released at D = 256, codes as long as those of D = 32 lower L1 by at least 0.003.",
            "l1",
            -0.003,
        ),
        Contrast(
            "IBQ: rate",
            "ibq_slow_256",
            "ibq_fast_256",
            "At D = 256 IBQ as released keeps at least half of its codes when the rate is ten times as high.",
            "bits",
            -1.0,
            keeps=True,
        ),
        Contrast(
            "IBQ: few dimensions",
            "ibq_slow_16",
            "ibq_slow_256",
            "At the slowest rate IBQ as released uses at least twice as many codes at D = 256 as at D = 16.",
            "bits",
            1.0,
            paper="Code dimension: usage rises markedly with D",
        ),
        Contrast(
            "VQ, features: D",
            "vq_features_fast_16",
            "vq_features_fast_256",
            "At the fastest rate VQ from features keeps at least half of its codes between D = 16 and D = 256.",
            "bits",
            -1.0,
            keeps=True,
        ),
        Contrast(
            "tokens a mean",
            "ibq_usual_64",
            "ibq_usual_64_small_means",
            "With an eighth of the tokens a mean assignment IBQ as released uses at most half of the codes.",
            "bits",
            -1.0,
        ),
        Contrast(
            "VQ, features against IBQ: quality",
            "ibq_fast_256",
            "vq_features_fast_256",
            "At D = 256 and the fastest rate VQ from features reconstructs better than IBQ as released, by at least "
            "0.003 of L1.",
            "l1",
            -0.003,
        ),
    ),
    adaptive=Bisection(COLLAPSE, most=60),
    figures=(
        "collapse_map",
        "collapse_axes",
        "saturation",
        "usage_over_training",
        "dimension_over_training",
        "logits_over_training",
    ),
    tables=("remedies", "arms", "verdicts", "paper"),
    columns=(
        "share",
        "usage",
        *EFFECTIVE_DIMENSIONS,
        "perplexity",
        "bits",
        "l1",
        "fid",
        "logit_spread",
        "max_probability",
        "gap",
        "step_ms",
    ),
    paper_source="Table 1 (ImageNet 256x256, 50k validation images)",
    paper_rows=(
        PaperRow("VQGAN, K = 16,384, D = 256", {"rFID": 4.98, "usage %": 5.9}, "vq_fast_256"),
        PaperRow("IBQ, K = 16,384, D = 256", {"rFID": 1.37, "usage %": 96.0}, "ibq_slow_256"),
    ),
    on_request=True,
)
