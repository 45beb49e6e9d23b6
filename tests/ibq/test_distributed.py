"""Collectives with three processes and with one; the error message when a process is gone."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from processes import free_port, run_processes, set_environment

import ibq.distributed as distributed
from ibq.distributed import Processes, process_group
from ibq.errors import ConfigError, PeerLostError
from ibq.training.logging import LossWindow, TokenWindow

CPU = torch.device("cpu")
WORLD = 3


# --- Three processes --------------------------------------------------------------------------------------------------


def share(processes: Processes, folder: Path) -> None:
    rank = processes.rank
    with process_group("cpu") as again:  # a group that is there is used, and stays
        assert again == processes
    assert (rank, WORLD, rank == 0) == (distributed.rank(), distributed.world_size(), distributed.is_writer())
    own = torch.tensor([1.0, 10.0 * rank], dtype=torch.float64)
    rows = torch.empty(0) if rank == 1 else torch.full((1 + rank, 2), rank, dtype=torch.uint8)
    gathered = distributed.gather_rows(rows)
    shared = {
        "flags": distributed.any_rank(rank == 2, False, rank == 0),
        "mean": distributed.mean_over_ranks(own).tolist(),
        "numbers": distributed.sum_of_numbers(0.25 * rank, 2**40),
        "objects": distributed.gather_objects({"rank": rank}),
        "first": distributed.copy_of_first([f"of {rank}"]),
        "rows": gathered.tolist(),
    }
    assert gathered.dtype == torch.uint8 or rank == 1
    assert own.tolist() == [1.0, 10.0 * rank], "the mean is not in place"
    try:
        with distributed.shared_errors(ConfigError):
            if rank == 1:
                raise ConfigError("not so")
    except ConfigError as error:
        shared["error"] = str(error)
    tokens, losses = TokenWindow(4, CPU), LossWindow(CPU)
    tokens.add(torch.tensor([rank, 3]))
    for loss in range(rank + 1):
        losses.add(torch.tensor(float(loss)))
    shared["windows"] = (tokens.total().tolist(), losses.mean())
    tokens.restore(tokens.total())
    losses.restore(losses.total())
    shared["restored windows"] = (tokens.total().tolist(), losses.mean())
    distributed.barrier()
    torch.save(shared, folder / f"{rank}.pt")


@pytest.mark.processes
def test_three_processes_share_numbers_flags_rows_and_errors(tmp_path: Path) -> None:
    run_processes(share, tmp_path, WORLD)
    one, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert one == others[0] == others[1]
    assert one["flags"] == (True, False, True)
    assert one["mean"] == [1.0, 10.0]
    assert one["numbers"] == (0.75, 3 * 2**40)
    assert one["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert one["first"] == ["of 0"]
    assert one["rows"] == [[0, 0], [2, 2], [2, 2], [2, 2]]
    assert one["error"] == "not so"
    assert one["windows"] == one["restored windows"] == ([1, 1, 1, 3], pytest.approx(4 / 6, rel=1e-15))


# --- One process ------------------------------------------------------------------------------------------------------


def test_one_process_alone_needs_no_group() -> None:
    with process_group("cpu") as processes:
        assert processes == Processes(0, 1, CPU, 0)
        assert not dist.is_initialized()
    value = torch.tensor([1.5])
    assert distributed.any_rank(True, False) == (True, False)
    assert distributed.mean_over_ranks(value) == value
    assert distributed.mean_over_ranks(value) is not value
    assert distributed.sum_of_numbers(1.5, 2) == (1.5, 2)
    assert distributed.gather_objects("it") == ["it"]
    assert distributed.copy_of_first("it") == "it"
    assert torch.equal(distributed.gather_rows(value), value)
    distributed.barrier()
    with pytest.raises(ConfigError, match="not so"), distributed.shared_errors(ConfigError):
        raise ConfigError("not so")


def test_the_group_ends_with_its_block_and_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed.TORCHRUN:
        monkeypatch.setenv(name, "0")
    set_environment(0, 1, free_port())
    with process_group("cpu") as processes:
        assert processes == Processes(0, 1, CPU, 0)
        assert dist.is_initialized()
    assert not dist.is_initialized()
    set_environment(0, 1, free_port())
    with pytest.raises(ValueError, match="in the block"), process_group("cpu"):
        raise ValueError("in the block")
    assert not dist.is_initialized()


def test_an_environment_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(device: str) -> None:
        with process_group(device):
            pass

    monkeypatch.setenv("RANK", "0")
    with process_group("cpu") as processes:  # by itself it may mean anything
        assert processes.world == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="set but LOCAL_RANK and MASTER_PORT not; start with torchrun, or unset them"):
        enter("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError,
        match="process 2 of this node, counted from 0, finds 2 GPUs; start torchrun with --nproc-per-node=2",
    ):
        enter("auto")
    with pytest.raises(ConfigError, match="device='cuda:1' names one GPU for all processes; set device='cuda'"):
        enter("cuda:1")
    assert not dist.is_initialized()


# --- A process is gone ------------------------------------------------------------------------------------------------


def lose_the_last(rank: int, how: str, timeout_s: float, port: int, folder: Path) -> None:
    """The last process leaves with an error, does not answer, or dies; the others write what they hear of it, and after
    how long."""
    distributed.TIMEOUT = timedelta(seconds=timeout_s)
    set_environment(rank, WORLD, port)
    heard = [folder / str(other) for other in range(WORLD - 1)]
    try:
        with process_group("cpu"):
            distributed.barrier()
            together = time.monotonic()
            if rank == WORLD - 1:
                if how == "error":
                    raise ConfigError("its own")
                if how == "death":
                    os._exit(0)
                while not all(path.exists() for path in heard):
                    assert time.monotonic() - together < 60
                    time.sleep(0.05)
            distributed.any_rank(True)
    except ConfigError:
        pass
    except PeerLostError as error:
        if rank < WORLD - 1:
            heard[rank].write_text(f"{time.monotonic() - together} {error}")


@pytest.mark.processes
@pytest.mark.parametrize(("how", "timeout_s"), [("error", 60), ("silence", 10), ("death", 60)])
def test_those_who_stay_hear_in_a_sentence_that_one_is_gone(how: str, timeout_s: float, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(lose_the_last, args=(how, timeout_s, free_port(), tmp_path), nprocs=WORLD)
    for rank in range(WORLD - 1):
        seconds, sentence = (tmp_path / str(rank)).read_text().split(maxsplit=1)
        assert float(seconds) < 30, "an end is heard of at once, a silence after the timeout"
        assert sentence.startswith("another process of this run has ended or does not answer (")
        assert sentence.endswith("); what it said last tells why")
        assert "\n" not in sentence


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer. This is"),
            "Connection reset by peer",
        ),
        (
            RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8ms for recv"),
            "Timed out waiting 8ms for recv",
        ),
        (RuntimeError("Application timeout caused pair closure"), "Application timeout"),
        (
            dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was\nncclRemoteError"),
            "remote process exited",
        ),
        (
            dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote crash?"),
            "got 0 bytes",
        ),
        (dist.DistNetworkError("The client socket has timed out after 60000ms, here"), "timed out after 60000ms"),
    ],
)
def test_errors_of_collectives_become_a_sentence(error: RuntimeError, reason: str) -> None:
    with pytest.raises(PeerLostError) as caught, distributed.peers():
        raise error
    assert f"({reason})" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),
        RuntimeError("[/x/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
        dist.DistBackendError("NCCL error: invalid usage, Duplicate GPU detected"),
        PeerLostError("as it is"),
        ConnectionResetError("Connection reset by peer"),
    ],
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, distributed.peers():
        raise error
    assert caught.value is error
