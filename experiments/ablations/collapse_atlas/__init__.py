"""The atlas of collapse: where over learning rate, D and K codebooks die, for VQ, its strongest variant, and IBQ with
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

from collections.abc import Mapping
from typing import Any

from experiments.ablations import codebook_size, vq_vs_ibq
from experiments.ablations.base import Ablation, Arm, Border, Contrast, Factor, PaperRow, Remedy
from experiments.ablations.changes import CODEBOOK_SIZE, Times, of_quantizer

PUBLISHED = vq_vs_ibq.ABLATION.arm("ibq_published").changes
OUTSIDE = {**PUBLISHED, **of_quantizer({"double": False, "beta_on": "commitment"})}

METHODS: dict[str, Mapping[str, Any]] = {
    "VQ": vq_vs_ibq.ABLATION.arm("vq_published").changes,
    "VQ, strongest": vq_vs_ibq.ABLATION.arm("vq_fair").changes,
    "IBQ": PUBLISHED,
    "IBQ outside its recipe": OUTSIDE,
    "IBQ without double term": {**PUBLISHED, **of_quantizer({"double": False})},
    "IBQ without entropy": {**PUBLISHED, **of_quantizer({"entropy_weight": 0.0})},
    "IBQ with U(±1/K) codes": {**PUBLISHED, **of_quantizer({"codebook_init": "uniform"})},
    "IBQ without soft path to features": {**PUBLISHED, **of_quantizer({"soft_path": "codes"})},
    "IBQ on the 8 best codes": {**PUBLISHED, **of_quantizer({"top_m": 8})},
}
"""Changes by method; those of vq_vs_ibq, code_dimension and codebook_size share their runs where sizes and
rate are theirs."""

PREFIXES = {
    "vq": "VQ",
    "vq_strong": "VQ, strongest",
    "ibq": "IBQ",
    "outside": "IBQ outside its recipe",
    "ibq_single": "IBQ without double term",
    "ibq_no_entropy": "IBQ without entropy",
    "ibq_uniform": "IBQ with U(±1/K) codes",
    "ibq_copied": "IBQ without soft path to features",
    "ibq_top_8": "IBQ on the 8 best codes",
}
MAPPED = ("outside", "ibq", "ibq_single", "vq_strong")
"""Those whose four corners are certain."""

RATES = {"slow": ("×0.3", 0.3), "usual": ("×1", 1.0), "fast": ("×3", 3.0)}
"""Label and multiple of the learning rate by what arms are called."""
DIMENSIONS = (16, 32, 64, 128, 256)
SIZES = {label: Times(share) for label, share in list(codebook_size.SIZES.values())[:4]}
MEANS = {"all": 1, "1/2": 2, "1/8": 8}
"""Micro-batches by the share of a step's tokens that one mean assignment is of."""
LENGTHS = {"×0.35": 8**-0.5, "×1": 1.0, "×2.8": 8**0.5, "×4": 4.0}
"""Factors on the codes drawn from N(0, 1); ×0.35 and ×2.8 are the root of 256 / 32 either way."""
NONE = "none"
REMEDIES: dict[str, dict[str, Any]] = {
    NONE: {},
    "logits over √D": {"logit_scale": "inverse_sqrt_dim"},
    "logits over 4": {"logit_scale": 0.25},
    "entropy temperature ×16": {"entropy_temperature": 16 * 0.01},
    "entropy weight ×4": {"entropy_weight": 4 * PUBLISHED["quantizer.entropy_weight"]},
    "double term": {"double": True},
}
"""Fields that are set on top of the method's."""

NAMES = {
    "×1/16": "sixteenth",
    "×1/4": "quarter",
    "×4": "fourfold",
    "1/2": "half_means",
    "1/8": "small_means",
    "logits over √D": "root",
    "logits over 4": "quarter_logits",
    "entropy temperature ×16": "warm_entropy",
    "entropy weight ×4": "strong_entropy",
    "double term": "double",
}
"""What arms are called by their levels of K, of tokens a mean, and of the remedy; lengths have names of their own."""
LENGTH_NAMES = {"×0.35": "short", "×2.8": "longer", "×4": "long"}


def name(
    prefix: str, rate: str, D: int, K: str = "×1", mean: str = "all", length: str = "×1", remedy: str = NONE
) -> str:
    """E.g. outside_fast_256_root; levels that are the usual ones have no part in it."""
    words = [NAMES.get(K), NAMES.get(mean), LENGTH_NAMES.get(length), NAMES.get(remedy)]
    return "_".join([prefix, rate, str(D), *(word for word in words if word)])


