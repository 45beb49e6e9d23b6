"""Tokens of many images, made part by part: each part lies in a file as soon as it is whole, is made once, and by one
of several processes.

Suffixes: N images, P those of a part, T tokens of an image.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ibq.distributed import gather_rows, is_writer, rank, shared_errors, world_size
from ibq.errors import DataError, NonFiniteError, NonFiniteInputError
from ibq.run_directory import write_tensors
from ibq.training.runtime import StopRequested

SAID_EVERY_S = 60.0

Make = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Parts:
    """Tokens (N, T) in parts of `size` images, as files of one folder.

    Args:
        folder: where the files lie, made when the first is written; None, or one that cannot be written: nothing is
            kept.
        key: what decides the tokens, in words that differ wherever they would; a file of another key counts as absent.
        count: N.
        size: images of a part; the last may have fewer.
        tokens: T.
        codebook_size: K; tokens lie in [0, K).
        doing: what making them is called in a line of progress or of an interruption, such as "encoding".
    """

    folder: Path | None
    key: str
    count: int
    size: int
    tokens: int
    codebook_size: int
    doing: str

    @property
    def dtype(self) -> torch.dtype:
        """int32, or int64 where K needs it."""
        return torch.int32 if self.codebook_size <= 2**31 else torch.int64

    def collect(self, make: Make, at_once: int, beat: Callable[[], bool]) -> torch.Tensor:
        """All tokens, `dtype` (N, T) on the CPU, of which those that no file holds are made; a collective.

        Each process reads or makes every world-th part and gets the others from the processes that have them, so that
        they need not see the same files.

        Args:
            make: numbers of images, int64 (B,), to their tokens, integers (B, T). It may do no collective.
            at_once: B at most.
            beat: called before every `make`, a sign of life, and neither may it do a collective; True on any process
                stops all.

        Raises:
            StopRequested: what is finished lies in its files.
            DataError, NonFiniteInputError, NonFiniteError: `make` raised it on this or another process.
        """
        tokens_NT = torch.empty(self.count, self.tokens, dtype=self.dtype)
        parts = torch.arange(self.count).split(self.size)
        progress = _Progress(self.doing, self.count)
        for first in range(0, len(parts), world_size()):
            mine = first + rank()
            tokens_PT = tokens_NT[:0]
            with shared_errors(StopRequested, DataError, NonFiniteInputError, NonFiniteError):
                if mine < len(parts):
                    tokens_PT = self._part(
                        mine, parts[mine], lambda numbers_P: self._made(numbers_P, make, at_once, beat)
                    )
            here = torch.cat(parts[first : first + world_size()])
            tokens_NT[here] = gather_rows(tokens_PT)
            progress.say(int(here[-1]) + 1)
        return tokens_NT

    def _part(self, number: int, numbers_P: torch.Tensor, make: Make) -> torch.Tensor:
        """A part from its file, or made and written there."""
        path = None if self.folder is None else self.folder / f"{number:06d}.safetensors"
        kept_PT = None if path is None else self._read(path, number, len(numbers_P))
        if kept_PT is not None:
            return kept_PT
        tokens_PT = make(numbers_P)
        if path is not None:
            with contextlib.suppress(OSError, SafetensorError):  # the latter is how safetensors reports a full disk
                write_tensors(path, {"tokens_PT": tokens_PT, "sha256": self._digest(number, tokens_PT)})
        return tokens_PT.to(self.dtype)

    def _made(self, numbers_P: torch.Tensor, make: Make, at_once: int, beat: Callable[[], bool]) -> torch.Tensor:
        made = []
        for numbers_B in numbers_P.split(at_once):
            if beat():
                raise StopRequested(f"asked to stop while {self.doing}; finished parts are kept")
            made.append(make(numbers_B).to("cpu", torch.int16 if self.codebook_size <= 2**15 else self.dtype))
        return torch.cat(made)

    def _read(self, path: Path, number: int, images: int) -> torch.Tensor | None:
        """A part's tokens; None where its file is absent, damaged, or belongs to something else."""
        try:
            kept = load_file(path)
            tokens_PT, digest = kept["tokens_PT"], kept["sha256"]
        except (OSError, SafetensorError, KeyError):
            return None
        fits = tokens_PT.shape == (images, self.tokens) and torch.equal(digest, self._digest(number, tokens_PT))
        return tokens_PT.to(self.dtype) if fits else None

    def _digest(self, number: int, tokens_PT: torch.Tensor) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.key} {number}".encode())
        digest.update(tokens_PT.contiguous().numpy().data)
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


class _Progress:
    """A line on stderr once in a while, from one process: nothing where all is done within a minute."""

    def __init__(self, doing: str, count: int) -> None:
        self._doing, self._count = doing, count
        self._began = self._said = time.monotonic()

    def say(self, done: int) -> None:
        now = time.monotonic()
        if not is_writer() or now - self._said < SAID_EVERY_S or done == self._count:
            return
        self._said = now
        minutes = (now - self._began) / 60 * (self._count - done) / done
        print(
            f"{self._doing}: {done:,} of {self._count:,} images, about {minutes:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
