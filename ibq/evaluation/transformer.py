"""Evaluation of a transformer: how well it predicts the tokens of images that it has not seen, and what it samples,
with the protocol.

Suffixes: N images or samples, B those of a batch, T tokens of an image, C channels, H W pixels, L classes of
    fashion-cnn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ibq.config import TRANSFORMER_VERSION, TransformerTrainConfig
from ibq.data import ImageSource
from ibq.data.shards import Parts
from ibq.data.tokens import Tokens, decode
from ibq.distributed import copy_of_first, gather_objects, is_writer, shared_errors, sum_of_numbers
from ibq.errors import NonFiniteError
from ibq.evaluation.tokenizer import (
    PerceptualEvaluation,
    Share,
    judge_distances,
    judges_of,
    measured,
    measuring,
    own_batches,
    protocol_of,
    sparing,
)
from ibq.losses import NextTokenLoss
from ibq.metrics.distances import Distances, to_uint8
from ibq.models.tokenizer import Tokenizer, digest_of
from ibq.models.transformer import Transformer
from ibq.sampling import Guidance, Sampler, Sampling
from ibq.training.runtime import Runtime, StopRequested

PART = 250
"""Samples of a file: what a kill may cost at most."""
SHOWN_IMAGES, SHOWN_OF_A_CLASS = 100, 10
DECODED_AT_ONCE = 64

Metrics = dict[str, float]
Protocol = dict[str, Any]


def evaluate_transformer(
    config: TransformerTrainConfig,
    transformer: Transformer,
    tokenizer: Tokenizer,
    images: ImageSource,
    tokens: Tokens,
    runtime: Runtime,
    folder: Path,
    beat: Callable[[], bool],
) -> tuple[Metrics, Protocol, dict[str, torch.Tensor]]:
    """Cross-entropy on the test split and the quality of samples, all in whole float32; with several processes a
    collective.

    Sample i has class i mod classes and a stream of random numbers of its own, temperature 1 and no truncation; the
    same numbers at each guidance. Bits per image compare nothing by themselves: a codebook that has collapsed has few
    bits.

    Args:
        config: the transformer's; its seed is that of the samples.
        transformer: with the weights that the run is to be judged by, whole on each process, on the device to compute
            on.
        tokenizer: on the same device.
        images: the test split, whose first `runtime.eval_images` are the references.
        tokens: those of the same split, of which as many count.
        runtime: eval_images, eval_batch_size, samples, guidances and compile count; without class_dropout, of the
            guidances 1 alone, as no unconditional class was trained.
        folder: where finished parts of samples lie, so that an evaluation that was killed repeats none.
        beat: called before every batch, so that it may do no collective; True on any process asks all to stop.

    Returns:
        metrics: cross_entropy (nats a token), bits_per_image, uniform_bits_per_image (if nothing were known of any
        token), sample_images_per_s; for each guidance g `fid[fashion-cnn]@g` (or of the first of the JUDGES of other
        data), kid, is, precision and recall likewise, for Fashion-MNIST also label_agreement (the share of samples that
        fashion-cnn takes for the class they were asked for); the same without `@g` at the guidance with the lowest FID,
        and this `guidance`. Protocol, which also says why any is absent. Tensors: `classes_N`; `tokens@g` (N, T) int32;
        and, on rank 0 alone, `shown_N`, which samples are `images@g`, uint8 (N, C, H, W): the first 10 of each class,
        up to 100.

    Raises:
        NonFiniteError: the transformer's predictions have NaN or infinite values.
        StopRequested: finished parts are kept.
    """
    guidances = tuple(g for g in runtime.guidances if g == 1 or config.model.class_dropout)
    listed = (
        _listed(guidances)
        if guidances == runtime.guidances
        else "1 at most: class_dropout=0 trains no unconditional class"
    )
    runtime = dataclasses.replace(runtime, guidances=guidances)
    n_images = min(runtime.eval_images, len(images))
    metrics = _likelihood(config, transformer, tokens, n_images, runtime.eval_batch_size, beat)
    protocol = protocol_of(images, n_images, "raw" if config.optim.ema_decay is None else "ema") | {
        "cross_entropy": f"nats a token given those before it, over the first {n_images} images",
        "samples": runtime.samples,
        "sampling": f"temperature 1, no truncation, seed {config.seed}, class of sample i is i mod {config.classes}",
        "guidances": listed,
        "bytes": f"samples are {'cut to bytes, as released' if samples_are_cut(tokenizer) else 'rounded to bytes'}",
        "tokenizer_sha256": tokenizer.digest(),
    }
    judge = judges_of(images)[0]
    if not (runtime.samples and runtime.guidances):
        reason = f"absent: samples={runtime.samples} at {len(runtime.guidances)} guidances are asked for"
        return metrics, protocol | {f"distances[{judge}]": reason, "sample_images_per_s": reason}, {}

    classes_N = torch.arange(runtime.samples) % config.classes
    samples, pace, of_pace = _sample(config, transformer, classes_N, runtime, folder, beat)
    distances: Distances | None = None
    absent: list[str] = []
    with sparing(absent):
        distances = judge_distances(
            judge, Share(images, n_images, runtime.eval_batch_size), next(tokenizer.parameters()).device
        )
    asked_N = classes_N if judge == "fashion-cnn" else None
    quality, of_quality = _compare(distances, absent, f"[{judge}]", tokenizer, samples, asked_N, beat)
    tensors = {"classes_N": classes_N} | {f"tokens@{g:g}": tokens_NT for g, tokens_NT in samples.items()}
    return metrics | pace | quality, protocol | of_pace | of_quality, tensors | _shown(tokenizer, samples, classes_N)


def evaluate_samples(
    perceptual: PerceptualEvaluation,
    tokenizer: Tokenizer,
    tensors: Mapping[str, torch.Tensor],
    images: ImageSource,
    n_images: int,
    batch_size: int,
    beat: Callable[[], bool] = lambda: False,
) -> tuple[Metrics, Protocol]:
    """Distances of the samples of a finished run in the features of another network, such as Inception; a collective.

    Args:
        perceptual: fashion-cnn or inception.
        tokenizer: the run's, on the device to compute on.
        tensors: as `evaluate_transformer` returned them: `tokens@g` count.
        images: the test split, whose first `n_images` are the references.
        batch_size: of reading the references.
        beat: as of `evaluate_transformer`.

    Returns:
        metrics `fid@g` and so on for each guidance, the same without `@g` at the one with the lowest FID, and this as
        `guidance@fid`; and their protocol.

    Raises:
        UnfitError: the distances mean nothing on these images, or on so few.
        DataError: the network's weights are absent or damaged.
    """
    distances = perceptual.distances(Share(images, min(n_images, len(images)), batch_size))
    samples = {
        float(name.removeprefix("tokens@")): tokens_NT
        for name, tokens_NT in tensors.items()
        if name.startswith("tokens@")
    }
    return _compare(distances, [], distances.extractor.suffix, tokenizer, samples, None, beat)


def samples_are_cut(tokenizer: Tokenizer) -> bool:
    """True where samples are cut to bytes instead of rounded: where the pictures that the tokenizer was trained on are
    scaled as released."""
    return tokenizer.config.data.resize == "released"


# --- Likelihood -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _likelihood(
    config: TransformerTrainConfig,
    transformer: Transformer,
    tokens: Tokens,
    n_images: int,
    batch_size: int,
    beat: Callable[[], bool],
) -> Metrics:
    loss, device = NextTokenLoss(transformer), next(transformer.parameters()).device
    sums: list[float] = []
    with shared_errors(StopRequested), measuring(transformer):
        for numbers_B in own_batches(n_images, batch_size):
            if beat():
                raise StopRequested("asked to stop while measuring the cross-entropy")
            tokens_BT, classes_B = (
                tokens.tokens_NT[numbers_B].to(device, torch.int64),
                tokens.labels_N[numbers_B].to(device),
            )
            sums.append(float(loss(tokens_BT, classes_B)) * len(numbers_B))
    nats = math.fsum(each for of_rank in gather_objects(sums) for each in of_rank) / n_images
    if not math.isfinite(nats):
        raise NonFiniteError(f"the cross-entropy on the test split is {nats}")
    T, K = config.tokens_per_image, config.quantizer.codebook_size
    return {"cross_entropy": nats, "bits_per_image": T * nats / math.log(2), "uniform_bits_per_image": T * math.log2(K)}


# --- Samples ----------------------------------------------------------------------------------------------------------


class _Drawn:
    """Samples at one guidance: how many were drawn here, and in which time. The sampler takes memory only if there is
    something to do."""

    def __init__(self, make_sampler: Callable[[], Sampler], classes_N: torch.Tensor) -> None:
        self._make_sampler, self._classes_N = make_sampler, classes_N
        self.images, self.seconds = 0, 0.0

    @cached_property
    def _sampler(self) -> Sampler:
        return self._make_sampler()

    def __call__(self, numbers_B: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        tokens_BT = self._sampler(numbers_B, self._classes_N[numbers_B]).cpu()
        self.images, self.seconds = self.images + len(numbers_B), self.seconds + time.perf_counter() - began
        return tokens_BT


def _sample(
    config: TransformerTrainConfig,
    transformer: Transformer,
    classes_N: torch.Tensor,
    runtime: Runtime,
    folder: Path,
    beat: Callable[[], bool],
) -> tuple[dict[float, torch.Tensor], Metrics, Protocol]:
    """Tokens (N, T) at each guidance, from their files or sampled now; and how fast this was."""
    weights = copy_of_first(digest_of(transformer, transformer.config.model_dump(mode="json")) if is_writer() else "")
    at_once = math.ceil(
        PART / math.ceil(PART / runtime.eval_batch_size)
    )  # batches of a part are alike, since short ones are filled up
    T, K = config.tokens_per_image, config.quantizer.codebook_size
    samples, images, seconds = {}, 0, 0.0
    for g in runtime.guidances:
        sampling = Sampling(guidance=Guidance(g))
        key = hashlib.sha256(
            f"{TRANSFORMER_VERSION} {weights} {config.seed} {sampling} {config.classes}".encode()
        ).hexdigest()
        parts = Parts(folder / f"guidance-{g:g}", key, len(classes_N), PART, T, K, f"sampling at guidance {g:g}")
        drawn = _Drawn(
            partial(Sampler, transformer, sampling, seed=config.seed, batch_size=at_once, compile=runtime.compile),
            classes_N,
        )
        with measuring(transformer):
            samples[g] = parts.collect(drawn, at_once, beat)
        images, seconds = images + drawn.images, seconds + drawn.seconds
    images_per_s, made = sum_of_numbers(images / seconds if images else 0.0, images)
    if not made:
        return samples, {}, {"sample_images_per_s": "absent: all samples were there from an earlier attempt"}
    how = f"of {made:,.0f} images in batches of {at_once}, at all guidances; each but 1 takes two sequences an image"
    return samples, {"sample_images_per_s": images_per_s}, {"sample_images_per_s": how}


def _shown(
    tokenizer: Tokenizer, samples: Mapping[float, torch.Tensor], classes_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The first few samples of each class, as pictures."""
    if not is_writer():
        return {}
    of_classes = [(classes_N == label).nonzero()[:SHOWN_OF_A_CLASS, 0] for label in range(SHOWN_IMAGES)]
    shown_N = torch.cat(of_classes)[:SHOWN_IMAGES].sort().values
    with measuring(tokenizer):
        pictures = {
            f"images@{g:g}": to_uint8(decode(tokenizer, tokens_NT[shown_N]), cut=samples_are_cut(tokenizer))
            for g, tokens_NT in samples.items()
        }
    return {"shown_N": shown_N} | pictures


