"""Evaluation of a tokenizer on a stated split: usage, rate and distortion side by side, with the protocol that the
numbers belong to.

Several processes share an evaluation batch by batch: every batch is that of one process, whoever computes it, no image
is padded or counted twice, and each process has a run of batches, rank 0 the first, so that what they gather is in the
order of the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibq.data import ImageSource
from ibq.data.images import one_line
from ibq.data.resizing import RESIZING
from ibq.distributed import copy_of_first, gather_objects, is_writer, rank, shared_errors, sum_over_ranks, world_size
from ibq.errors import DataError, NonFiniteInputError
from ibq.metrics.codebook import QuantizationError
from ibq.metrics.dimension import IN_WORDS, Moments, dimension_metrics
from ibq.metrics.distances import EXTRACTED_AT_ONCE, NAMES, Distances, PairedDistances, References, to_uint8, too_few
from ibq.metrics.perceptual import (
    LPIPS,
    Backbone,
    EfficientNetLite0Distance,
    PerceptualDistance,
    backbone_weights,
    efficientnet_lite0_distance,
    lpips_network,
    too_small,
)
from ibq.metrics.quality import ImageQuality
from ibq.metrics.usage import counts_of, part_counts_of, part_usage_metrics, uncountable, usage_metrics
from ibq.models.tokenizer import Reconstruction, Tokenizer
from ibq.ops.precision import full_float32

if TYPE_CHECKING:
    from ibq.pretrained.extractors import Extractor

SHOWN_IMAGES = 8
LPIPS_BACKBONES: dict[str, Backbone] = {"lpips-alex": "alex", "lpips-vgg": "vgg"}
DIMENSION_PROTOCOL = (
    f"{IN_WORDS}; of the features of these images in the space of the codes, of all codes, and of the codes in use, "
    "each weighted by its tokens in these images"
)
OF_PAIRS = {"lpips-alex": "lpips[alex]", "lpips-vgg": "lpips[vgg]"} | {
    "perceptual-efficientnet-lite0": "perceptual[efficientnet-lite0]"
}
"""Metrics of each image and its reconstruction, and what their numbers are called; the others are of sets of images."""
PERCEPTUAL = ("fashion-cnn", "efficientnet-lite0", "inception", *OF_PAIRS)
"""Metrics that need a trained network, by the name of the network."""
JUDGES = {"fashion-mnist": ("fashion-cnn", "efficientnet-lite0")}
"""Networks by whose features the images of a data set are judged, those that know them best first."""
JUDGE_OF_OTHERS = ("efficientnet-lite0",)


class UnfitError(DataError):
    """A metric means nothing on these images, or fails on them; it may do on others."""


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode before is restored."""
    mode = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(mode)


@contextmanager
def measuring(network: nn.Module) -> Iterator[None]:
    """`evaluating` in whole float32, neither autocast nor TF32: what is reported must not depend on how training was
    made fast."""
    with evaluating(network), full_float32(next(network.parameters()).device, convolutions=True):
        yield


@contextmanager
def sparing(reasons: list[str]) -> Iterator[None]:
    """Note of whatever goes wrong in a metric that can be done without, so that it costs the metric alone and no
    trained run."""
    try:
        yield
    except Exception as error:
        reasons.append(one_line(error))


def own_batches(n: int, batch_size: int) -> list[torch.Tensor]:
    """This process's batches of the numbers below n, ascending; those of all ranks one after the other are all of
    them."""
    of_all = torch.arange(n).split(batch_size)
    return [of_all[b] for b in torch.arange(len(of_all)).tensor_split(world_size())[rank()]]


