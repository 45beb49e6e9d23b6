"""Distances between a set of images and its references in the features of a network: FID, KID, inception score,
precision and recall.

Protocol. Everything between features and number is torch-fidelity's own code (the functions that its command calls),
with its defaults, so that a number equals what `torch_fidelity.calculate_metrics` gives on the same pictures saved as
PNG, told the same `kid_subset_size`:
- images are rounded to 8 bits, as a PNG holds them; references are the tensors that the encoder saw, not files resized
    by other software;
- FID is the Fréchet distance of Gaussians (Heusel et al. 2017; mean and covariance in float64). KID is the unbiased
  polynomial MMD (Binkowski et al. 2018), the mean over 100 subsets; a subset is a tenth of the images, at most 1,000,
  since subsets of 1,000 among 2,000 images cost much and say no more. Unbiased means for independent sets:
  reconstructions pair with their references, so it can go below 0. The inception score (Salimans et al. 2016) is the
  mean of 10 splits. Precision and recall are those of Kynkäänniemi et al. (2019) with 3 neighbours, in the same
  features;
- under their plain names the numbers are of Inception-v3 as FID has it; a network that stands in for it labels each:
    `fid[fashion-cnn]`, `fid[efficientnet-lite0]`.
Left out: clean-fid's resizing, as nothing is resized but by the networks themselves; the standard deviations of KID and
    inception score.

A number that would mean nothing (too few images) is absent, and the protocol says why.

Suffixes: N images, B a batch of them, C channels, H W pixels, F features, L classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ibq.data.packaged import cache_folder
from ibq.distributed import gather_rows
from ibq.errors import DataError
from ibq.ops.precision import full_float32
from ibq.run_directory import write_tensors

if TYPE_CHECKING:
    from ibq.pretrained.extractors import Extractor

NAMES = ("fid", "kid", "is", "precision", "recall")
FEWEST_IMAGES = 100
"""With fewer the subsets of KID, the splits of the inception score and the neighbourhoods hold a handful of images."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS, NEIGHBOURS = 10, 3
EXTRACTED_AT_ONCE, DISTANCE_ROWS = 64, 1000


def to_uint8(images_BCHW: torch.Tensor, *, cut: bool = False) -> torch.Tensor:
    """Images in [-1, 1], clamped to it, as a PNG holds them: -1 becomes 0 and 1 becomes 255; cut instead of rounded, as
    the released samples are, half a grey level darker in the mean."""
    levels_BCHW = (images_BCHW.float().clamp(-1, 1) + 1) * 127.5
    return (levels_BCHW if cut else levels_BCHW.round()).to(torch.uint8)


def too_few(n_images: int) -> str | None:
    """The reason why no distance would mean anything, or None."""
    return f"{n_images} images are too few, {FEWEST_IMAGES} are needed" if n_images < FEWEST_IMAGES else None


References = Iterable[torch.Tensor]
"""Batches of any sizes of images, uint8 (B, C, H, W), C of 1 or 3, that can be gone through twice."""


class Distances:
    """Gathers the features of images batch by batch; `compute` gives the distances to the references.

    Several processes share the work thus: each adds some of the images and has some of the references, both in the
    order of their ranks; each calls `finish` and `reduce`, and then any of them `compute`.

    Args:
        extractor: the network.
        references: of the size of the images to come, at least one.
    """

    def __init__(self, extractor: Extractor, references: References) -> None:
        self.extractor = extractor
        self.references = references
        self._stream = _FeatureStream(extractor)
        self._own_reference_features_NF: torch.Tensor | None = None
        self._rows: tuple[torch.Tensor, ...] = ()

    def another(self) -> Distances:
        """For another set of images against the same references, whose features are extracted once for all sets."""
        distances = Distances(self.extractor, self.references)
        distances._own_reference_features_NF = self._own_reference_features_NF
        return distances

    @property
    def logits_NL(self) -> torch.Tensor:  # noqa: N802 (a shape suffix)
        """Predicted classes of the images, after `finish`; after `reduce` those of all processes."""
        return self._rows[1]

    def update(self, images_BCHW: torch.Tensor, *, cut: bool = False) -> None:
        """Add a batch: float in [-1, 1]; arguments as of `to_uint8`."""
        self._stream.add(to_uint8(images_BCHW, cut=cut))

    def finish(self) -> None:
        """Extract what is left to extract, after the last update; no collective, since this may fail on one process
        alone."""
        if self._own_reference_features_NF is None:
            self._own_reference_features_NF = reference_features(self.extractor, self.references)
        if not self._rows:
            self._rows = (*self._stream.finish(), self._own_reference_features_NF)

    def reduce(self) -> None:
        """Take in what the other processes have extracted; a collective, once, after `finish`."""
        self._rows = tuple(gather_rows(rows) for rows in self._rows)

    def compute(self) -> tuple[dict[str, float], dict[str, Any]]:
        """The distances that mean something, labelled with the network's suffix, and their protocol.

        The protocol has an entry `distances` (with the suffix), and one under a metric's own name where that one alone
        is absent: why.
        """
        self.finish()
        features_NF, logits_NL, reference_features_NF = self._rows
        metrics, absent = distances(features_NF, logits_NL, reference_features_NF)
        suffix = self.extractor.suffix
        protocol = {f"{name}{suffix}": f"absent: {reason}" for name, reason in absent.items()}
        if not metrics:
            protocol = {f"distances{suffix}": protocol[f"fid{suffix}"]}
        else:
            protocol[f"distances{suffix}"] = _provenance(self.extractor, len(features_NF), len(reference_features_NF))
        return {f"{name}{suffix}": value for name, value in metrics.items()}, protocol


