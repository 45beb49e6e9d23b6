"""One split of a data set: what every kind of it offers, the kind that is whole in memory, and the error that says why
there is none."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ibq.errors import DataError
from ibq.schema import Resize

Split = Literal["train", "test"]
NAMED_ON_STDERR = 3


class ImageSource(Protocol):
    """One split of a data set, in memory (`Images`) or read when it is wanted (`ibq.data.stream.StreamedImages`)."""

    @property
    def name(self) -> str:
        """The data set."""

    @property
    def split(self) -> str:
        """ "train" or "test"."""

    @property
    def labels_N(self) -> torch.Tensor | None:  # noqa: N802 (a shape suffix)
        """int64 class of every image, or None."""

    @property
    def source(self) -> str:
        """Origin of the images, for people; no part of their identity."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """A sentence for every file or folder that could not be used, as far as it has been tried; no part of their
        identity either."""

    @property
    def resize(self) -> Resize | None:
        """How they are scaled; None: they come in this size."""

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex): the images' part in a run's identity."""

    def __len__(self) -> int: ...

    def pixels(self, indices_B: torch.Tensor) -> torch.Tensor:
        """Chosen images as bytes, uint8 (B, C, H, W); indices_B: int64 positions in this split."""

    def batch(self, indices_B: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """`pixels` as a network reads them, by `to_float`."""


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a data set, whole in memory.

    Args:
        name: the data set.
        split: "train" or "test".
        images_NCHW: uint8, contiguous, square, C of 1 or 3, at least one image.
        labels_N: int64 class of every image, or None.
        source: where the images came from, for people; no part of their identity.
        skipped: a sentence for every file that could not be used; no part of their identity either.
        resize: how they were scaled; None: they come in this size.

    Raises:
        DataError: a tensor has another type or shape.
    """

    name: str
    split: str
    images_NCHW: torch.Tensor
    labels_N: torch.Tensor | None = None
    source: str = "memory"
    skipped: tuple[str, ...] = ()
    resize: Resize | None = None

    def __post_init__(self) -> None:
        images, labels, shape = (self.images_NCHW, self.labels_N, tuple(self.images_NCHW.shape))
        if images.dtype != torch.uint8 or images.ndim != 4 or not images.is_contiguous():
            layout = "contiguous" if images.is_contiguous() else "not contiguous"
            raise DataError(
                f"images must be a contiguous uint8 tensor (N, C, H, W), but these are {images.dtype} {shape}, {layout}"
            )
        if len(images) == 0 or shape[1] not in (1, 3) or shape[2] != shape[3] or shape[2] == 0:
            raise DataError(
                f"images must be square, of 1 or 3 channels and at least one, but their shape (N, C, H, W) is {shape}"
            )
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != shape[:1]):
            raise DataError(
                f"labels must be int64 of shape {shape[:1]}, but these are {labels.dtype} {tuple(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images_NCHW)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over the shape and the bytes of the images: their part in a run's identity."""
        digest = hashlib.sha256(repr(tuple(self.images_NCHW.shape)).encode())
        digest.update(self.images_NCHW.cpu().numpy().data)
        return digest.hexdigest()

    def batch(self, indices_B: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """Chosen images as a network reads them.

        Args:
            indices_B: int64 positions in this split.
            device: where the batch is wanted; the bytes travel, and are widened there.

        Returns:
            float32 (B, C, H, W); 0 becomes exactly -1 and 255 exactly 1.
        """
        return to_float(self.pixels(indices_B), device)

    def pixels(self, indices_B: torch.Tensor) -> torch.Tensor:
        """Chosen images as bytes, uint8 (B, C, H, W)."""
        return self.images_NCHW[indices_B.to(self.images_NCHW.device)]


def to_float(bytes_BCHW: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Bytes as a network reads them: float32 on the device, 0 becomes exactly -1 and 255 exactly 1."""
    return bytes_BCHW.to(device).to(torch.float32).div_(127.5).sub_(1.0)


def one_line(reason: object) -> str:
    """An error, or what a program complained of, as part of a sentence: one line without a full stop, an error's type
    where it is mute."""
    text = " ".join(str(reason).split()).rstrip(".")
    return text or ("" if isinstance(reason, str) else type(reason).__name__)


def quoted(text: object) -> str:
    """A path as it stands in a message: as it is, or, where it holds line breaks or other signs that do not print, as
    repr writes it."""
    return text if (text := str(text)).isprintable() else repr(text)


def either(names: tuple[str, ...]) -> str:
    """Names as a choice in words: "A, B or C"."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def first_few(sentences: list[str]) -> str:
    """The first few of the sentences, and how many more there are."""
    more = len(sentences) - NAMED_ON_STDERR
    return "; ".join(sentences[:NAMED_ON_STDERR]) + (f"; and {more:,} more" if more > 0 else "")
