"""The processes of the explorer as a notebook's kernel sees them.

Nothing here waits: orders are small messages to the server, which reads them when it can, and what became of them is
read when it is asked for.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Literal

from experiments.explorer.messages import ENDED, REMOVED, WARM, Order, Project, Projected, Reset, Said, Tell, Train
from experiments.runner.pool import cores
from experiments.runner.worker import note
from experiments.study import ROOT
from ibq.config import TrainConfig
from ibq.run_directory import RunDirectory
from ibq.training.interventions import Intervention, after

MOST_RUNS = 4
"""Runs that are trained side by side: what the cores are shared by."""
Activity = Literal["starting", "training", "paused", "stopping", "removing"]


@dataclass
class _Attempt:
    number: int
    config: TrainConfig
    """As interventions have left it, those that are on their way included."""
    activity: Activity = "starting"


class Workers:
    """One server that forks trainers, started when it is first wanted, and the attempts it makes; safe to call from any
    thread.

    Args:
        device: that runs train on, as `Runtime` has it.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._attempts: dict[str, _Attempt] = {}
        self._projections: dict[str, str | None] = {}
        """By a run's path, what was wrong with the UMAP that was last asked for: "" nothing, None while it is
        awaited."""
        self._server: subprocess.Popen[bytes] | None = None
        self._closed: list[subprocess.Popen[bytes]] = []
        self._connection: Connection
        self._log: IO[bytes]
        self._warm = False

    def warm(self) -> None:
        """Begin to load what training needs, where that has not been done."""
        with self._lock:
            self._listen()
            self._closed = [server for server in self._closed if server.poll() is None]
            if self._server is not None:
                return
            self._connection, theirs = Pipe()
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            self._server = subprocess.Popen(
                [sys.executable, "-m", "experiments.explorer.server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                # a signal for the kernel's group is not for trainers, which have their own way of ending
                start_new_session=True,
            )
            theirs.close()

    @property
    def is_warm(self) -> bool:
        """Whether a run would begin to train at once."""
        with self._lock:
            self._listen()
            return self._warm

    def close(self, timeout_s: float = 0.0) -> None:
        """Stop all runs, resumably, and end all processes; wait for that at most so long."""
        with self._lock:
            self._lose()
            deadline = time.monotonic() + timeout_s
            for server in self._closed:
                try:
                    server.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
            self._closed = [server for server in self._closed if server.returncode is None]

    def train(self, run: RunDirectory, config: TrainConfig, amended_config: TrainConfig) -> None:
        """Begin to train a run, or go on with one that interventions have changed."""
        with self._lock:
            self.warm()
            attempt, last = _Attempt(next(self._numbers), amended_config), self._attempts.get(str(run.path))
            environment = {name: value for name, value in os.environ.items() if name.startswith("IBQ_")}
            threads = max(
                1, cores() // MOST_RUNS
            )  # of the machine alone: sums, and so runs, depend on it in their last bits
            if last and last.activity == "stopping":
                attempt.config = last.config
            self._attempts[str(run.path)] = attempt
            self._send(Train(attempt.number, config.to_json_dict(), str(run.path), self.device, threads, environment))

    def intervene(self, run: RunDirectory, intervention: Intervention) -> bool:
        """Change a run that is trained; False where this kernel trains no such run. ConfigError: the change does not
        fit it."""
        with self._lock:
            if self.activity(run) in (None, "stopping", "removing"):
                return False
            attempt = self._attempts[str(run.path)]
            attempt.config = after(attempt.config, intervention)
            self._send(Tell(attempt.number, intervention))
            return True

    def tell(self, run: RunDirectory, command: Literal["pause", "resume", "stop"]) -> None:
        """Ask something of a run's trainer, if there is one."""
        with self._lock:
            if self.activity(run) in (None, "removing"):
                return
            attempt = self._attempts[str(run.path)]
            if command == "stop":
                attempt.activity = "stopping"
            elif attempt.activity == "stopping":
                return
            elif command == "pause":
                attempt.activity = "paused"
            elif attempt.activity == "paused":
                attempt.activity = "training"
            self._send(Tell(attempt.number, command))

    def remove(self, run: RunDirectory) -> bool:
        """Kill a run's trainer and remove its folder; False where this kernel trains no such run."""
        with self._lock:
            if self.activity(run) is None:
                return False
            attempt = self._attempts[str(run.path)]
            attempt.activity = "removing"
            self._send(Reset(attempt.number, str(run.path)))
            return True

    def project(self, run: RunDirectory) -> None:
        """Project a run's codes and features by UMAP, in a process of its own, unless that is being done; the result is
        what `experiments.explorer.live_umap.read_live_umap` reads."""
        with self._lock:
            self.warm()
            if self._projections.get(str(run.path), "") is not None:
                self._projections[str(run.path)] = None
                self._send(Project(str(run.path)))

    def projection(self, run: RunDirectory) -> str | None:
        """Error of the UMAP that was last asked for of a run: "" nothing, None while it is awaited."""
        with self._lock:
            self._listen()
            return self._projections.get(str(run.path), "")

    def config_of(self, run: RunDirectory) -> TrainConfig | None:
        """The config of a run that this kernel trains, with changes that are on their way; None where it trains no such
        run."""
        with self._lock:
            return None if self.activity(run) is None else self._attempts[str(run.path)].config

    def activity(self, run: RunDirectory) -> Activity | None:
        """State of a run's trainer; None where this kernel has none for it."""
        with self._lock:
            self._listen()
            attempt = self._attempts.get(str(run.path))
            return attempt.activity if attempt else None

    def _send(self, order: Order) -> None:
        try:
            self._connection.send(order)
        except OSError:
            self._mourn()

    def _listen(self) -> None:
        """Take in what the server has said."""
        try:
            while self._server is not None and self._connection.poll():
                said = self._connection.recv()
                if said == WARM:
                    self._warm = True
                elif isinstance(said, Said):
                    self._note(said)
                elif isinstance(said, Projected):
                    self._projections[said.folder] = said.problem
        except (EOFError, OSError):
            self._mourn()

    def _note(self, said: Said) -> None:
        for path, attempt in list(self._attempts.items()):
            if attempt.number != said.attempt:
                continue
            if said.state == (REMOVED if attempt.activity == "removing" else ENDED):
                del self._attempts[path]
            elif attempt.activity not in ("stopping", "removing"):
                attempt.activity = said.state  # type: ignore[assignment]

    def _mourn(self) -> None:
        """The server has ended by itself. Trainers record that they stop; of runs that have not got one it is recorded
        here."""
        self._log.seek(0)
        last_words = (self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        for path, attempt in self._attempts.items():
            if attempt.activity == "starting":
                note(
                    RunDirectory(path),
                    "error",
                    f"the process that starts trainers has ended: {last_words}; train the run again",
                )
        awaited = [path for path, problem in self._projections.items() if problem is None]
        self._lose()
        self._projections |= dict.fromkeys(
            awaited, f"the process that starts others has ended: {last_words}; press UMAP again"
        )

    def _lose(self) -> None:
        """The server is gone, or let go: trainers, seeing that, stop by themselves."""
        if self._server is None:
            return
        self._connection.close()
        self._log.close()
        self._closed.append(self._server)
        self._server, self._warm = None, False
        self._attempts.clear()
        self._projections.clear()


WORKERS = Workers()
"""Those of this process; none is started before it is wanted."""
