"""The process that forks trainers: what they need is loaded once, so that a run begins to train within a second or two.

`python -m experiments.explorer.server FD` is started by `experiments.explorer.workers`, which it talks to over the
connection FD, and ends
with it: once that side is closed or gone, trainers are asked to stop, and what has not ended in time is killed.
Python's own fork server would live as long as its parent, and have loaded what the first of its users wants, a sweep
perhaps.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from experiments.explorer import trainer
from experiments.explorer.messages import ENDED, REMOVED, WARM, Order, Project, Projected, Reset, Said, Tell, Train
from experiments.runner import worker
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory

FORK = multiprocessing.get_context("fork")


@dataclass
class _Trainer:
    process: ForkProcess
    commands: Connection
    folder: str
    silent: bool = False
    """It has closed its side, or something has happened to it."""


@dataclass
class _Waiting:
    """A run that is to be trained once its trainer of before, which has been asked to stop, has ended; and what it is
    to be told then."""

    order: Train
    told: list[Tell] = field(default_factory=list)


@dataclass
class _Projector:
    """The process that computes UMAPs one after the other, kept since the first costs it most of a minute."""

    process: ForkProcess
    folders: Connection
    awaited: list[str] = field(default_factory=list)


class _Server:
    def __init__(self, owner: Connection) -> None:
        self._owner = owner
        self._trainers: dict[int, _Trainer] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._projector: _Projector | None = None
        self._warm = False

    def serve(self) -> None:
        """Until the owner is gone."""
        with suppress(EOFError, OSError):
            while True:
                trainers = list(self._trainers.values())
                heard: list[Any] = [self._owner, *(each.process.sentinel for each in trainers)]
                heard += [each.commands for each in trainers if not each.silent]
                heard += [self._projector.folders] if self._projector else []
                ready = multiprocessing.connection.wait(heard, timeout=None if self._warm else 0)
                if not (ready or self._warm):
                    self._load_the_rest()
                for attempt, each in list(self._trainers.items()):
                    if each.commands in ready:
                        self._relay(attempt, each)
                    if each.process.sentinel in ready:
                        self._reap(attempt)
                if self._projector and self._projector.folders in ready:
                    self._relay_projection(self._projector)
                if self._owner in ready:
                    self._obey(self._owner.recv())

    def _load_the_rest(self) -> None:
        """When there is nothing else to do."""
        import experiments.runner.preload  # noqa: F401

        self._warm = True
        self._owner.send(WARM)

    def _obey(self, order: Order) -> None:
        if isinstance(order, Train):
            self._train(order)
        elif isinstance(order, Tell):
            self._tell(order)
        elif isinstance(order, Reset):
            self._waiting.pop(order.folder, None)
            for attempt in [attempt for attempt, each in self._trainers.items() if each.folder == order.folder]:
                self._trainers[attempt].process.kill()
                self._reap(attempt)
            shutil.rmtree(order.folder, ignore_errors=True)
            self._owner.send(Said(order.attempt, REMOVED))
        else:
            self._project(order)

    def _tell(self, order: Tell) -> None:
        if order.attempt in self._trainers:
            with suppress(OSError):  # it is ending
                self._trainers[order.attempt].commands.send(order.command)
        for waiting in [each for each in self._waiting.values() if each.order.attempt == order.attempt]:
            waiting.told.append(order)

    def _train(self, order: Train) -> None:
        if any(each.folder == order.folder for each in self._trainers.values()):
            self._waiting[order.folder] = _Waiting(order)
            return
        ours, theirs = FORK.Pipe()
        others = [self._owner, ours, *self._connections()]
        process = FORK.Process(target=_train, args=(order, theirs, others))
        try:
            process.start()
        except OSError as error:
            worker.note(
                RunDirectory(order.folder),
                "error",
                f"no process could be started for the run: {os.strerror(error.errno or 0)}",
            )
            self._owner.send(Said(order.attempt, ENDED))
            ours.close()
        else:
            self._trainers[order.attempt] = _Trainer(process, ours, order.folder)
        theirs.close()

    def _project(self, order: Project) -> None:
        try:
            if self._projector is None:
                self._projector = self._start_projector()
            self._projector.awaited.append(order.folder)
            self._projector.folders.send(order.folder)
        except OSError as error:
            if self._projector is None:
                self._owner.send(
                    Projected(order.folder, f"no process could be started for it: {os.strerror(error.errno or 0)}")
                )
            # else it has just ended, which is read where its answers are

    def _start_projector(self) -> _Projector:
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=_project, args=(theirs, [self._owner, ours, *self._connections()]))
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return _Projector(process, ours)

    def _relay_projection(self, projector: _Projector) -> None:
        try:
            projected: Projected = projector.folders.recv()
        except (EOFError, OSError):
            projector.folders.close()
            projector.process.join()
            for folder in projector.awaited:
                words = (
                    f"the process that computes it has ended (exit code {projector.process.exitcode}); press UMAP again"
                )
                self._owner.send(Projected(folder, words))
            self._projector = None
        else:
            projector.awaited.remove(projected.folder)
            self._owner.send(projected)

    def _connections(self) -> list[Connection]:
        """Ends of pipes that a fork must close: who holds one of them would hide from another process that this one is
        gone."""
        return [each.commands for each in self._trainers.values()] + (
            [self._projector.folders] if self._projector else []
        )

    def _relay(self, attempt: int, of: _Trainer) -> None:
        try:
            state = of.commands.recv()
        except (EOFError, OSError):
            of.silent = True
        else:
            self._owner.send(Said(attempt, state))

    def _reap(self, attempt: int) -> None:
        ended = self._trainers.pop(attempt)
        ended.process.join()
        if (code := ended.process.exitcode or 0) < 0:
            worker.note_killed(RunDirectory(ended.folder), code)
        ended.process.close()
        ended.commands.close()
        self._owner.send(Said(attempt, ENDED))
        if waiting := self._waiting.pop(ended.folder, None):
            if any(order.command == "stop" for order in waiting.told):
                self._owner.send(Said(waiting.order.attempt, ENDED))
                return
            self._train(waiting.order)
            for order in waiting.told:
                self._tell(order)

    def close(self) -> None:
        """Let trainers stop, each of which sees that its pipe is closed."""
        for connection in self._connections():
            connection.close()
        deadline = time.monotonic() + trainer.GRACE_S + 1
        if self._projector:
            self._projector.process.kill()
        for each in self._trainers.values():
            each.process.join(max(0.0, deadline - time.monotonic()))
            each.process.kill()


def _forked(others: list[Connection]) -> None:
    """What a process owes to those that were forked before it, and to the interface, which goes first."""
    for connection in others:
        connection.close()
    os.nice(2)


def _train(order: Train, commands: Connection, others: list[Connection]) -> None:
    _forked(others)
    for name in [name for name in os.environ if name.startswith("IBQ_")]:
        del os.environ[name]
    os.environ.update(order.environment)
    config = TrainConfig.parse(order.config)
    trainer.train(config, order.folder, trainer.runtime_of(config, order.device), order.threads, commands)


def _project(folders: Connection, others: list[Connection]) -> None:
    from experiments.explorer.live_umap import project_live

    _forked(others)
    with suppress(EOFError, OSError):
        while True:
            folder = folders.recv()
            problem = ""
            try:
                project_live(Path(folder))
            except ConfigError as error:
                problem = str(error)
            except (
                Exception
            ) as error:  # whatever it is, a run removed meanwhile or a full disk, those that wait are told
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            folders.send(Projected(folder, problem))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupting a cell stops no run
    server = _Server(Connection(int(sys.argv[1])))
    server.serve()
    server.close()
    os._exit(0)  # there is nothing to tidy up, which Python would take seconds for


if __name__ == "__main__":
    main()