# --- Distances --------------------------------------------------------------------------------------------------------


def _compare(
    distances: Distances | None,
    absent: list[str],
    suffix: str,
    tokenizer: Tokenizer,
    samples: Mapping[float, torch.Tensor],
    classes_N: torch.Tensor | None,
    beat: Callable[[], bool],
) -> tuple[Metrics, Protocol]:
    """Metrics and protocol of the samples at each guidance and, without its name, at the best; a collective.

    Args:
        distances: to the references; None on a process that has put into `absent` why.
        suffix: of the network's name.
        classes_N: that the samples were asked for, where the network knows them; adds the label agreement.
    """
    absent = [reason for reasons in gather_objects(absent) for reason in reasons]
    if absent or distances is None:
        return {}, {f"distances{suffix}": f"absent: {absent[0]}"}
    metrics: Metrics = {}
    protocol: Protocol = {}
    for g, tokens_NT in samples.items():
        distances, reasons = distances.another(), list[str]()
        with shared_errors(StopRequested), measuring(tokenizer):
            for numbers_B in own_batches(len(tokens_NT), DECODED_AT_ONCE):
                if beat():
                    raise StopRequested("asked to stop while measuring samples; they are kept")
                if not reasons:
                    with sparing(reasons):
                        distances.update(decode(tokenizer, tokens_NT[numbers_B]), cut=samples_are_cut(tokenizer))
        found, said = measured(distances, reasons)
        if reasons:
            protocol[f"distances{suffix}@{g:g}"] = f"absent: {reasons[0]}"
            continue
        metrics |= {f"{name}@{g:g}": value for name, value in found.items()}
        protocol |= {name if name == f"distances{suffix}" else f"{name}@{g:g}": text for name, text in said.items()}
        if classes_N is not None:
            metrics[f"label_agreement{suffix}@{g:g}"] = float(
                (distances.logits_NL.argmax(1) == classes_N).double().mean()
            )
    return _with_best(metrics, protocol, samples, suffix)


def _with_best(
    metrics: Metrics, protocol: Protocol, samples: Mapping[float, torch.Tensor], suffix: str
) -> tuple[Metrics, Protocol]:
    """Under the plain names the metrics at the guidance with the lowest FID."""
    fids = {g: metrics[name] for g in samples if (name := f"fid{suffix}@{g:g}") in metrics}
    name = "guidance" if suffix else "guidance@fid"
    if not fids:
        return metrics, protocol | {name: f"absent: there is no fid{suffix} to choose it by"}
    best = min(fids, key=lambda g: fids[g])
    chosen = {key.removesuffix(f"@{best:g}"): value for key, value in metrics.items() if key.endswith(f"@{best:g}")}
    how = (
        f"lowest fid{suffix} of {_listed(fids)}, chosen on these very samples; metrics without a guidance's name "
        f"are "
        f"at this one"
    )
    return metrics | chosen | {name: best}, protocol | {name: how}


def _listed(guidances: Iterable[float]) -> str:
    return ", ".join(f"{g:g}" for g in guidances)
