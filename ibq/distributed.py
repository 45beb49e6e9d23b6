"""Process group, collectives and device of a training process; every function is a no-op where torch.distributed is
not initialised.

Collective functions are called by all processes in the same order, or those that call wait for those that do not.
Numbers, flags and objects travel through the CPU (gloo, also beside nccl): that costs no wait for a GPU, and gloo
notices the end of a process at once.
Suffix: N rows of this process, M of all processes in the order of their ranks.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ibq.errors import ConfigError, PeerLostError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Time that a collective waits for a process that lives but does not come: longer than rank 0 measures or writes by
itself."""
PARENT_POLL_S = 1.0
"""Between two looks at who the parent of this process is."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: its number, 0 to world - 1; rank 0 writes.
        world: how many there are, on all nodes.
        device: where it computes.
        local_rank: its number on its node.
    """

    rank: int
    world: int
    device: torch.device
    local_rank: int


# --- Beginning and end ------------------------------------------------------------------------------------------------


@contextmanager
def process_group(device_name: str = "auto") -> Iterator[Processes]:
    """Joins the processes that torchrun has started, for the length of the block; without torchrun this process is the
    only one.

    A group that exists already is used, and left as it is. Else the block's end destroys it; an error aborts it first,
    so that neither this process waits for the others nor they for it.

    Args:
        device_name: "auto", "cpu" or "cuda": under torchrun each process has the GPU of its local rank.  Without it,
        as `resolve_device`.

    Raises:
        ConfigError: torchrun's environment has gaps, a GPU is named, or there is none for this process.
        PeerLostError: from a collective in the block.
    """
    if initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", rank()))
        with peers():
            yield Processes(rank(), world_size(), _own_device(device_name, local_rank), local_rank)
        return
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield Processes(0, 1, resolve_device(device_name), 0)
        return
    if absent := [name for name in TORCHRUN if name not in os.environ]:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set but {' and '.join(absent)} not; start with torchrun, or unset them"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    device = _own_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with peers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        leave = c10d._abort_process_group
        try:
            yield Processes(rank(), world_size(), device, local_rank)
            leave = dist.destroy_process_group
        finally:
            leave()


def resolve_device(name: str) -> torch.device:
    """The torch device for 'auto', 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        ConfigError: the name is not a device's, or a CUDA device is named that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is not known; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not one that this code knows; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r} was asked for but torch sees no CUDA device; use device='auto' or 'cpu'")
    if (device.index or 0) >= (gpus := max(1, torch.cuda.device_count())):
        raise ConfigError(
            f"device={name!r} was asked for but torch sees {gpus} of them, counted from 0; use one of these"
        )
    return device


def device_name(device: torch.device) -> str:
    """Name of a device, for a record of where numbers come from."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _own_device(name: str, local_rank: int) -> torch.device:
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(
            f"device={name!r} names one GPU for all processes; set device='cuda', which gives each its own"
        )
    if local_rank >= (gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"process {local_rank} of this node, counted from 0, finds {gpus} GPUs; start torchrun with "
            f"--nproc-per-node={gpus}, "
            "or set device='cpu'"
        )
    return torch.device("cuda", local_rank)


# torchrun's `record` writes tracebacks for its own report; the processes that stay still raise these texts, also where
# no torchrun is, and each has one sentence to say and to write into attempts.jsonl.
_LOST = re.compile(
    r"connection (closed|reset|refused)[a-z ]*|broken pipe|timed out[a-z0-9 ]*|[a-z]* ?time-?out|remote process exited|"
    r"nccl(Remote|System)Error|communicator was aborted|watchdog|(got|sent) 0 bytes",
    re.IGNORECASE,
)


@contextmanager
def peers() -> Iterator[None]:
    """Says in one sentence that another process is gone, where a collective in the block has failed because of that.

    Raises:
        PeerLostError: instead of what gloo, nccl or the store that processes meet at raise then; all other errors pass
            as they are.
    """
    try:
        yield
    except RuntimeError as error:
        of_collectives = (
            isinstance(error, dist.DistError) or "gloo/" in str(error) or str(error).startswith("Application timeout")
        )
        if not (of_collectives and (reason := _LOST.search(str(error)))):
            raise
        raise PeerLostError(
            f"another process of this run has ended or does not answer ({reason.group().strip()}); what it said last "
            f"tells why"
        ) from None


LAST_WORDS_S = 8.0
"""Longest wait of the other processes of a node for torchrun to end them, once the first one has said how it ends."""


