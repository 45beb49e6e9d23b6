"""A run that is handled by hand: started, paused, changed while it trains, stopped, gone on with, removed. No method
but `wait` ever waits.

All that there is to see of a run lies in its directory (`experiments.explorer.trainer` says what). Those of the
explorer are runs/explore/NNNN-method-..., outside the study's rows, which never look there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from experiments import status
from experiments.explorer.trainer import LIVE
from experiments.explorer.view import tokenizer_config
from experiments.explorer.workers import WORKERS, Workers
from experiments.runner.runs import find_run, forget
from experiments.study import runs_folder
from ibq.config import TrainConfig
from ibq.errors import ConfigError, one_sentence
from ibq.run_directory import RunDirectory, write_json
from ibq.training.control import Command, last_command, on_their_way, send
from ibq.training.interventions import Intervention, after, read_interventions

__all__ = ["WORKERS", "ExplorerRun", "Workers", "explore_folder", "load_run", "new_run"]

State = Literal["new", "starting", "training", "paused", "stopping", "stopped", "finished", "failed", "loaded"]
STATES: dict[status.State, State] = {
    "pending": "new",
    "stopped": "stopped",
    "ok": "finished",
    "nan": "failed",
    "oom": "failed",
    "failed": "failed",
    "interrupted": "failed",
}
"""Of a run that no process trains, by what `experiments.status` says of it."""
TOLD: dict[str, State] = {"pause": "paused", "stop": "stopping"}
"""Of a run that a process trains, by what it was told last."""
POLL_S = 0.02
ROOM_BYTES = 2**20


def explore_folder() -> Path:
    """Absolute folder of the explorer's runs."""
    return (runs_folder() / "explore").absolute()


class ExplorerRun:
    """One run, and what may be done with it.

    Args:
        directory: its directory; the run can be trained if that lies in `explore_folder()`, and is only shown
            otherwise.
        config: what it began with, or is to begin with.
        workers: who trains it.
    """

    def __init__(self, directory: RunDirectory, config: TrainConfig, workers: Workers = WORKERS) -> None:
        self.directory, self.config, self.workers = directory, config, workers
        self.read_only = directory.path.parent != explore_folder()

    @property
    def name(self) -> str:
        return self.directory.path.name

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def step(self) -> int:
        """The newest logged step, 0 before the first."""
        recent = self.directory.read_recent(1)
        return int(recent[-1]["step"]) if recent else 0

    @property
    def quantizes(self) -> bool:
        """True once the quantizer is on, or is to be switched on at the next step."""
        return self.step >= self.amended_config.quantize_start

    @property
    def state(self) -> State:
        """ "new", "starting" until the first point is there, "training", "paused" between two steps, "stopping" until
        its process has ended, "stopped" resumably, "finished" with a row, "failed", of which `reason` says why, or
        "loaded": a run of the study, which is only shown."""
        if self.read_only:
            return "loaded"
        if self.workers.removes(self.directory):
            return "new"
        try:
            now = status.of(self.directory).state
        except ConfigError:  # the row is damaged
            return "failed"
        if now in ("ok", "nan") or not (now == "running" or self.workers.trains(self.directory)):
            return STATES[now]
        return TOLD.get(last_command(self.directory)) or ("training" if self._has_a_point else "starting")

    @property
    def _has_a_point(self) -> bool:
        """True once the newest attempt has written a live moment."""
        attempts = [attempt for attempt in self.directory.read_attempts() if attempt["event"] != "damaged"]
        live = self.directory.path / LIVE
        if not attempts or attempts[-1]["event"] != "started" or not live.is_file():
            return False
        return live.stat().st_mtime >= attempts[-1]["time"]

    @property
    def reason(self) -> str:
        """Cause of a failure, in one sentence; empty where the run has not failed."""
        if self.state != "failed":
            return ""
        try:
            now = status.of(self.directory)
        except ConfigError as error:
            return str(error)
        if now.state != "nan" and shutil.disk_usage(self.directory.path).free < ROOM_BYTES:
            return (
                f"the disk under {self.directory.path.parent} is full; make space and train the run again, it goes "
                f"on from where it was"
            )
        return now.reason or "its trainer ended without a word; train it again, it goes on from its last checkpoint"

    def train(self) -> None:
        """Begin, or go on after a pause, a stop or a failure from the last checkpoint, interventions included; a run
        that trains goes on training.

        Raises:
            ConfigError: the run is only shown, is finished, or did not stay finite.
        """
        self._require_own("trained")
        if self.directory.finished:
            raise ConfigError(
                f"run {self.name} has its row and cannot be trained further; reset it, or make a new run with more "
                f"steps"
            )
        begins = self.state not in ("starting", "training", "paused")
        with _written():
            read_interventions(self.directory)  # damaged, they are said here
            if not self.workers.removes(self.directory):
                send(self.directory, "resume")
            if begins:
                self.workers.train(self.directory, self.config)

    resume = train

    def pause(self) -> None:
        """Hold the trainer before its next step; what is asked meanwhile takes effect at that step. ConfigError: as
        `stop`."""
        self._require_own("paused")
        if self.state in ("starting", "training"):
            self._send("pause")

    def stop(self) -> None:
        """Ask the trainer to write a checkpoint before its next step, and to end; later `train` goes on from it, bit
        for bit.

        Raises:
            ConfigError: the run is only shown, or its folder cannot be written.
        """
        self._require_own("stopped")
        self.workers.train_no_more(self.directory)
        if self.state in ("starting", "training", "paused"):
            self._send("stop")

    def wait(self, timeout_s: float) -> bool:
        """Wait until this kernel has no process for the run, at most so long; whether it has none."""
        deadline = time.monotonic() + timeout_s
        while self.workers.trains(self.directory):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def reset(self) -> None:
        """End the run at once and remove its folder; it can then be trained from the beginning.

        Raises:
            ConfigError: the run is only shown, or is trained by another process.
        """
        self._require_own("reset")
        if not self.workers.remove(self.directory) and self.directory.path.is_dir():
            with _written():
                forget(self.directory)

    def intervene(self, fields: Mapping[str, float | bool | str], restart_dead: bool = False) -> None:
        """Change the run while it trains, from its next step on, once for all later ones.

        Args:
            fields: values by dotted path, of `ibq.training.interventions.live_fields`.
            restart_dead: put dead codes on features.

        Raises:
            ConfigError: a field cannot change while a run trains, a value does not fit, or the run is neither training
                nor paused.
        """
        self._require_own("changed")
        try:
            intervention = Intervention(fields=dict(fields), restart_dead=restart_dead)
        except ValidationError as error:
            raise ConfigError(one_sentence(error)) from None
        if (state := self.state) not in ("starting", "training", "paused"):
            raise ConfigError(
                f"run {self.name} is {state}, and only a run that trains or is paused can be changed; train it first"
            )
        after(self.amended_config, intervention)
        self._send(intervention)

    def _send(self, command: Command | Intervention) -> None:
        with _written():
            send(self.directory, command)

    @property
    def interventions(self) -> list[Intervention]:
        """Those that have taken effect, in their order."""
        return read_interventions(self.directory)

    @property
    def amended_config(self) -> TrainConfig:
        """Config with the fields that interventions have changed, those that are on their way included."""
        config = self.config
        for intervention in [*self.interventions, *on_their_way(self.directory)]:
            with suppress(ConfigError):  # the trainer refuses it
                config = after(config, intervention)
        return config

    def _require_own(self, done: str) -> None:
        if self.read_only:
            raise ConfigError(
                f"run {self.name} is the study's and is only shown, so it cannot be {done}; make a new run of its "
                f"settings"
            )


