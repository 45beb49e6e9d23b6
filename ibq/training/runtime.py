"""What the trainers of both stages share: how a run is watched, what it yields, what makes a directory the run's own,
facts of its row."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch

from ibq.config import RESULTS_VERSION, RunConfig, read_config
from ibq.distributed import barrier, device_name, gather_objects, is_writer, shared_errors, world_size
from ibq.errors import ConfigError, NonFiniteElsewhereError, NonFiniteError, nearest
from ibq.models.tokenizer import Tokenizer
from ibq.ops.arguments import Backend
from ibq.run_directory import RunDirectory, source_commit, write_json
from ibq.schema import flatten
from ibq.training.checkpoint import Checkpoint, load_checkpoint, remove_checkpoint

Sharding = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Runtime:
    """Where and how a run is watched; nothing here changes its numbers but by rounding, so nothing here enters its id.

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
    """What several processes that train a transformer each hold: the whole of it, or a part of every layer (FSDP2),
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


class Progress(Protocol):
    """How far a training state has come: finished updates, and the seconds that they took."""

    step: int
    seconds: float


class Pace:
    """How fast a run goes since the last report."""

    def __init__(self, state: Progress, batch_size: int) -> None:
        self.state, self.batch_size = state, batch_size
        self.step, self.seconds, self.waited_s = state.step, state.seconds, 0.0

    def report(self, waited_s: float) -> dict[str, float]:
        """images_per_s, over all processes, and data_wait_pct, the share of that time in which this process waited for
        pixels.

        Args:
            waited_s: seconds of waiting since the start.
        """
        images, seconds = (self.state.step - self.step) * self.batch_size, self.state.seconds - self.seconds
        waited, self.waited_s = waited_s - self.waited_s, waited_s
        self.step, self.seconds = self.state.step, self.state.seconds
        return {"images_per_s": images / seconds, "data_wait_pct": 100 * waited / seconds}


AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_config(run: RunDirectory, config: RunConfig) -> None:
    """Refuse a directory whose config.json is another config."""
    if run.config.is_file():
        theirs = read_config(run).identity()
        if differing := first_difference(theirs, config.identity()):
            raise ConfigError(f"{run.path} holds a run with {differing}; pass another directory")


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first field, in the order of their names, in which two configs' identities differ, and both values; None
    where none does."""
    theirs, mine = flatten(found), flatten(wanted)
    differing = (name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name))
    return next((f"{name}={theirs.get(name)!r}, not {mine.get(name)!r}" for name in differing), None)


def already_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether the directory, which must not hold another config, has its row; a collective.

    Raises:
        ConfigError: on all processes, where one sees another config, other files, or a row that is damaged.
    """
    with shared_errors(ConfigError):
        check_config(run, config)
    if agreed(run, "row", "there" if run.finished else "absent") == "absent":
        return False
    with shared_errors(ConfigError):
        status = run.read_row()["status"]
    if (
        is_writer() and status == "ok"
    ):  # a kill may have come between the row and this; of a run that was lost the last state is kept
        tidy(run)
    return True


def tidy(run: RunDirectory) -> None:
    """Remove what a run needs as long as it has no row: its checkpoint, and parts of its evaluation."""
    remove_checkpoint(run.checkpoint)
    shutil.rmtree(run.samples, ignore_errors=True)


def newest_checkpoint(run: RunDirectory, belongs_to: dict[str, str]) -> tuple[Checkpoint | None, list[str]]:
    """`load_checkpoint`, with what all processes agree on; a collective.

    Args:
        belongs_to: hashes of what the run learns from, by their names in the checkpoint's meta: `data_hash`,
            `tokenizer_sha256`.

    Raises:
        ConfigError: on all processes, where they see different checkpoints, or theirs belongs to something else.
    """
    checkpoint, damaged = load_checkpoint(run.checkpoint)
    agreed(
        run,
        "checkpoint",
        f"of step {checkpoint.meta['step']} ({checkpoint.meta['sha256'][:8]})" if checkpoint else "absent",
    )
    meta = checkpoint.meta if checkpoint else belongs_to
    for name, given in belongs_to.items():
        if (trained_on := meta.get(name, given)) != given:
            what, remedy = name.partition("_")[0], "pass the one of before, or forget the run and train it again"
            raise ConfigError(f"{run.path} was trained on {what} {trained_on[:12]}, not {given[:12]}; {remedy}")
    return checkpoint, damaged


def agreed(run: RunDirectory, what: str, seen: str) -> str:
    """What this process sees of a run's files, if all see the same.

    Raises:
        ConfigError: on all processes, where one sees something else.
    """
    first, *others = gather_objects(seen)
    for number, other in enumerate(others, 1):
        if other != first:
            raise ConfigError(
                f"process {number} finds the {what} of {run.path} {other[:40]}, process 0 {first[:40]}; "
                "all processes need the same folders of runs and data"
            )
    return seen


def peak_memory_gib(device: torch.device) -> float:
    """What this process has needed so far: of the device's memory or, on a CPU, of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cause(origin: str, error: Exception) -> str:
    """Why a step is refused, as the process says where it began; a collective, as all refuse a step together."""
    *_, reason = max(
        gather_objects((bool(origin), not isinstance(error, NonFiniteElsewhereError), f"{origin}{error}")),
        key=lambda said: said[:2],
    )
    return reason


def write_lost(run: RunDirectory, row: dict[str, Any]) -> NonFiniteError:
    """Write the row, with its `reason`, of a run that did not stay finite; returns what to raise, which all processes
    do (a collective)."""
    if is_writer():
        write_json(run.row, row)
    barrier()  # whoever ends before the row is whole could have all processes ended
    return NonFiniteError(row["reason"])


def row_of(
    config: RunConfig, status: str, facts: dict[str, Any], protocol: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """A row, flat: what was trained, where and with which code, facts and metrics, protocol, config fields.

    Args:
        facts: `data_hash`, what training cost, and the metrics.
        protocol: what the metrics belong to.
    """
    provenance = {
        "run": config.run_id(facts["data_hash"]),
        "status": status,
        "method": config.quantizer.method,
        "codebook_size": config.quantizer.codebook_size,
        "code_dim": config.quantizer.code_dim,
        "seed": config.seed,
        "device": device_name(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": source_commit(),
        "results_version": RESULTS_VERSION,
    }
    fields = {f"config.{name}": value for name, value in flatten(config.identity()).items()}
    return provenance | facts | {f"protocol.{name}": value for name, value in protocol.items()} | fields