def distances(
    features_NF: torch.Tensor, logits_NL: torch.Tensor, reference_features_NF: torch.Tensor
) -> tuple[dict[str, float], dict[str, str]]:
    """Distances of features to reference features, and why any is absent; the numbers of images may differ.

    Args:
        features_NF, logits_NL: of the images.
        reference_features_NF: of the references.

    Returns:
        metrics under NAMES (FID not below 0, which rounding can give for a set against itself); reasons for what is
        missing.
    """
    from threadpoolctl import threadpool_limits
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    fewest, (_, F) = min(len(features_NF), len(reference_features_NF)), features_NF.shape
    if reason := too_few(fewest):
        return {}, dict.fromkeys(NAMES, reason)
    x_NF, y_NF = features_NF.double(), reference_features_NF.double()
    metrics: dict[str, float] = {}
    with threadpool_limits(torch.get_num_threads(), "blas"):  # else those of numpy spin on cores that others use
        if fewest > F:  # else the covariances are singular and FID measures little but the number of images
            fid = fid_statistics_to_metric(
                fid_features_to_statistics(x_NF), fid_features_to_statistics(y_NF), verbose=False
            )
            metrics["fid"] = max(fid[KEY_METRIC_FID], 0.0)  # in this order NaN stays NaN
        subset = _kid_subset_size(len(x_NF), len(y_NF))
        kid = kid_features_to_metric(x_NF, y_NF, kid_subsets=KID_SUBSETS, kid_subset_size=subset, verbose=False)
        metrics["kid"] = kid[KEY_METRIC_KID_MEAN]
        metrics["is"] = isc_features_to_metric(logits_NL, splits=IS_SPLITS)[KEY_METRIC_ISC_MEAN]
        neighbours = prc_features_to_metric(
            features_NF,
            reference_features_NF,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=DISTANCE_ROWS,
            save_cpu_ram=True,
            verbose=False,
        )
        metrics |= {"precision": neighbours[KEY_METRIC_PRECISION], "recall": neighbours[KEY_METRIC_RECALL]}
    absent = (
        {}
        if fewest > F
        else {"fid": f"{fewest} images are too few for a covariance of {F} features, {F + 1} are needed"}
    )
    absent |= {name: "it is not a finite number" for name, value in metrics.items() if not math.isfinite(value)}
    return {name: value for name, value in metrics.items() if name not in absent}, absent


def reference_features(extractor: Extractor, references: References) -> torch.Tensor:
    """Features of references (N, F), float32 on the CPU: from the cache if the same were extracted before, else
    extracted and kept there.

    The cache is the folder `features` where fetched data lie too (IBQ_CACHE). A damaged file counts as absent, and a
    folder that cannot be written costs the time of extracting again, no more.
    """
    try:
        folder = cache_folder() / "features"
    except DataError:
        return _extract(extractor, references)
    key, n_images = _content_key(extractor, references)
    path = folder / f"{key}.safetensors"
    kept_NF = _read_features(path, n_images)
    if kept_NF is not None:
        return kept_NF
    features_NF = _extract(extractor, references)
    with contextlib.suppress(OSError, SafetensorError):  # the latter is how safetensors reports a full disk
        write_tensors(path, {"features_NF": features_NF, "sha256": _digest_tensor(features_NF)})
    return features_NF


