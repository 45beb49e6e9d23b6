"""Arms of the atlas: the users' question and its remedies, corners of the maps, the other axes, and points between
others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.ablations import codebook_size, vq_vs_ibq
from experiments.ablations.base import Arm
from experiments.ablations.changes import CODEBOOK_SIZE, Times, of_quantizer

PUBLISHED = vq_vs_ibq.ABLATION.arm("ibq_published").changes
OUTSIDE = {**PUBLISHED, **of_quantizer({"double": False, "beta_on": "commitment"})}

METHODS: dict[str, Mapping[str, Any]] = {
    "VQ": vq_vs_ibq.ABLATION.arm("vq_published").changes,
    "VQ, features": vq_vs_ibq.ABLATION.arm("vq_features").changes,
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
    "vq_features": "VQ, features",
    "ibq": "IBQ",
    "outside": "IBQ outside its recipe",
    "ibq_single": "IBQ without double term",
    "ibq_no_entropy": "IBQ without entropy",
    "ibq_uniform": "IBQ with U(±1/K) codes",
    "ibq_copied": "IBQ without soft path to features",
    "ibq_top_8": "IBQ on the 8 best codes",
}
MAPPED = ("outside", "ibq", "ibq_single", "vq_features")
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
"""Words in the names of arms by their levels of K, of tokens a mean, and of the remedy; lengths have their own."""
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
    arm("vq_features", "usual", 64),
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
    arm("vq_features", "usual", 64, K="×4"),
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