@dataclass(frozen=True, eq=False)
class Share:
    """The batches of this process among all of the first `n_images`; gone through, it gives their pixels."""

    images: ImageSource
    n_images: int
    batch_size: int

    @property
    def batches(self) -> list[torch.Tensor]:
        """Indices of the images of each batch, ascending."""
        return own_batches(self.n_images, self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for indices_B in torch.cat([torch.arange(0), *self.batches]).split(EXTRACTED_AT_ONCE):
            yield self.images.pixels(indices_B)


class TokenizerMetrics:
    """Usage, effective dimension, quality and quantization error of a tokenizer, gathered batch by batch.

    Args:
        tokenizer: whose forward passes these are, on the device to count on.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, device = tokenizer, next(tokenizer.parameters()).device
        self.quality, self._error = ImageQuality(), QuantizationError()
        self.codebook_size = tokenizer.config.quantizer.codebook_size
        no_tokens = torch.zeros(0, dtype=torch.int64, device=device)
        self.counts_K = counts_of(no_tokens, self.codebook_size)
        self.part_sizes = tokenizer.config.quantizer.part_sizes
        self.part_counts_S = part_counts_of(no_tokens, self.part_sizes)
        self._features = Moments(tokenizer.config.quantizer.code_dim, device)

    @property
    def tokens(self) -> int:
        return self._error.tokens

    @torch.no_grad()
    def update(self, originals_BCHW: torch.Tensor, output: Reconstruction) -> None:
        """Add a batch: what the tokenizer was shown, in [-1, 1], and what it returned."""
        self.quality.update(originals_BCHW, output.images)
        z_BDHW = self._tokenizer.quantize.to_code_space(output.features)
        self._error.update(z_BDHW, output.quantized.z_q)
        self._features.update(z_BDHW.permute(0, 2, 3, 1).flatten(0, 2))
        self.counts_K += counts_of(output.quantized.indices, self.codebook_size)
        self.part_counts_S += part_counts_of(output.quantized.indices, self.part_sizes)

    def reduce(self) -> None:
        """Take in what the other processes have measured; a collective, once, after the last update."""
        sum_over_ranks(self.counts_K, self.part_counts_S)
        self.quality.reduce()
        self._error.reduce()
        self._features.reduce()

    def compute(self) -> dict[str, float]:
        """usage_metrics and the dimension of codes unless the codebook is `uncountable`, usage of parts, the dimension
        of the features, the means of the quality, and quantization_error."""
        usage = {} if uncountable(self.codebook_size) else usage_metrics(self.counts_K)
        usage |= part_usage_metrics(self.part_counts_S, self.part_sizes)
        return usage | self.dimensions() | self.quality.compute() | {"quantization_error": self._error.compute()}

    def dimensions(self) -> dict[str, float]:
        """`dimension_metrics`, of all codes and all codes in use."""
        with measuring(self._tokenizer):
            codebook_KD = None if uncountable(self.codebook_size) else self._tokenizer.quantize.codebook
            return dimension_metrics(self._features, codebook_KD, self.counts_K)


def evaluate(
    tokenizer: Tokenizer, images: ImageSource, n_images: int, batch_size: int, weights: str
) -> tuple[dict[str, float], dict[str, Any], dict[str, torch.Tensor]]:
    """Reconstruct the first `n_images` of a split in float32, or what the tokenizer was cast to; with several processes
    a collective, each computing a share of the batches.

    Args:
        tokenizer: on the device to compute on.
        images: the split; its name stands in the protocol.
        n_images: how many, from the start of the split; at most all.
        batch_size: images a forward pass; for speed and memory, the numbers it changes by rounding at most. The number
            of processes changes less: counts not at all.
        weights: which weights these are ("ema" or "raw"), for the protocol.

    Returns:
        metrics (usage_metrics, part_usage_metrics, dimension_metrics, ImageQuality, quantization_error relative to the
        variance of z, both
        in the space of the codes, and the distances in the features of the data set's JUDGES); protocol, which
        also says why distances or usage are absent; and tensors: counts_K, images_BCHW and reconstructions_BCHW (uint8,
        the first 8 of the first batch; rank 0 alone has these two).

    Raises:
        NonFiniteInputError: features of this or another process have NaN or infinite values.
        DataError: images of this or another process cannot be read.
    """
    n_images = min(n_images, len(images))
    device = next(tokenizer.parameters()).device
    gathered = TokenizerMetrics(tokenizer)
    shown: dict[str, torch.Tensor] = {}
    share = Share(images, n_images, batch_size)
    distances: dict[str, Distances] = {}
    absent: dict[str, list[str]] = {judge: [] for judge in judges_of(images)}
    for judge, reasons in absent.items():
        with sparing(reasons):
            distances[judge] = judge_distances(judge, share, device)
    with shared_errors(NonFiniteInputError, DataError), measuring(tokenizer):
        for indices_B in share.batches:
            x_BCHW = images.batch(indices_B, device)
            output: Reconstruction = tokenizer(x_BCHW)
            gathered.update(x_BCHW, output)
            for judge, reasons in absent.items():
                if not reasons:
                    with sparing(reasons):
                        distances[judge].update(output.images)
            if is_writer() and not shown:
                shown = {
                    "images_BCHW": to_uint8(x_BCHW[:SHOWN_IMAGES]),
                    "reconstructions_BCHW": to_uint8(output.images[:SHOWN_IMAGES]),
                }
    gathered.reduce()
    metrics = gathered.compute()
    protocol = protocol_of(images, n_images, weights, tokenizer.quantize.dtype) | {"dimension": DIMENSION_PROTOCOL}
    for judge, reasons in absent.items():
        found, said = measured(distances.get(judge), reasons)
        metrics |= found
        protocol |= {f"distances[{judge}]": f"absent: {reasons[0]}"} if reasons else said
    if reason := uncountable(tokenizer.config.quantizer.codebook_size):
        protocol["usage"] = f"absent: {reason}"
    return metrics, protocol, {"counts_K": gathered.counts_K} | shown


def measured(
    metric: Distances | PerceptualDistance | None, absent: list[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and protocol over the images of all processes, a collective; where one process fails, all note in
    `absent` why."""
    if isinstance(metric, Distances) and not absent:
        with sparing(absent):
            metric.finish()
    absent[:] = [reason for reasons in gather_objects(absent) for reason in reasons]
    found: tuple[dict[str, float], dict[str, Any]] = {}, {}
    if absent or metric is None:
        return found
    metric.reduce()
    if is_writer():  # FID's square root or KID's subsets on every process would only make all of them slower
        with sparing(absent):
            found = metric.compute()
    found, absent[:] = copy_of_first((found, absent))
    return found


class PerceptualEvaluation:
    """One of the metrics that need a trained network, which is loaded once for any number of tokenizers, when it is
    first needed.

    Args:
        name: of PERCEPTUAL.
        device: where the network computes.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device

    def __call__(
        self, tokenizer: Tokenizer, images: ImageSource, n_images: int, batch_size: int, weights: str
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Arguments as in `evaluate`, as is the work of several processes; metrics and protocol.

        Raises:
            UnfitError: the metric means nothing on these images, or on so few, or fails on them; said before the
                network is sought, if so.
            DataError: the network's weights are absent or damaged, or a package is; one sentence that names the file.
        """
        n_images = min(n_images, len(images))
        self._require_fit(images, n_images)
        share = Share(images, n_images, batch_size)
        with shared_errors(DataError):
            metric = self.metric(share)
        absent: list[str] = []
        with sparing(absent), measuring(tokenizer):
            for indices_B in share.batches:
                x_BCHW = images.batch(indices_B, next(tokenizer.parameters()).device)
                y_BCHW, _, _ = tokenizer(x_BCHW)
                if isinstance(metric, PerceptualDistance):
                    metric.update(x_BCHW, y_BCHW)
                else:
                    metric.update(y_BCHW)
        metrics, protocol = measured(metric, absent)
        if absent or not metrics:
            raise UnfitError(f"{self.name} is {f'absent: {absent[0]}' if absent else next(iter(protocol.values()))}")
        return metrics, protocol_of(images, n_images, weights, tokenizer.quantize.dtype) | protocol

    def distances(self, references: Share) -> Distances:
        """Ready to be fed with images of any origin; arguments and errors as on the call, of a network whose features
        make distances."""
        self._require_fit(references.images, references.n_images)
        with shared_errors(DataError):
            distances = self.metric(references)
        assert isinstance(distances, Distances)
        return distances

    def _require_fit(self, images: ImageSource, n_images: int) -> None:
        if self.name == "fashion-cnn":
            _require_fashion_mnist(images)
        if self.name in OF_PAIRS:
            if reason := too_small(OF_PAIRS[self.name], images.pixels(torch.arange(1))):
                raise UnfitError(reason)
        elif reason := too_few(n_images):
            raise UnfitError(f"{self.name} is absent: {reason}; evaluate more images")

    def metric(self, references: References | None = None) -> Distances | PerceptualDistance:
        """Ready to be fed; without references with pairs of images, `PairedDistances` or a `PerceptualDistance`.
        DataError: as on the call."""
        network = self.network
        if isinstance(network, nn.Module):
            backbone = LPIPS_BACKBONES.get(self.name)
            return LPIPS(backbone, network) if backbone else EfficientNetLite0Distance(network)
        return PairedDistances(network) if references is None else Distances(network, references)

    @property
    def labels(self) -> list[str]:
        """Names of the metrics."""
        if self.name in OF_PAIRS:
            return [OF_PAIRS[self.name]]
        return [name if self.name == "inception" else f"{name}[{self.name}]" for name in NAMES]

    @cached_property
    def network(self) -> Extractor | nn.Module:
        """An extractor of features for `Distances`, or the network of a `PerceptualDistance`. DataError: as on the
        call."""
        try:
            if self.name in LPIPS_BACKBONES:
                backbone = LPIPS_BACKBONES[self.name]
                return lpips_network(backbone, backbone_weights(backbone)).to(self.device)
            if self.name in OF_PAIRS:
                return efficientnet_lite0_distance().to(self.device)
            from ibq.pretrained.extractors import EXTRACTORS

            return EXTRACTORS[self.name](self.device)
        except ImportError as error:
            raise DataError(
                f"{self.name} needs a package that cannot be imported ({one_line(error)}); install ibq again"
            ) from None


def judges_of(images: ImageSource) -> tuple[str, ...]:
    """Names of the networks in whose features images of this data set are compared."""
    return JUDGES.get(images.name, JUDGE_OF_OTHERS)


def judge_distances(judge: str, share: Share, device: torch.device) -> Distances:
    """Distances in the features of one of `judges_of`, ready to be fed. DataError: they would mean nothing here, or the
    weights are absent; ImportError: torch-fidelity is."""
    if reason := too_few(share.n_images):  # said before seconds are spent on importing
        raise UnfitError(reason)
    from ibq.pretrained.extractors import EXTRACTORS

    return Distances(EXTRACTORS[judge](device), share)


def _require_fashion_mnist(images: ImageSource) -> None:
    if images.name != "fashion-mnist":
        raise UnfitError(f"fashion-cnn knows Fashion-MNIST, not {images.name}")


def protocol_of(images: ImageSource, n_images: int, weights: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Protocol of the numbers of a network; dtype is that of its weights."""
    protocol = {
        "split": images.split,
        "n_images": n_images,
        "weights": weights,
        "precision": {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype)),
        "images": "float in [-1, 1], clamped",
    }
    protocol |= {"resize": RESIZING[images.resize]} if images.resize else {}
    return protocol | ({"unusable_files": len(images.skipped)} if images.skipped else {})
