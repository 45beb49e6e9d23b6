"""Train the runs of a study: one process each, several at a time, resumable at any moment, with a word on what is
left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from typing import Any

from experiments.analysis import diagnoses
from experiments.runner import worker
from experiments.runner.throughput import step_cost, work
from experiments.study import STAGES, Cell, Study, unique_runs
from ibq.distributed import resolve_device
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory

POLL_S = 0.3
HEARTBEAT_S = 30.0
GRACE_S = 8.0
"""How long trainers have to write a checkpoint when asked to stop."""
HANG_S = 600.0
"""Without a sign of life for so long, a trainer counts as hung. A tokenizer's evaluation, which gives none, must end
within it."""


@dataclass
class Outcome:
    """What a call of `train_study` did: runs by how they ended."""

    finished: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    unfinished: list[Cell] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0


def default_slots(device: str) -> int:
    """Runs at a time: one a core on a CPU (a small run gains little from a second core), one on a GPU."""
    return 1 if resolve_device(device).type == "cuda" else cores()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        ConfigError: slots below 1, no time, an unknown device, or a config that contradicts itself.
    """
    if slots is not None and slots < 1:
        raise ConfigError(f"slots={slots} must be at least 1")
    if time_budget_s is not None and not time_budget_s > 0:
        raise ConfigError(f"a time budget of {time_budget_s / 60:g} minutes leaves nothing to do; give more than 0")
    if not hang_s > 0:
        raise ConfigError(
            f"a hang timeout of {hang_s / 60:g} minutes would kill every trainer at once; give more than 0"
        )
    study.advance()
    todo = [cell for cell in unique_runs(study.cells) if not cell.run.finished]
    outcome = Outcome(skipped=len(unique_runs(study.cells)) - len(todo))
    if outcome.skipped:
        say(f"{outcome.skipped} of {outcome.skipped + len(todo)} runs are finished already")
    if not todo:
        return outcome
    slots = slots or default_slots(device)
    threads = max(1, cores() // slots)  # from slots alone: sums, and so rows, depend on the threads in their last bits
    say(
        f"training {len(todo)} runs on {resolve_device(device)}, {min(slots, len(todo))} at a time, threads each: "
        f"{threads}"
    )

    study.runs_folder.mkdir(parents=True, exist_ok=True)
    runtime = replace(study.preset.runtime, device=device)
    progress = _Progress(study, todo, say)
    pool = _Pool(runtime, threads)
    queue, stopping, started = list(todo), False, time.monotonic()

    def stop(reason: str) -> None:
        nonlocal queue, stopping
        if not stopping:
            say(reason)
        queue, stopping = [], True
        pool.stop()

    with pool:
        while queue or pool.running:
            if time_budget_s is not None and time.monotonic() - started > time_budget_s:
                stop(f"time budget of {time_budget_s / 60:.1f} minutes spent; stopping at the next step, resumably")
            while queue and len(pool.running) < slots:
                pool.start(queue.pop(0))
            pool.kill_hung(hang_s)
            for cell, code in pool.reap():
                for note in notes_of_last_attempt(cell):
                    say(f"{cell.name}: {note}")
                if cell.run.finished:
                    outcome.finished.append(cell)
                    known = {each.run.path for each in todo}
                    joined = [
                        each
                        for each in unique_runs(study.advance())
                        if not each.run.finished and each.run.path not in known
                    ]
                    todo += joined
                    progress.count()
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
                    say(f"FAILED {cell.name}: {failure_reason(cell.run)}")
                    if fail_fast:
                        stop("stopping everything at the first failure, as --fail-fast says")
            progress.heartbeat()
            time.sleep(POLL_S)
    done = {cell.run.path for cell in outcome.finished + outcome.failed}
    outcome.unfinished = [cell for cell in todo if cell.run.path not in done] + unique_runs(study.waiting)
    outcome.seconds = time.monotonic() - started
    return outcome


def failure_reason(run: RunDirectory) -> str:
    """Why the last attempt at a run ended without a row, '' where there was none or it is still going on."""
    attempts = [attempt for attempt in run.read_attempts() if attempt["event"] != "damaged"]
    if not attempts or attempts[-1]["event"] == "started":
        return ""
    return attempts[-1].get("reason") or attempts[-1]["event"]


def notes_of_last_attempt(cell: Cell) -> list[str]:
    """What the last attempt at a run had to work around: damaged checkpoints."""
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


class _Pool:
    """Trainer processes, forked from a server that has torch loaded. Leaving the context stops what still runs."""

    def __init__(self, runtime: Any, threads: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["experiments.runner.preload"])
        self._stopping = False
        self._runtime, self._threads = runtime, threads
        self.running: dict[ForkServerProcess, Cell] = {}
        self._started: dict[ForkServerProcess, float] = {}
        self._hung: dict[ForkServerProcess, str] = {}

    def start(self, cell: Cell) -> None:
        tokenizer = str(cell.tokenizer.run.path) if cell.tokenizer else None
        arguments = (cell.config.to_json_dict(), str(cell.run.path), self._runtime, self._threads, tokenizer)
        process = self._context.Process(target=worker.train, args=arguments, daemon=False)
        process.start()
        self.running[process], self._started[process] = cell, time.time()

    def reap(self) -> Iterator[tuple[Cell, int]]:
        for process in [p for p in self.running if not p.is_alive()]:
            process.join()
            cell = self.running.pop(process)
            code = process.exitcode or 0
            if process in self._hung:
                worker.note(cell.run, "timeout", self._hung.pop(process))
            elif code < 0 and not (self._stopping and -code == signal.SIGTERM):
                worker.note_killed(cell.run, code)
            yield cell, code

    def kill_hung(self, hang_s: float) -> None:
        """Kill what has shown no sign of life for `hang_s` seconds."""
        for process, cell in self.running.items():
            heartbeat = cell.run.heartbeat.stat().st_mtime if cell.run.heartbeat.exists() else 0.0
            silent_s = time.time() - max(heartbeat, self._started[process])
            if silent_s > hang_s and process.is_alive():
                self._hung[process] = f"no sign of life for {silent_s:.0f} s, killed"
                process.kill()

    def stop(self) -> None:
        """Ask every trainer to write a checkpoint and end; one that has hardly started just ends."""
        if not self._stopping:
            self._stopping = True
            for process in self.running:
                process.terminate()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        deadline = time.monotonic() + GRACE_S
        for process in self.running:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def time_left(seconds: float) -> str:
    """Seconds as a phrase in the unit that suits them."""
    if seconds > 2 * 3600:
        return f"about {seconds / 3600:.1f} h left"
    return f"about {seconds / 60:.1f} min left" if seconds > 45 else f"about {seconds:.0f} s left"


class _Progress:
    """Lines, not a bar: they read the same in a terminal, a log and a notebook. Time left is what is left to do over
    the speed so far, with steps of the two stages weighed by what they take."""

    def __init__(self, study: Study, cells: list[Cell], say: Callable[[str], None]) -> None:
        self._study, self._preset, self._cells, self._say, self._count = study, study.preset, cells, say, 0
        self._start, self._last = time.monotonic(), time.monotonic()
        known = {stage: cost for stage in STAGES if (cost := step_cost(study, stage).seconds)}
        self._weights = {stage: known.get(stage) or next(iter(known.values()), 1.0) for stage in STAGES}
        self.count()
        self._at_start = self._done()

    def count(self) -> None:
        """What there is to do: again whenever waiting cells have joined or turned out not to be needed."""
        everything = [*self._cells, *unique_runs(self._study.possible)]
        self._runs, self._steps = len(everything), sum(cell.config.steps for cell in everything)
        self._total = sum(self._weight(cell) for cell in everything)

    def _weight(self, cell: Cell) -> float:
        return self._weights[cell.stage] * work(cell, self._preset)

    def _done(self) -> float:
        return sum(self._weight(cell) * _share_done(cell) for cell in self._cells)

    def _left(self) -> str:
        done = self._done()
        if done == self._at_start:
            return "time left not known yet"
        return time_left((time.monotonic() - self._start) * (self._total - done) / (done - self._at_start))

    def finished(self, cell: Cell) -> None:
        row = cell.run.read_row()
        self._count += 1
        self._say(f"[{self._count}/{self._runs}] {row['status']} {cell.name}: {result_of(row)}; {self._left()}")
        self._last = time.monotonic()

    def heartbeat(self) -> None:
        if time.monotonic() - self._last > HEARTBEAT_S:
            self._last = time.monotonic()
            steps = round(sum(cell.config.steps * _share_done(cell) for cell in self._cells))
            self._say(f"step {steps} of {self._steps} over all runs; {self._left()}")


def _share_done(cell: Cell) -> float:
    return 1.0 if cell.run.finished else last_step(cell) / cell.config.steps


def result_of(row: dict[str, Any]) -> str:
    """What a run gave, in a phrase; why it gave nothing; and what its history shows, if anything."""
    if row["status"] != "ok":
        result = row["reason"]
    elif "bits_per_image" in row:
        fid = (
            f", FID[fashion-cnn] {row['fid[fashion-cnn]']:.3g} at guidance {row['guidance']:g}"
            if "fid[fashion-cnn]" in row
            else ""
        )
        result = f"bits/image {row['bits_per_image']:.0f}{fid}"
    else:
        result = f"perplexity {row['perplexity']:.0f} of {row['codebook_size']}, L1 {row['l1']:.4f}"
    return f"{result}, {row['train_seconds']:.0f} s{diagnoses.phrase(row)}"


def last_step(cell: Cell) -> int:
    """The newest logged step of a run, 0 before the first."""
    history = cell.run.read_history()
    return int(history[-1]["step"]) if history else 0


@contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM means what Ctrl-C means, so that a sweep under a scheduler stops as cleanly as by hand."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
