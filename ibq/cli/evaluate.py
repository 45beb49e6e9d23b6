"""`ibq evaluate MODEL PICTURES`: usage, rate and distortion of a tokenizer on a folder of pictures.

Suffixes: B pictures, C channels, H W pixels, K codes.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ibq.cli.common import (
    PIXEL_PROTOCOL,
    Batch,
    Model,
    PictureOptions,
    closing_line,
    open_model,
    progress,
    reconstructed,
)
from ibq.cli.pictures import PictureFolder
from ibq.data.images import one_line
from ibq.errors import ConfigError, DataError, nearest, require_packages
from ibq.evaluation.tokenizer import LPIPS_BACKBONES, PERCEPTUAL, PerceptualEvaluation
from ibq.metrics.codebook import QuantizationError
from ibq.metrics.distances import NAMES, PairedDistances, too_few
from ibq.metrics.perceptual import LPIPS
from ibq.metrics.quality import SSIM_WINDOW, pixel_errors, ssim
from ibq.metrics.usage import usage_metrics
from ibq.run_directory import write_json

DEFAULT_PERCEPTUAL = ("inception", "lpips-alex", "lpips-vgg")


class Perceptual:
    """A metric that needs a trained network, gathered batch by batch; whatever goes wrong in it costs this metric
    alone.

    Args:
        name: of PERCEPTUAL.
        n_pictures: how many there are at most.
        device: where the network computes.
    """

    def __init__(self, name: str, n_pictures: int, device: torch.device) -> None:
        self.name, self.reason = name, None if name in LPIPS_BACKBONES else too_few(n_pictures)
        self._metric: LPIPS | PairedDistances | None = None
        if self.reason is None:
            try:
                network = PerceptualEvaluation(name, device).network
            except DataError as error:
                self.reason = str(error)
            else:
                self._metric = (
                    LPIPS(LPIPS_BACKBONES[name], network)
                    if isinstance(network, nn.Module)
                    else PairedDistances(network)
                )

    def update(self, batch: Batch) -> None:
        if self._metric is None:
            return
        try:
            if isinstance(self._metric, LPIPS):
                self._metric.update(batch.originals_BCHW, batch.reconstructions_BCHW)
            else:
                positions = [picture.position for picture in batch.pictures]
                self._metric.update(positions, batch.originals_BCHW, batch.reconstructions_BCHW)
        except Exception as error:  # as in `ibq.evaluation.tokenizer`: it can be done without
            self._metric, self.reason = None, one_line(error)

    def compute(self) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
        """Numbers, the protocol of each, and why others are absent, by label."""
        if self._metric is None:
            suffix = "[fashion-cnn]" if self.name == "fashion-cnn" else ""
            labels = (
                [f"lpips[{LPIPS_BACKBONES[self.name]}]"]
                if self.name in LPIPS_BACKBONES
                else [f"{name}{suffix}" for name in NAMES]
            )
            return {}, {}, dict.fromkeys(labels, self.reason or "")
        if isinstance(self._metric, LPIPS):
            metrics, protocol = self._metric.compute()
            return metrics, protocol, {}
        try:
            metrics, absent = self._metric.compute()
        except Exception as error:
            self._metric, self.reason = None, one_line(error)
            return self.compute()
        return metrics, dict.fromkeys(metrics, self._metric.provenance()), absent


class PictureEvaluation:
    """All numbers of a tokenizer on pictures of any size, gathered batch by batch.

    Means over pictures are summed in the order of their files, whatever the batches were.

    Args:
        codebook_size: K.
        perceptual: metrics that need a network.
        device: where the tokenizer computes.
    """

    def __init__(self, codebook_size: int, perceptual: list[Perceptual], device: torch.device) -> None:
        self._counts_K = torch.zeros(codebook_size, dtype=torch.int64, device=device)
        self._error = QuantizationError()
        self._perceptual = perceptual
        self._values: dict[str, dict[int, float]] = {"l1": {}, "mse": {}, "psnr_db": {}, "ssim": {}}
        self.sizes: dict[str, int] = {}

    @property
    def pictures(self) -> int:
        return len(self._values["l1"])

    @torch.no_grad()
    def update(self, batch: Batch, model: Model) -> None:
        """Add a batch."""
        each_B = pixel_errors(batch.originals_BCHW, batch.reconstructions_BCHW)
        height, width = batch.originals_BCHW.shape[2:]
        if min(height, width) >= SSIM_WINDOW:
            each_B["ssim"] = ssim(batch.originals_BCHW, batch.reconstructions_BCHW)
        for name, values_B in each_B.items():
            self._values[name] |= zip((picture.position for picture in batch.pictures), values_B.tolist(), strict=True)
        self._error.update(model.tokenizer.quantize.to_code_space(batch.features_BDHW), batch.codes_BDHW)
        self._counts_K += torch.bincount(batch.indices_BHW.flatten(), minlength=len(self._counts_K))
        for metric in self._perceptual:
            metric.update(batch)
        self.sizes[f"{width}×{height}"] = self.sizes.get(f"{width}×{height}", 0) + len(batch.pictures)

    def compute(self) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
        """Numbers, the protocol of each, and why others are absent, by label; at least one picture must have been
        added.

        Raises:
            ConfigError: a number is not finite.
        """
        metrics = usage_metrics(self._counts_K)
        tokens, n = int(metrics["tokens"]), self.pictures
        protocol = dict.fromkeys(metrics, f"over {tokens:,} tokens of {n:,} pictures, K = {len(self._counts_K):,}")
        absent = {}
        for name, values in self._values.items():
            if len(values) == n:
                metrics[name] = math.fsum(values[position] for position in sorted(values)) / n
                protocol[name] = f"mean over {n:,} pictures; {PIXEL_PROTOCOL}"
        if "ssim" in metrics:
            protocol["ssim"] += f"; {SSIM_WINDOW}×{SSIM_WINDOW} Gaussian window of sigma 1.5"
        else:
            smaller = n - len(self._values["ssim"])
            absent["ssim"] = (
                f"its window has {SSIM_WINDOW} pixels a side, and {smaller:,} of {n:,} pictures are smaller"
            )
        metrics["quantization_error"] = self._error.compute()
        protocol["quantization_error"] = (
            f"squared error over the variance of z, in the space of the codes, over {tokens:,} tokens"
        )
        for metric in self._perceptual:
            more, more_protocol, more_absent = metric.compute()
            metrics, protocol, absent = metrics | more, protocol | more_protocol, absent | more_absent
        if unusable := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise ConfigError(f"{', '.join(unusable)} came out as no finite number; the model's weights are damaged")
        return metrics, protocol, absent


def evaluate(given: PictureOptions, metrics: tuple[str, ...], out: Path | None) -> None:
    """Print the numbers of a tokenizer on a folder of pictures.

    Args:
        given: model and pictures.
        metrics: of PERCEPTUAL, those that need a network; () is DEFAULT_PERCEPTUAL, ("none",) is none.
        out: a JSON file for all of it.

    Raises:
        ConfigError, DataError: an argument cannot be used, or a number is not finite.
    """
    if out and out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file")
    if unknown := [name for name in metrics if name not in (*PERCEPTUAL, "none")]:
        raise ConfigError(f"--metric {unknown[0]} does not exist; {nearest(unknown[0], [*PERCEPTUAL, 'none'])}")
    if "none" in metrics and len(set(metrics)) > 1:
        other = next(name for name in metrics if name != "none")
        raise ConfigError(f"--metric none and --metric {other} contradict each other; leave one out")
    require_packages("torchmetrics", "torch_fidelity", "torchvision", "lpips")
    model, pictures = open_model(given)
    device = next(model.tokenizer.parameters()).device
    wanted = dict.fromkeys(metrics or DEFAULT_PERCEPTUAL)
    perceptual = [Perceptual(name, len(pictures.names), device) for name in wanted if name != "none"]
    evaluation = PictureEvaluation(model.tokenizer.config.quantizer.codebook_size, perceptual, device)
    with progress(len(pictures.names)) as bar:
        for batch in reconstructed(model, pictures, pictures.names, given.batch_size):
            evaluation.update(batch, model)
            bar.update(len(batch.pictures))
        bar.update(bar.total - bar.n)
    pictures.require_used(evaluation.pictures)
    numbers, protocol, absent = evaluation.compute()
    facts = model.facts(pictures.framing) | {"pictures": _number_and_sizes(pictures, evaluation)}
    print(_table(facts, numbers, protocol, absent))
    if out:
        write_json(out, _as_json(facts, numbers, protocol, absent, pictures, evaluation))
    print(closing_line(pictures, evaluation.pictures, device), file=sys.stderr)


def _number_and_sizes(pictures: PictureFolder, evaluation: PictureEvaluation) -> str:
    common = sorted(evaluation.sizes, key=lambda size: -evaluation.sizes[size])
    sizes = ", ".join(common[:3]) + (f" and {len(common) - 3:,} more sizes" if len(common) > 3 else "")
    return f"{evaluation.pictures:,} of {sizes}, {len(pictures.skipped):,} skipped"


def _table(facts: dict[str, str], metrics: dict[str, float], protocol: dict[str, str], absent: dict[str, str]) -> str:
    """Facts, then a line for each number with its protocol, then what is absent."""
    width = max(map(len, [*facts, *metrics, *absent]))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    lines += ["", *(f"{name:<{width}}  {value:>12,.6g}  {protocol[name]}" for name, value in metrics.items())]
    lines += [f"{name:<{width}}  {'absent':>12}  {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _as_json(
    facts: dict[str, str],
    metrics: dict[str, float],
    protocol: dict[str, str],
    absent: dict[str, str],
    pictures: PictureFolder,
    evaluation: PictureEvaluation,
) -> dict[str, Any]:
    return {
        "facts": facts,
        "metrics": {name: {"value": value, "protocol": protocol[name]} for name, value in metrics.items()},
        "absent": absent,
        "pictures": evaluation.pictures,
        "sizes": evaluation.sizes,
        "skipped": pictures.skipped,
    }
