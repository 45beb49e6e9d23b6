"""Runtime of a run: device, cadences and sizes that do not enter its id; log events and the request to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ibq.errors import ConfigError, nearest
from ibq.schema import Backend

if TYPE_CHECKING:
    import torch

    from ibq.models.tokenizer import Tokenizer

Sharding = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Runtime:
    """Device, cadences and sizes by which a run is trained and watched; nothing here changes its numbers but by
    rounding, so nothing here enters its id.

    Raises:
        ConfigError: a cadence or size is out of range, or a way of sharding or a backend is not known.
    """

    device: str = "auto"
    log_every: int = 10
    snapshots: int = 8
    checkpoint_every_s: float = 60.0
    workers: int = 4
    """Processes that decode pictures, where images are read from a folder while training."""
    compile: bool = False
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same numbers."""
    eval_images: int = 2000
    eval_batch_size: int = 100
    backend: Backend = "auto"
    """Of IBQ's operator."""
    sharding: Sharding = "ddp"
    """Share of a transformer that each of several processes holds: the whole of it, or a part of every layer (FSDP2),
    which is gathered when it computes."""
    samples: int = 1000
    """Images that a trained transformer is evaluated on, at each of `guidances`."""
    guidances: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0)

    def __post_init__(self) -> None:
        least = {
            "log_every": 1,
            "snapshots": 0,
            "checkpoint_every_s": 0,
            "workers": 0,
            "eval_images": 1,
            "eval_batch_size": 1,
            "samples": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; choose {bound} or more")
        for name, known in {"sharding": get_args(Sharding), "backend": get_args(Backend)}.items():
            if (given := getattr(self, name)) not in known:
                raise ConfigError(f"{name}={given!r} is not known; {nearest(str(given), known)}")
        if not all(0 <= g < math.inf for g in self.guidances) or len({f"{g:g}" for g in self.guidances}) < len(
            self.guidances
        ):
            raise ConfigError(
                f"guidances={self.guidances} must be finite numbers of at least 0, no two of them alike; 1 is no "
                f"guidance"
            )


@dataclass(frozen=True)
class LogEvent:
    """One log step: `step` updates of `steps` are done; `record` is the line that went into history.jsonl.

    Of a tokenizer's run also what a viewer may look at until it asks for the next event: `tokenizer`, the one in
    training (raw weights), and `counts_K`, the training tokens of each code since the event before.
    """

    step: int
    steps: int
    record: dict[str, Any]
    tokenizer: Tokenizer | None = None
    counts_K: torch.Tensor | None = None


class StopRequested(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop; its checkpoint is on disk."""
