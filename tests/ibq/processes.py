"""Several processes as torchrun starts them, on this machine and without a GPU."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.multiprocessing

from ibq.distributed import Processes, process_group

Work = Callable[[Processes, Path], None]


_ports = itertools.count(20_000 + 97 * os.getpid() % 10_000)
"""Below the ports that the system gives to whoever asks for any: one that is used only later is not given away
meanwhile."""


def free_port() -> int:
    for port in _ports:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def set_environment(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"})


def run_processes(work: Work, folder: Path, *worlds: int) -> None:
    """Calls a function of a test module in a group of that many processes, one world after the other; raises what any
    of them raises."""
    ports = [free_port() for _ in worlds]
    torch.multiprocessing.spawn(_run, args=(work, folder, worlds, ports), nprocs=max(worlds))


def _run(rank: int, work: Work, folder: Path, worlds: Sequence[int], ports: Sequence[int]) -> None:
    for world, port in zip(worlds, ports, strict=True):
        if rank < world:
            set_environment(rank, world, port)
            with process_group("cpu") as processes:
                work(processes, folder)
