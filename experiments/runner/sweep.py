"""Train the runs of a study: one process each, several at a time, resumable at any moment, with a word on what is
left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from experiments import status
from experiments.cells import STAGES, Cell, unique_runs
from experiments.runner import worker
from experiments.runner.pool import Pool, cores
from experiments.runner.throughput import step_cost, work
from experiments.study import Study, advance, possible
from ibq.data import load_images
from ibq.distributed import resolve_device
from ibq.errors import ConfigError, require_writable

POLL_S = 0.3
"""Longest wait for a trainer to end, between looks at the budget of time and at hung trainers."""
REPORT_S = 30.0
"""Time between two lines on what is left."""
HANG_S = 600.0
"""Without a sign of life for so long, a trainer counts as hung. A tokenizer's evaluation, which gives none, must end
within it."""


OWN_FOLDER = "copy the runs into a folder of your own and name that by IBQ_RUNS"
"""Remedy where runs are another user's."""


@dataclass
class Outcome:
    """Outcome of `train_study`: runs by how they ended."""

    finished: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    unfinished: list[Cell] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0


def default_slots(device: str) -> int:
    """Runs at a time: one a core on a CPU (a small run gains little from a second core), one on a GPU."""
    return 1 if resolve_device(device).type == "cuda" else cores()