def last_words(sentence: str, *, interrupted: bool) -> None:
    """Say on stderr how a command ends, before its process does.

    Under torchrun the other processes of the node leave that to the first one, and wait for it: torchrun ends all of
    them with the first that ends.

    Args:
        sentence: one line.
        interrupted: by Ctrl-C, which torchrun has passed on to all.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)
    elif not interrupted:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LAST_WORDS_S)


# --- Who am I ---------------------------------------------------------------------------------------------------------


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


def is_writer() -> bool:
    """True on the one process that writes files: rank 0."""
    return rank() == 0


# --- Collectives ------------------------------------------------------------------------------------------------------


def sum_over_ranks(*tensors: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over all processes, or those of a group, in place."""
    if initialized():
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all processes of a floating tensor, a new one without gradient."""
    mean = tensor.detach().clone()
    sum_over_ranks(mean)
    return mean / world_size()


def sum_of_numbers(*numbers: float) -> tuple[float, ...]:
    """The sum over all processes of each number, in float64."""
    if not initialized():
        return numbers
    sum_over_ranks(sums := torch.tensor(numbers, dtype=torch.float64, device=_meeting_place()))
    return tuple(sums.tolist())


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether it is true on any process."""
    if not initialized():
        return flags
    dist.all_reduce(together := torch.tensor(flags, dtype=torch.int32, device=_meeting_place()), op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in together.tolist())


def copy_from_first(*tensors: torch.Tensor) -> None:
    """Replace each tensor by that of rank 0, in place: what was drawn at random is then equal on all processes."""
    if initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather_objects(value: T) -> list[T]:
    """The small, picklable objects of all processes in the order of their ranks; tensors go through `gather_rows`."""
    if not initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def copy_of_first(value: T) -> T:
    """The small, picklable object of rank 0."""
    if initialized():
        dist.broadcast_object_list(values := [value], 0)
        return values[0]
    return value


def gather_rows(rows_Nx: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, rank 0's first.

    Args:
        rows_Nx: N may differ between processes; one that has no row need not know the shape and type of a row.

    Returns:
        rows_Mx on the same device, without gradient.
    """
    if not initialized():
        return rows_Nx.detach()
    kinds = gather_objects((len(rows_Nx), tuple(rows_Nx.shape[1:]), rows_Nx.dtype))
    counts = [n for n, _, _ in kinds]
    _, shape, dtype = next((kind for kind in kinds if kind[0]), kinds[0])
    padded = torch.zeros(max(counts), *shape, dtype=dtype, device=_meeting_place())
    if len(rows_Nx):
        padded[: len(rows_Nx)] = rows_Nx.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows_Nx.device)


def is_first_here(key: str) -> bool:
    """True on the process that asks first under this key; unlike a collective it waits for none, so that it serves when
    some are gone."""
    try:
        return not initialized() or c10d._get_default_store().add(key, 1) == 1
    except RuntimeError:  # where they meet is gone too
        return True


def barrier() -> None:
    """Wait until all processes are here."""
    any_rank(False)


@contextmanager
def shared_errors(*types: type[Exception]) -> Iterator[None]:
    """An error of these types on one process is raised on all of them at the end of the block, so that none waits for
    another.

    Args:
        types: of errors that are made of one message. The block does no collective: whoever fails would leave the
            others in it.
    """
    own: Exception | None = None
    try:
        yield
    except types as error:
        own = error
    raised = [each for each in gather_objects(None if own is None else (type(own), str(own))) if each is not None]
    if own is not None:
        raise own
    for kind, message in raised:
        raise kind(message)


def _meeting_place() -> str:
    """The device whose tensors reach all processes; the CPU, unless someone has made a group of nccl alone."""
    return "cpu" if "cpu:" in dist.get_backend_config() else "cuda"


def exit_with_parent(stop: Callable[[], object] = lambda: None, grace_s: float = 0.0) -> None:
    """Watch the process that started this one by multiprocessing, and the server that forked it, and end this one once
    one of them has ended.

    Args:
        stop: called then, before anything else.
        grace_s: how long this process has to end by itself; after that it ends without ceremony.
    """
    threading.Thread(target=_exit_once_it_has_ended, args=(os.getppid(), stop, grace_s), daemon=True).start()


def _exit_once_it_has_ended(forked_by: int, stop: Callable[[], object], grace_s: float) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not multiprocessing.connection.wait([parent.sentinel], PARENT_POLL_S) and os.getppid() == forked_by:
        pass  # of the server's end nothing else tells
    stop()
    time.sleep(grace_s)
    os._exit(1)