def arm(
    prefix: str,
    rate: str,
    D: int,
    K: str = "×1",
    mean: str = "all",
    length: str = "×1",
    remedy: str = NONE,
    focal: bool = False,
    between: tuple[str, str] | None = None,
) -> Arm:
    label, multiple = RATES[rate]
    levels = {"method": PREFIXES[prefix], "rate": label, "D": str(D), "K": K}
    levels |= {"tokens a mean": mean, "initial length": length, "remedy": remedy}
    changes = {**METHODS[PREFIXES[prefix]], **of_quantizer(REMEDIES[remedy])}
    changes |= {"quantizer.code_dim": D, CODEBOOK_SIZE: SIZES[K]}
    if length != "×1":
        changes["quantizer.init_scale"] = LENGTHS[length]
    if rate != "usual":
        changes["optim.lr"] = Times(multiple)
    if mean != "all":
        changes["accumulate"] = Times(MEANS[mean])
    return Arm(name(prefix, rate, D, K, mean, length, remedy), levels, changes, focal=focal, between=between)


def between(prefix: str, one: tuple[str, int], middle: tuple[str, int], other: tuple[str, int]) -> Arm:
    """A point of a method's map, by rate and D, between two others."""
    return arm(prefix, *middle, between=(name(prefix, *one), name(prefix, *other)))


QUESTION = (
    arm("outside", "fast", 32, focal=True),
    arm("outside", "fast", 256, focal=True),
    arm("outside", "fast", 256, remedy="logits over √D", focal=True),
    arm("outside", "fast", 256, length="×0.35", focal=True),
    arm("outside", "fast", 32, length="×2.8", focal=True),
    arm("ibq", "usual", 64),
    arm("ibq", "usual", 64, mean="1/8"),
    arm("ibq", "usual", 64, K="×1/4"),
    arm("vq", "usual", 64),
    arm("vq_strong", "usual", 64),
    arm("outside", "fast", 256, remedy="logits over 4"),
    arm("outside", "fast", 256, remedy="entropy temperature ×16"),
    arm("outside", "fast", 256, remedy="entropy weight ×4"),
    arm("outside", "fast", 256, remedy="double term", focal=True),
    arm("outside", "usual", 256),
    arm("ibq", "usual", 32, length="×4", focal=True),
    arm("ibq", "usual", 256, length="×4", focal=True),
    arm("ibq", "usual", 256, length="×4", remedy="logits over √D", focal=True),
    arm("ibq", "usual", 256),
)
"""The users' question and its remedies, and the middle of the map; what preset smoke has room for comes first."""

CORNERS = tuple(
    arm(prefix, rate, D)
    for prefix in PREFIXES
    for rate, D in (("slow", 16), ("fast", 256), ("slow", 256), ("fast", 16))
    if (prefix in MAPPED or (rate, D) in (("slow", 16), ("fast", 256)))
    and (prefix, rate, D) != ("outside", "fast", 256)
)

AXES = (
    arm("ibq", "usual", 64, K="×4"),
    arm("vq", "usual", 64, K="×1/16"),
    arm("vq_strong", "usual", 64, K="×4"),
    arm("outside", "fast", 32, K="×4"),
    arm("outside", "fast", 32, mean="1/8"),
    arm("ibq", "usual", 256, length="×0.35"),
)

PARTS = tuple(prefix for prefix in PREFIXES if prefix not in MAPPED)


def edges(prefix: str) -> tuple[Arm, ...]:
    """The middles of the four edges of a method's map; of the upper one of "outside" that of the half beyond D = 32."""
    least = 32 if prefix == "outside" else 16
    middles = (
        between(prefix, ("fast", least), ("fast", 64), ("fast", 256)),
        between(prefix, ("slow", 16), ("slow", 64), ("slow", 256)),
        between(prefix, ("slow", 256), ("usual", 256), ("fast", 256)),
        between(prefix, ("slow", 16), ("usual", 16), ("fast", 16)),
    )
    return tuple(middle for middle in middles if middle.name not in {certain.name for certain in QUESTION})


ALONG_AXES = (
    arm("vq", "usual", 64, K="×1/4", between=(name("vq", "usual", 64, K="×1/16"), name("vq", "usual", 64))),
    arm("ibq", "usual", 64, mean="1/2", between=(name("ibq", "usual", 64, mean="1/8"), name("ibq", "usual", 64))),
    arm(
        "outside",
        "fast",
        32,
        mean="1/2",
        between=(name("outside", "fast", 32, mean="1/8"), name("outside", "fast", 32)),
    ),
)
OPPOSITE = tuple(
    between(prefix, ("slow", 16), corner, ("fast", 256)) for prefix in PARTS for corner in (("slow", 256), ("fast", 16))
)
"""The corners that lie between the two certain ones."""