def train_study(
    study: Study,
    *,
    slots: int | None = None,
    device: str = "auto",
    time_budget_s: float | None = None,
    fail_fast: bool = False,
    hang_s: float = HANG_S,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train every run of a study that has no row yet; runs that wait for a search, a tokenizer or neighbours join as
    soon as these are finished.

    Args:
        study: what.
        slots: runs at a time, at least 1; None: one a core on a CPU, one on a GPU.
        device: "auto", "cpu", "cuda" or "cuda:N".
        time_budget_s: after so many seconds runs are stopped at their next step, resumably.
        fail_fast: stop everything at the first run that fails.
        hang_s: a trainer that shows no sign of life for so long is killed and recorded as timed out.
        say: receives one line at a time.

    Returns:
        The outcome; failures are recorded in each run's attempts.jsonl and are tried again by the next call.

    Raises:
        ConfigError: slots below 1, no time, an unknown device, a config that contradicts itself, or a folder that
            cannot be written.
        DataError: the data are not to be had.
    """
    if slots is not None and slots < 1:
        raise ConfigError(f"slots={slots} must be at least 1")
    if time_budget_s is not None and not time_budget_s > 0:
        raise ConfigError(f"a time budget of {time_budget_s / 60:g} minutes leaves nothing to do; give more than 0")
    if not hang_s > 0:
        raise ConfigError(
            f"a hang timeout of {hang_s / 60:g} minutes would kill every trainer at once; give more than 0"
        )
    study, _ = advance(study)
    todo = [cell for cell in unique_runs(study.cells) if not cell.run.finished]
    outcome = Outcome(skipped=len(unique_runs(study.cells)) - len(todo))
    if outcome.skipped:
        say(f"{outcome.skipped} of {outcome.skipped + len(todo)} runs are finished already")
    if not todo:
        return outcome
    for cell in todo:
        require_writable(cell.run.path, f"{len(todo)} runs have no row yet; {OWN_FOLDER}")
    for data in {cell.config.data for cell in todo if cell.config.data.kind != "imagefolder"}:
        load_images(data, "test")  # fetched here, once, or refused in one sentence; a folder's hash has read it already
    slots = slots or default_slots(device)
    threads = max(1, cores() // slots)  # from slots alone: sums, and so rows, depend on the threads in their last bits
    say(
        f"training {len(todo)} runs on {resolve_device(device)}, {min(slots, len(todo))} at a time, threads each: "
        f"{threads}"
    )

    study.runs_folder.mkdir(parents=True, exist_ok=True)
    runtime = replace(study.preset.runtime, device=device)
    progress = _Progress(study, todo, say)
    pool, cell_of = Pool(runtime, threads), {cell.run.path: cell for cell in todo}
    queue, stopping, started = list(todo), False, time.monotonic()

    def stop(reason: str) -> None:
        nonlocal queue, stopping
        if not stopping:
            say(reason)
        queue, stopping = [], True
        pool.stop()

    with pool:
        while queue or len(pool):
            if time_budget_s is not None and time.monotonic() - started > time_budget_s:
                stop(f"time budget of {time_budget_s / 60:.1f} minutes spent; stopping at the next step, resumably")
            while queue and len(pool) < slots:
                cell = queue.pop(0)
                pool.start(cell.run, cell.config, cell.tokenizer.run if cell.tokenizer else None)
            pool.kill_hung(hang_s)
            for run, code in pool.reap(POLL_S):
                cell = cell_of[run.path]
                for note in notes_of_last_attempt(cell):
                    say(f"{cell.name}: {note}")
                if cell.run.finished:
                    outcome.finished.append(cell)
                    study, joining = advance(study)
                    new = [each for each in unique_runs(joining) if not each.run.finished]
                    joined = [each for each in new if each.run.path not in cell_of]
                    cell_of |= {each.run.path: each for each in joined}
                    todo += joined
                    progress.count(study)
                    progress.finished(cell)
                    queue = [] if stopping else sorted(queue + joined, key=lambda cell: cell.seed)
                elif code == worker.BUSY:
                    queue += [] if stopping else [cell]  # another driver trains it: look again after the others
                elif code == worker.DISK_FULL:
                    outcome.failed.append(cell)
                    stop(
                        f"the disk under {cell.run.path.parent} is full; make space and give the same command again, "
                        f"it goes on from here"
                    )
                elif code != 0:
                    outcome.failed.append(cell)
                    unnoted = f"{cell.run.path} cannot be written" if code == worker.UNWRITABLE else ""
                    say(f"FAILED {cell.name}: {unnoted or status.of(cell.run).reason}")
                    if fail_fast:
                        stop("stopping everything at the first failure, as --fail-fast says")
            progress.heartbeat()
    done = {cell.run.path for cell in outcome.finished + outcome.failed}
    outcome.unfinished = [cell for cell in todo if cell.run.path not in done] + unique_runs(study.waiting)
    outcome.seconds = time.monotonic() - started
    return outcome


def notes_of_last_attempt(cell: Cell) -> list[str]:
    """Damaged checkpoints that the last attempt at a run passed over, in words."""
    notes: list[str] = []
    for attempt in cell.run.read_attempts():
        notes = (
            []
            if attempt["event"] == "started"
            else [*notes, attempt["reason"]]
            if attempt["event"] == "damaged"
            else notes
        )
    return notes


class _Progress:
    """Lines, not a bar: they read the same in a terminal, a log and a notebook. Time left is what is left to do over
    the speed so far, with steps of the two stages weighed by what they take."""

    def __init__(self, study: Study, cells: list[Cell], say: Callable[[str], None]) -> None:
        self._study, self._preset, self._cells, self._say, self._count = study, study.preset, cells, say, 0
        self._start, self._last = time.monotonic(), time.monotonic()
        known = {stage: cost for stage in STAGES if (cost := step_cost(study, stage).seconds)}
        self._weights = {stage: known.get(stage) or next(iter(known.values()), 1.0) for stage in STAGES}
        self.count(study)
        self._at_start = self._done()

    def count(self, study: Study) -> None:
        """Count the work: again whenever waiting cells have joined or turned out not to be needed."""
        self._study = study
        everything = [*self._cells, *unique_runs(possible(self._study))]
        self._runs, self._steps = len(everything), sum(cell.config.steps for cell in everything)
        self._total = sum(self._weight(cell) for cell in everything)

    def _weight(self, cell: Cell) -> float:
        return self._weights[cell.stage] * work(cell, self._preset)

    def _done(self) -> float:
        return sum(self._weight(cell) * status.share_done(cell.run, cell.config.steps) for cell in self._cells)

    def _left(self) -> str:
        done = self._done()
        if done == self._at_start:
            return status.time_left(None)
        return status.time_left((time.monotonic() - self._start) * (self._total - done) / (done - self._at_start))

    def finished(self, cell: Cell) -> None:
        row = cell.run.read_row()
        self._count += 1
        self._say(f"[{self._count}/{self._runs}] {row['status']} {cell.name}: {status.result_of(row)}; {self._left()}")
        self._last = time.monotonic()

    def heartbeat(self) -> None:
        if time.monotonic() - self._last > REPORT_S:
            self._last = time.monotonic()
            steps = round(
                sum(cell.config.steps * status.share_done(cell.run, cell.config.steps) for cell in self._cells)
            )
            self._say(f"step {steps} of {self._steps} over all runs; {self._left()}")
