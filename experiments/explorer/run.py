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
from experiments.explorer.workers import WORKERS, Workers
from experiments.runner.runs import find_run, forget
from experiments.study import runs_folder
from ibq.config import TrainConfig
from ibq.errors import ConfigError, one_sentence
from ibq.run_directory import RunDirectory, write_json
from ibq.training.interventions import Intervention, after, read_interventions

__all__ = ["WORKERS", "ExplorerRun", "Workers", "explore_folder", "load_run", "new_run"]

State = Literal["new", "starting", "training", "paused", "stopping", "stopped", "finished", "failed", "loaded"]
SHOWN: dict[str, State] = {"removing": "new"}
"""As what a trainer's activity is shown, where not by its own name."""
POLL_S = 0.02
ROOM_BYTES = 2**20


def explore_folder() -> Path:
    """Where the explorer's runs lie, absolute."""
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
    def state(self) -> State:
        """ "new", "starting" until the first point is there, "training", "paused" between two steps, "stopping" until
        its process has ended, "stopped" resumably, "finished" with a row, "failed", of which `reason` says why, or
        "loaded": a run of the study, which is only shown."""
        if self.read_only:
            return "loaded"
        activity = self.workers.activity(self.directory)
        if activity is not None:
            return SHOWN.get(activity, activity)  # type: ignore[arg-type]
        if self.directory.finished:
            return "failed" if self._lost else "finished"
        if status.is_held(self.directory):
            return "training"  # by another kernel
        events = [attempt["event"] for attempt in self.directory.read_attempts() if attempt["event"] != "damaged"]
        if not events:
            return "new"
        return "stopped" if events[-1] == "stopped" else "failed"

    @property
    def reason(self) -> str:
        """Why a run has failed, in one sentence; empty otherwise."""
        if self.state != "failed":
            return ""
        if self.directory.finished:
            return self._lost
        if shutil.disk_usage(self.directory.path).free < ROOM_BYTES:
            return (
                f"the disk under {self.directory.path.parent} is full; make space and train the run again, it goes "
                f"on from where it was"
            )
        return (
            status.of(self.directory).reason
            or "its trainer ended without a word; train it again, it goes on from its last checkpoint"
        )

    @property
    def _lost(self) -> str:
        """Why a row gives no result, empty where it gives one."""
        try:
            row = self.directory.read_row()
        except ConfigError as error:
            return str(error)
        return "" if row["status"] == "ok" else str(row["reason"])

    def train(self) -> None:
        """Begin, or go on after a stop or a failure from the last checkpoint, interventions included; a run that trains
        goes on training.

        Raises:
            ConfigError: the run is only shown, is finished, did not stay finite, or is trained by another process.
        """
        self._require_own("trained")
        if self.directory.finished:
            raise ConfigError(
                f"run {self.name} has its row and cannot be trained further; reset it, or make a new run with more "
                f"steps"
            )
        activity = self.workers.activity(self.directory)
        if activity in (None, "removing", "stopping"):
            self._require_free()
            with _written():
                self.workers.train(self.directory, self.config, self.amended_config)
        else:
            self.workers.tell(self.directory, "resume")

    def pause(self) -> None:
        """Hold the trainer before its next step; what is asked meanwhile takes effect at that step. ConfigError: as
        `stop`."""
        self._require_own("paused")
        self._require_free()
        self.workers.tell(self.directory, "pause")

    def resume(self) -> None:
        """Go on after a pause or a stop; errors as of `train`."""
        self.train()

    def stop(self) -> None:
        """Ask the trainer to write a checkpoint before its next step, and to end; later `train` goes on from it, bit
        for bit.

        Raises:
            ConfigError: the run is only shown, or is trained by another process.
        """
        self._require_own("stopped")
        self._require_free()
        self.workers.tell(self.directory, "stop")

    def wait(self, timeout_s: float) -> bool:
        """Wait until the run's process has ended, at most so long; whether it has."""
        deadline = time.monotonic() + timeout_s
        while self.workers.activity(self.directory) is not None:
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
        if not self.workers.intervene(self.directory, intervention):
            state = "stopping" if self.workers.activity(self.directory) == "stopping" else self.state
            raise ConfigError(
                f"run {self.name} is {state}, and only a run that trains or is paused can be changed; train it first"
            )

    def project_umap(self) -> None:
        """Have the newest codes and features projected by UMAP; `experiments.explorer.live_umap.read_live_umap` gives
        the result, later."""
        self.workers.project(self.directory)

    @property
    def interventions(self) -> list[Intervention]:
        """Those that have taken effect, in their order."""
        return read_interventions(self.directory)

    @property
    def amended_config(self) -> TrainConfig:
        """The config with the fields that interventions have changed, those that are on their way included."""
        if (held := self.workers.config_of(self.directory)) is not None:
            return held
        config = self.config
        for intervention in self.interventions:
            config = after(config, intervention)
        return config

    def _require_own(self, done: str) -> None:
        if self.read_only:
            raise ConfigError(
                f"run {self.name} is the study's and is only shown, so it cannot be {done}; make a new run of its "
                f"settings"
            )

    def _require_free(self) -> None:
        if self.workers.activity(self.directory) is None and status.is_held(self.directory):
            raise ConfigError(f"run {self.name} is being trained by another process; stop it there first")


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
    config = run.read_config()
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"run {run.path.name} is a transformer's, and the explorer shows tokenizers; load its tokenizer's run"
        )
    return ExplorerRun(run, config, workers)


@contextmanager
def _written() -> Iterator[None]:
    """ConfigError in place of what the disk or the system refuses."""
    try:
        yield
    except OSError as error:
        why, where = os.strerror(error.errno or errno.EIO), error.filename or explore_folder()
        raise ConfigError(f"{why}: {where}; make space, or let IBQ_RUNS name another folder") from None
