"""Panels over training: title, axis label and values of each curve, for the report's figures and the explorer's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ibq.metrics import METRICS

Line = dict[str, Any]
"""A log step: a line of history.jsonl."""
Curve = Callable[[Line, int], float]
"""The value at a log step of a run of K codes, NaN where the line has none."""


class Panel(NamedTuple):
    """A plot over training steps.

    Attributes:
        title: above it.
        label: of the y axis, with the unit.
        curve: of a run.
        reference: that of indifference, dashed and drawn once for each K.
        second: another one of the run, dashed.
        absent: what to say where no run has the curve.
        log: whether the y axis is logarithmic where that shows more.
        least: the y axis begins here where it is linear; None: where the values do.
        most: the y axis ends here where it is linear; None: where the values do.
    """

    title: str
    label: str
    curve: Curve
    reference: Curve | None = None
    second: Curve | None = None
    absent: str = "Not in the history of this run."
    log: bool = False
    least: float | None = 0.0
    most: float | None = None


def logged(name: str, factor: float = 1.0) -> Curve:
    """A number of the log."""
    return lambda line, K: factor * line.get(name, math.nan)


def share_of_codes(name: str) -> Curve:
    """A number of the log that counts codes, in per cent of K."""
    return lambda line, K: 100 * line.get(name, math.nan) / K


NO_GRADIENT = "No gradient reaches a codebook here: its codes are fixed, or set without one."
OF_VARIANCE = "distance / variance of z"
EFFECTIVE = "effective dimension, of D"
NO_DIMENSION = "No dimension of codes is logged."

USAGE = Panel("Codes used", "codes used, %", logged("usage", 100), logged("uniform_usage", 100), most=104)
PERPLEXITY = Panel(
    "Perplexity", METRICS["share"].axis, share_of_codes("perplexity"), share_of_codes("uniform_perplexity"), most=104
)
DIMENSION_USED = Panel("Dimension, used codes", EFFECTIVE, logged("dimension_used"), absent=NO_DIMENSION)
DIMENSION99_USED = Panel("d_99, used codes", "dimensions, of D", logged("dimension99_used"), absent=NO_DIMENSION)
DIMENSION_CODES = Panel("Dimension, all codes", EFFECTIVE, logged("dimension_codes"), absent=NO_DIMENSION)
DIMENSION_FEATURES = Panel(
    "Dimension, features", EFFECTIVE, logged("dimension_features"), absent="No dimension is logged."
)
PIXEL_ERROR = Panel("Reconstruction error", "pixel term, mean", logged("pixel_mean"))
CODE_NORM = Panel("Norm of codes", "mean over all codes", logged("code_norm"), log=True)
FEATURE_NORM = Panel("Norm of features", "mean over tokens", logged("feature_norm"), log=True)
QUANTIZATION_ERROR = Panel("Quantization error", "error / variance of z", logged("quantization_error"), log=True)
GAP = Panel("Gap", OF_VARIANCE, logged("gap"), absent="No gap is logged: features do not vary.", log=True)
GAP_ANGULAR = Panel("Angular gap", "of unit vectors", logged("gap_angular"), absent=GAP.absent, log=True)
GAP_USED = Panel(
    "Gap, codes in use", OF_VARIANCE, logged("gap_used"), absent="No gap of codes in use is logged.", log=True
)
GAP_DEAD = Panel(
    "Gap, codes not in use",
    OF_VARIANCE,
    logged("gap_dead"),
    absent="No gap of dead codes: all are in use, or none was logged.",
    log=True,
)
LOGIT_SPREAD = Panel("Spread of logits", "std over codes", logged("logit_spread"), log=True)
MAX_PROBABILITY = Panel(
    "Largest probability",
    "softmax at T = 1 (dashed: 1/K)",
    logged("max_probability"),
    lambda line, K: 1 / K,
    most=1.04,
)
ASSIGNMENT_ENTROPY = Panel(
    "Assignment entropy",
    "nats (dashed: log K)",
    logged("assignment_entropy"),
    lambda line, K: math.log(K),
    absent="No assignment entropy is logged.",
)
REACH = Panel("Effective gradient reach", "% of codes", share_of_codes("reach_effective"), absent=NO_GRADIENT)
ABOVE_EPS = Panel(
    "Gradient above Adam's eps", "% of codes", logged("reach_above_eps", 100), absent=NO_GRADIENT, most=104
)
ENTROPY_PULL = Panel(
    "Pull of the entropy term",
    "gradient / all other terms'",
    logged("entropy_pull"),
    absent="No pull: the entropy penalty is off.",
    log=True,
)
LOSS = Panel("Total", "sum of weighted terms", logged("loss"), least=None)
GRADIENT_NORM = Panel("Gradient", "norm, all parameters", logged("gradient_norm"))
LEARNING_RATE = Panel("Learning rate", "of the update", logged("lr"))
NEXT_TOKEN = Panel("Next token", "cross-entropy, nats a token", logged("loss"), lambda line, K: math.log(K))
LOGIT_REAL = Panel("Real", "mean logit of training images", logged("logit_real"), least=None)
LOGIT_FAKE = Panel("Reconstructed", "mean logit of reconstructions", logged("logit_fake"), least=None)
ADVERSARIAL = Panel("Generator", "weighted adversarial term", logged("weighted_adversarial"), least=None)


def loss_term(name: str) -> Panel:
    """A term of the loss as it is, and with its weight (dashed) where that differs.

    Args:
        name: of the log, e.g. "loss_pixel".
    """
    weighted = name.replace("loss_", "weighted_", 1)

    def differs(line: Line, K: int) -> float:
        value = line.get(weighted, math.nan)
        return value if abs(value - line.get(name, math.nan)) > 1e-9 else math.nan

    unit = "nats" if name.endswith("entropy") else "mean"
    title = name.removeprefix("loss_").replace("_", " ").capitalize()
    return Panel(title, unit, logged(name), second=differs, least=None)
