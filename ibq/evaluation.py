"""Evaluation of a tokenizer on a stated split: usage, rate and distortion side by side, with the protocol that the numbers belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ibq.analysis import QuantizationError
from ibq.data import DataError, Images
from ibq.data.images import one_line
from ibq.metrics import ImageQuality, usage_metrics
from ibq.metrics.distances import Distances, to_uint8, too_few
from ibq.metrics.perceptual import LPIPS, Backbone, backbone_weights, lpips_network
from ibq.models.tokenizer import Tokenizer

SHOWN_IMAGES = 8
LPIPS_BACKBONES: dict[str, Backbone] = {"lpips-alex": "alex", "lpips-vgg": "vgg"}
PERCEPTUAL = ("fashion-cnn", "inception", *LPIPS_BACKBONES)
"""Metrics that need a trained network, by the name of the network."""


@contextmanager
def evaluating(tokenizer: Tokenizer) -> Iterator[None]:
    """Eval mode without gradients; the mode before is restored."""
    mode = tokenizer.training
    tokenizer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        tokenizer.train(mode)


def evaluate(
    tokenizer: Tokenizer, images: Images, n_images: int, batch_size: int, weights: str
) -> tuple[dict[str, float], dict[str, Any], dict[str, torch.Tensor]]:
    """Reconstruct the first `n_images` of a split in float32.

    Args:
        tokenizer: on the device to compute on.
        images: the split; its name stands in the protocol.
        n_images: how many, from the start of the split; at most all.
        batch_size: images a forward pass; changes nothing but speed.
        weights: which weights these are ("ema" or "raw"), for the protocol.

    Returns:
        metrics (usage_metrics, ImageQuality, quantization_error relative to the variance of z, both in the space of the codes, and for
        Fashion-MNIST the distances in the features of fashion-cnn); protocol, which also says why distances are absent; and tensors:
        counts_K, images_BCHW and reconstructions_BCHW (uint8, the first 8).
    """
    n_images = min(n_images, len(images))
    device = next(tokenizer.parameters()).device
    counts_K = torch.zeros(tokenizer.config.quantizer.codebook_size, dtype=torch.int64, device=device)
    quality, error, shown = ImageQuality(), QuantizationError(), None
    distances, absent = None, ""
    try:
        distances = _fashion_cnn_distances(images, n_images, device)
    except (ImportError, DataError) as reason:
        absent = f"absent: {one_line(reason)}"
    with evaluating(tokenizer):
        for indices_B in torch.arange(n_images).split(batch_size):
            x_BCHW = images.batch(indices_B, device)
            y_BCHW, z_BDHW, quantized = tokenizer(x_BCHW)
            quality.update(x_BCHW, y_BCHW)
            if distances:
                distances.update(y_BCHW)
            error.update(tokenizer.quantize.to_code_space(z_BDHW), quantized.z_q)
            counts_K += torch.bincount(quantized.indices.flatten(), minlength=len(counts_K))
            shown = shown if shown is not None else (to_uint8(x_BCHW[:SHOWN_IMAGES]), to_uint8(y_BCHW[:SHOWN_IMAGES]))
    assert shown is not None
    metrics = usage_metrics(counts_K) | quality.compute() | {"quantization_error": error.compute()}
    perceptual, perceptual_protocol = distances.compute() if distances else ({}, {"distances[fashion-cnn]": absent})
    tensors = {"counts_K": counts_K, "images_BCHW": shown[0], "reconstructions_BCHW": shown[1]}
    return metrics | perceptual, _protocol(images, n_images, weights) | perceptual_protocol, tensors


class PerceptualEvaluation:
    """One of the metrics that need a trained network, which is loaded once for any number of tokenizers.

    Args:
        name: of PERCEPTUAL.
        device: where the network computes.

    Raises:
        DataError: the network's weights are absent or damaged; one sentence that names the file.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._start: Callable[[torch.Tensor], Distances | LPIPS]  # takes the references
        if name in LPIPS_BACKBONES:
            backbone = LPIPS_BACKBONES[name]
            network = lpips_network(backbone, backbone_weights(backbone)).to(device)
            self._start = lambda _: LPIPS(backbone, network)
        else:
            from ibq.metrics.extractors import fashion_cnn_extractor, inception_extractor

            extractor = {"fashion-cnn": fashion_cnn_extractor, "inception": inception_extractor}[name](device)
            self._start = partial(Distances, extractor)

    def __call__(
        self, tokenizer: Tokenizer, images: Images, n_images: int, batch_size: int, weights: str
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Arguments as in `evaluate`; metrics and protocol. DataError: the metric means nothing on these images, or on so few."""
        if self.name == "fashion-cnn":
            _check_fashion_mnist(images)
        n_images = min(n_images, len(images))
        metric = self._start(images.images_NCHW[:n_images])
        with evaluating(tokenizer):
            for indices_B in torch.arange(n_images).split(batch_size):
                x_BCHW = images.batch(indices_B, next(tokenizer.parameters()).device)
                y_BCHW, _, _ = tokenizer(x_BCHW)
                if isinstance(metric, LPIPS):
                    metric.update(x_BCHW, y_BCHW)
                else:
                    metric.update(y_BCHW)
        metrics, protocol = metric.compute()
        if not metrics:
            raise DataError(f"{self.name} is {next(iter(protocol.values()))}; evaluate more images")
        return metrics, _protocol(images, n_images, weights) | protocol


def _fashion_cnn_distances(images: Images, n_images: int, device: torch.device) -> Distances:
    """Ready to be fed. DataError: they would mean nothing here, or the weights are absent; ImportError: torch-fidelity is."""
    _check_fashion_mnist(images)
    if reason := too_few(n_images):  # said before seconds are spent on importing
        raise DataError(reason)
    from ibq.metrics.extractors import fashion_cnn_extractor

    return Distances(fashion_cnn_extractor(device), images.images_NCHW[:n_images])


def _check_fashion_mnist(images: Images) -> None:
    if images.name != "fashion-mnist":
        raise DataError(f"fashion-cnn knows Fashion-MNIST, not {images.name}")


def _protocol(images: Images, n_images: int, weights: str) -> dict[str, Any]:
    return {"split": images.split, "n_images": n_images, "weights": weights, "precision": "fp32", "images": "float in [-1, 1], clamped"}
