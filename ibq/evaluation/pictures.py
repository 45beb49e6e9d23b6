"""Evaluation of a tokenizer on pictures of any size, batch by batch: each number with its protocol, and why others are
absent.

Suffixes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch

from ibq.errors import ConfigError, DataError
from ibq.evaluation.tokenizer import OF_PAIRS, PerceptualEvaluation, TokenizerMetrics, measured, sparing
from ibq.metrics.dimension import FORMS
from ibq.metrics.distances import Distances, PairedDistances, too_few
from ibq.metrics.perceptual import PerceptualDistance
from ibq.metrics.quality import RELEASED_PSNR, RELEASED_SSIM, SSIM_WINDOW
from ibq.metrics.usage import uncountable
from ibq.models.tokenizer import Reconstruction, Tokenizer

PIXEL_PROTOCOL = "float images in [-1, 1], reconstructions clamped, not rounded to 8 bits"


class PerceptualMetric:
    """A metric that needs a trained network, gathered batch by batch; whatever goes wrong in it costs this metric
    alone.

    Args:
        name: of PERCEPTUAL.
        n_pictures: how many there are at most.
        device: where the network computes.
    """

    def __init__(self, name: str, n_pictures: int, device: torch.device) -> None:
        evaluation = PerceptualEvaluation(name, device)
        self._labels = evaluation.labels
        self._metric: Distances | PerceptualDistance | None = None
        self._absent: list[str] = []
        if name not in OF_PAIRS and (reason := too_few(n_pictures)):
            self._absent.append(reason)
            return
        try:
            self._metric = evaluation.metric()
        except DataError as error:
            self._absent.append(str(error))

    def update(self, positions: list[int], originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> None:
        """Add a batch, as `PairedDistances.add_pairs`."""
        if self._absent:
            return
        with sparing(self._absent):
            if isinstance(self._metric, PairedDistances):
                self._metric.add_pairs(positions, originals_BCHW, reconstructions_BCHW)
            elif isinstance(self._metric, PerceptualDistance):
                self._metric.update(originals_BCHW, reconstructions_BCHW)

    def compute(self) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
        """Numbers, the protocol of each, and why others are absent, by label."""
        metrics, said = measured(self._metric, self._absent)
        if self._absent:
            return {}, {}, dict.fromkeys(self._labels, self._absent[0])
        of_all = next((text for name, text in said.items() if name.startswith("distances")), "")
        texts = {label: said.get(label, of_all) for label in self._labels}
        absent = {label: text.removeprefix("absent: ") for label, text in texts.items() if label not in metrics}
        return metrics, {label: text for label, text in texts.items() if label in metrics}, absent


class PictureEvaluation:
    """All numbers of a tokenizer on pictures of any size, gathered batch by batch.

    Args:
        tokenizer: on the device to compute on.
        perceptual: metrics that need a network.
    """

    def __init__(self, tokenizer: Tokenizer, perceptual: list[PerceptualMetric]) -> None:
        self._gathered = TokenizerMetrics(tokenizer)
        self._perceptual = perceptual
        self.sizes: dict[str, int] = {}

    @property
    def pictures(self) -> int:
        return self._gathered.quality.images

    def update(self, positions: list[int], originals_BCHW: torch.Tensor, output: Reconstruction) -> None:
        """Add a batch of one size: the places of its pictures among all, what the tokenizer was shown, and what it
        returned."""
        self._gathered.update(originals_BCHW, output)
        for metric in self._perceptual:
            metric.update(positions, originals_BCHW, output.images)
        height, width = originals_BCHW.shape[2:]
        self.sizes[f"{width}×{height}"] = self.sizes.get(f"{width}×{height}", 0) + len(originals_BCHW)

    def compute(self) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
        """Numbers, the protocol of each, and why others are absent, by label; at least one picture must have been
        added.

        Raises:
            ConfigError: a number is not finite.
        """
        metrics, absent = self._gathered.compute(), {}
        tokens, n, K = self._gathered.tokens, self.pictures, self._gathered.codebook_size
        if reason := uncountable(K):
            absent["usage"] = reason
        protocol = dict.fromkeys(metrics, f"over {tokens:,} tokens of {n:,} pictures, K = {K:,}")
        of_quality = f"mean over {n:,} pictures; {PIXEL_PROTOCOL}"
        protocol |= dict.fromkeys(self._gathered.quality.compute(), of_quality)
        protocol["quantization_error"] = (
            f"squared error over the variance of z, in the space of the codes, over {tokens:,} tokens"
        )
        for name in (name for name in metrics if name.startswith("dimension")):
            form = FORMS[name.partition("_")[0]]
            protocol[name] = f"{form}, in the space of the codes, over {tokens:,} tokens"
        protocol["psnr_db"] += f" ({RELEASED_PSNR})"
        if "ssim" in metrics:
            protocol["ssim"] += f"; {SSIM_WINDOW}×{SSIM_WINDOW} Gaussian window of sigma 1.5 ({RELEASED_SSIM})"
        else:
            smaller = self._gathered.quality.without_ssim
            absent["ssim"] = (
                f"its window has {SSIM_WINDOW} pixels a side, and {smaller:,} of {n:,} pictures are smaller"
            )
        for metric in self._perceptual:
            more, more_protocol, more_absent = metric.compute()
            metrics, protocol, absent = metrics | more, protocol | more_protocol, absent | more_absent
        if unusable := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise ConfigError(f"{', '.join(unusable)} came out as no finite number; the model's weights are damaged")
        return metrics, protocol, absent