FINER = tuple(
    between(prefix, *points)
    for points in ((("fast", 64), ("fast", 128), ("fast", 256)), (("slow", 16), ("slow", 32), ("slow", 64)))
    for prefix in ("outside", "ibq", "ibq_single")
)
"""Between a corner and the middle of an edge."""

CONDITIONAL = (
    *(middle for prefix in MAPPED for middle in edges(prefix)),
    *ALONG_AXES,
    *OPPOSITE,
    *(middle for prefix in PARTS for middle in edges(prefix)),
    *FINER,
)
"""Between two others, those first that get the places that are left."""

OUTSIDE_CASE, LONG_CASE = "outside its recipe", "the whole recipe, codes drawn 4 times as long"
REMEDIES_TRIED = (
    Remedy(OUTSIDE_CASE, "D = 32", name("outside", "fast", 32), reference=True),
    Remedy(OUTSIDE_CASE, "D = 256", name("outside", "fast", 256), reference=True),
    Remedy(
        OUTSIDE_CASE,
        "D = 32 with codes as long as at D = 256",
        name("outside", "fast", 32, length="×2.8"),
        reference=True,
    ),
    Remedy(OUTSIDE_CASE, "codes as long as at D = 32", name("outside", "fast", 256, length="×0.35")),
    Remedy(OUTSIDE_CASE, "logits over √D", name("outside", "fast", 256, remedy="logits over √D")),
    Remedy(OUTSIDE_CASE, "logits over 4", name("outside", "fast", 256, remedy="logits over 4")),
    Remedy(OUTSIDE_CASE, "entropy temperature ×16", name("outside", "fast", 256, remedy="entropy temperature ×16")),
    Remedy(OUTSIDE_CASE, "entropy weight ×4", name("outside", "fast", 256, remedy="entropy weight ×4")),
    Remedy(OUTSIDE_CASE, "0.25 on the codebook term", name("ibq_single", "fast", 256)),
    Remedy(OUTSIDE_CASE, "double term", name("outside", "fast", 256, remedy="double term")),
    Remedy(OUTSIDE_CASE, "a third of the rate", name("outside", "usual", 256)),
    Remedy(LONG_CASE, "D = 32", name("ibq", "usual", 32, length="×4"), reference=True),
    Remedy(LONG_CASE, "D = 256", name("ibq", "usual", 256, length="×4"), reference=True),
    Remedy(LONG_CASE, "logits over √D", name("ibq", "usual", 256, length="×4", remedy="logits over √D")),
    Remedy(LONG_CASE, "codes of N(0, 1)", name("ibq", "usual", 256)),
    Remedy(LONG_CASE, "codes as long as at D = 32", name("ibq", "usual", 256, length="×0.35")),
)

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
            "vq_published, vq_fair and ibq_published of notebook 01; IBQ without double term and with 0.25 on the "
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
            "VQ, strongest: D",
            "vq_strong_fast_16",
            "vq_strong_fast_256",
            "At the fastest rate the strongest VQ keeps at least half of its codes between D = 16 and D = 256.",
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
            "strongest against IBQ: quality",
            "ibq_fast_256",
            "vq_strong_fast_256",
            "At D = 256 and the fastest rate the strongest VQ reconstructs better than IBQ as released, by at least "
            "0.003 of L1.",
            "l1",
            -0.003,
        ),
    ),
    border=Border(collapse=0.1, most_arms=60, remedies=REMEDIES_TRIED),
    figures=("collapse_map", "collapse_axes", "saturation", "usage_over_training", "logits_over_training"),
    tables=("remedies", "arms", "verdicts", "paper"),
    columns=("share", "usage", "perplexity", "bits", "l1", "fid", "logit_spread", "max_probability", "gap", "step_ms"),
    paper_source="Table 1 (ImageNet 256x256, 50k validation images)",
    paper_rows=(
        PaperRow("VQGAN, K = 16,384, D = 256", {"rFID": 4.98, "usage %": 5.9}, "vq_fast_256"),
        PaperRow("IBQ, K = 16,384, D = 256", {"rFID": 1.37, "usage %": 96.0}, "ibq_slow_256"),
    ),
    core=False,
    on_request=True,
)