def new_run(config: TrainConfig, workers: Workers = WORKERS) -> ExplorerRun:
    """A run of the explorer in a folder of its own, which holds its config. ConfigError: it cannot be written."""
    folder, quantizer = explore_folder(), config.quantizer
    with _written():
        folder.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name[:4]) for path in folder.iterdir() if re.match(r"\d{4}-", path.name)), default=0)
        while True:
            number += 1
            path = folder / f"{number:04d}-{quantizer.method}-K{quantizer.codebook_size}-D{quantizer.code_dim}"
            if any(folder.glob(f"{number:04d}-*")):
                continue
            with suppress(FileExistsError):  # another kernel has taken it meanwhile
                path.mkdir()
                write_json(RunDirectory(path).config, config.to_json_dict())
                return ExplorerRun(RunDirectory(path), config, workers)


def load_run(run_id: str, workers: Workers = WORKERS) -> ExplorerRun:
    """A run by its id, or by an unambiguous beginning of it: one of the explorer's, or of the study, which is only
    shown.

    Raises:
        ConfigError: no run or several begin so, or it is a transformer's.
    """
    explored = sorted(path.parent for path in explore_folder().glob("*/config.json"))
    matches = [path for path in explored if path.name == run_id] or [
        path for path in explored if run_id and path.name.startswith(run_id)
    ]
    if len(matches) > 1:
        raise ConfigError(
            f"run {run_id!r} cannot be chosen: {len(matches)} runs of the explorer begin with it; give more of its id"
        )
    run = RunDirectory(matches[0]) if matches else find_run(run_id)
    return ExplorerRun(run, tokenizer_config(run), workers)


@contextmanager
def _written() -> Iterator[None]:
    """ConfigError in place of what the disk or the system refuses."""
    try:
        yield
    except OSError as error:
        why, where = os.strerror(error.errno or errno.EIO), error.filename or explore_folder()
        raise ConfigError(f"{why}: {where}; make space, or let IBQ_RUNS name another folder") from None
