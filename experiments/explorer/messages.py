"""Messages between the kernel's side and the server of trainers; a module of its own, since the server's is its
main one."""

from __future__ import annotations

from typing import Any, NamedTuple

WARM, ENDED, REMOVED = "warm", "ended", "removed"


class Train(NamedTuple):
    """Begin to train, once a trainer of the same folder has ended; `attempt` is what messages about it are told apart
    by."""

    attempt: int
    config: dict[str, Any]
    folder: str
    device: str
    threads: int
    environment: dict[str, str]
    """The IBQ_ variables of the process that asks."""


class Tell(NamedTuple):
    """Pass on to a trainer "pause", "resume", "stop" or an Intervention."""

    attempt: int
    command: Any


class Reset(NamedTuple):
    """Kill the trainer of a folder, if one still runs, and remove the folder."""

    attempt: int
    folder: str


class Project(NamedTuple):
    """Project a run's codes and features by UMAP."""

    folder: str


class Said(NamedTuple):
    """State of an attempt: the state that its trainer says, ENDED, or REMOVED."""

    attempt: int
    state: str


class Projected(NamedTuple):
    """A projection has been written, or, in one sentence, why it has not."""

    folder: str
    problem: str


Order = Train | Tell | Reset | Project
