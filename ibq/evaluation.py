"""Evaluation of a tokenizer on a stated split: usage, rate and distortion side by side, with the protocol that the numbers belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ibq.analysis import QuantizationError
from ibq.data import DataError, Images
from ibq.data.images import one_line
from ibq.metrics import ImageQuality, usage_metrics
from ibq.metrics.distances import Distances, to_uint8, too_few
from ibq.models.tokenizer import Tokenizer

SHOWN_IMAGES = 8


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
        Fashion-MNIST the distances in the features of fashion-cnn); protocol, which also says why a distance is absent; and tensors:
        counts_K, images_BCHW and reconstructions_BCHW (uint8, the first 8).
    """
    n_images = min(n_images, len(images))
    device = next(tokenizer.parameters()).device
    counts_K = torch.zeros(tokenizer.config.quantizer.codebook_size, dtype=torch.int64, device=device)
    quality, error, shown = ImageQuality(), QuantizationError(), None
    distances = _stand_in(images, n_images, device)
    with evaluating(tokenizer):
        for indices_B in torch.arange(n_images).split(batch_size):
            x_BCHW = images.batch(indices_B, device)
            y_BCHW, z_BDHW, quantized = tokenizer(x_BCHW)
            quality.update(x_BCHW, y_BCHW)
            if isinstance(distances, Distances):
                distances.update(y_BCHW)
            error.update(tokenizer.quantize.to_code_space(z_BDHW), quantized.z_q)
            counts_K += torch.bincount(quantized.indices.flatten(), minlength=len(counts_K))
            shown = shown if shown is not None else (to_uint8(x_BCHW[:SHOWN_IMAGES]), to_uint8(y_BCHW[:SHOWN_IMAGES]))
    assert shown is not None
    metrics = usage_metrics(counts_K) | quality.compute() | {"quantization_error": error.compute()}
    protocol = {"split": images.split, "n_images": n_images, "weights": weights, "precision": "fp32", "images": "float in [-1, 1], clamped"}
    if isinstance(distances, Distances):
        perceptual, perceptual_protocol = distances.compute()
    else:
        perceptual, perceptual_protocol = {}, {"distances[fashion-cnn]": f"absent: {distances}"}
    tensors = {"counts_K": counts_K, "images_BCHW": shown[0], "reconstructions_BCHW": shown[1]}
    return metrics | perceptual, protocol | perceptual_protocol, tensors


def _stand_in(images: Images, n_images: int, device: torch.device) -> Distances | str:
    """Distances in the features of fashion-cnn, for Fashion-MNIST; or a phrase that says why there are none."""
    if images.name != "fashion-mnist":
        return f"fashion-cnn knows Fashion-MNIST, not {images.name}"
    if reason := too_few(n_images):  # known before seconds are spent on importing
        return reason
    try:
        from ibq.metrics.extractors import fashion_cnn_extractor

        return Distances(fashion_cnn_extractor(device), images.images_NCHW[:n_images])
    except (ImportError, DataError) as error:
        return one_line(error)