def _content_key(extractor: Extractor, references: References) -> tuple[str, int]:
    """Hash of the network and the images, whatever batches they come in; and how many images these are."""
    import torch_fidelity

    named = (torch_fidelity.__version__, extractor.name, extractor.weights, extractor.resizing, extractor.device.type)
    digest, n_images = hashlib.sha256(repr(named).encode()), 0
    shape: tuple[int, ...] = ()
    for images_BCHW in references:
        digest.update(images_BCHW.cpu().contiguous().numpy().data)
        n_images, shape = n_images + len(images_BCHW), tuple(images_BCHW.shape[1:])
    digest.update(repr((n_images, *shape)).encode())
    return digest.hexdigest(), n_images


def _read_features(path: Path, n_images: int) -> torch.Tensor | None:
    try:
        kept = load_file(path)
        features_NF = kept["features_NF"]
        whole = len(features_NF) == n_images and torch.equal(kept["sha256"], _digest_tensor(features_NF))
    except (OSError, SafetensorError, KeyError):
        return None
    return features_NF if whole else None


def _digest_tensor(features_NF: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(
        bytearray(hashlib.sha256(features_NF.contiguous().numpy().data).digest()), dtype=torch.uint8
    )


def _extract(extractor: Extractor, references: References) -> torch.Tensor:
    stream = _FeatureStream(extractor)
    for images_BCHW in references:
        stream.add(images_BCHW)
    return stream.finish()[0]


class _FeatureStream:
    """Features of uint8 images, extracted in batches of its own, so that the caller's batch size does not change even
    the rounding."""

    def __init__(self, extractor: Extractor) -> None:
        self._extractor = extractor
        self._waiting: list[torch.Tensor] = []
        self._features: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []

    def add(self, images_BCHW: torch.Tensor) -> None:
        *full, rest = torch.cat([*self._waiting, images_BCHW]).split(EXTRACTED_AT_ONCE)
        for batch_BCHW in full:
            self._extract(batch_BCHW)
        self._waiting = [rest]

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """features_NF and logits_NL, float32 on the CPU; without images nothing but empty."""
        for batch_BCHW in self._waiting:
            self._extract(batch_BCHW)
        self._waiting = []
        return (
            (torch.cat(self._features), torch.cat(self._logits)) if self._features else (torch.empty(0), torch.empty(0))
        )

    @torch.no_grad()
    def _extract(self, images_BCHW: torch.Tensor) -> None:
        rgb_BCHW = images_BCHW.to(self._extractor.device).expand(-1, 3, -1, -1)  # as torch-fidelity reads a grey PNG
        with full_float32(self._extractor.device, convolutions=True):
            features_BF, logits_BL = self._extractor.network(rgb_BCHW)
        self._features.append(features_BF.float().cpu())
        self._logits.append(logits_BL.float().cpu())


def _kid_subset_size(n_images: int, n_references: int) -> int:
    return min(KID_SUBSET_SIZE, n_images // 10, n_references // 10)


def _provenance(extractor: Extractor, n_images: int, n_references: int) -> str:
    import torch_fidelity

    network = f"torch-fidelity {torch_fidelity.__version__}, {extractor.name} {extractor.weights}"
    network += f" ({extractor.resizing})" if extractor.resizing else ""
    sets = f"{n_images} uint8 images against {n_references} as the encoder saw them"
    subsets = f"KID of {KID_SUBSETS} subsets of {_kid_subset_size(n_images, n_references)}"
    return f"{network}; {sets}; {subsets}, inception score of {IS_SPLITS} splits, {NEIGHBOURS} neighbours"


class PairedDistances(Distances):
    """The distances of `Distances` where originals and reconstructions come in pairs, batch by batch, of any size and
    in any order; for one process.

    Nothing but features is kept. Of images of several sizes only a network that resizes, as Inception does, makes
    anything.

    Args:
        extractor: the network.
    """

    def __init__(self, extractor: Extractor) -> None:
        super().__init__(extractor, ())
        self._positions: list[int] = []
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def add_pairs(self, positions: list[int], originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> None:
        """Add a batch of pairs: float in [-1, 1], clamped to it; `positions` are the places that the pairs have among
        all."""
        features_BF, logits_BL = _features_and_logits(self.extractor, to_uint8(reconstructions_BCHW))
        originals_BF, _ = _features_and_logits(self.extractor, to_uint8(originals_BCHW))
        self._batches.append((features_BF, logits_BL, originals_BF))
        self._positions += positions

    def finish(self) -> None:
        """Put the features in the order of the positions, by which subsets and splits are drawn."""
        order_N = torch.tensor(self._positions).argsort()
        if not self._rows:
            self._rows = tuple(torch.cat(parts)[order_N] for parts in zip(*self._batches, strict=True))


def _features_and_logits(extractor: Extractor, images_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stream = _FeatureStream(extractor)
    stream.add(images_NCHW)
    return stream.finish()
