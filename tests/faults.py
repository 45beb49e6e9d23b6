"""kill -9 at random moments of trainer, sweep driver, papermill and its kernel, in turn, on a small study. `make
faults` runs 100 rounds.

After every round: rows that were there are there and unchanged, no run was trained to its end twice, and no process is
left over. In the end the study is finished quietly and must equal, bit for bit, one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from experiments.ablations import ABLATIONS
from ibq.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("trainer", "driver", "papermill", "kernel")
TIMING = {"train_seconds", "peak_memory_gib", "seconds", "images_per_s", "data_wait_pct", "commit"}
STOP_WITHIN_S = 120.0
"""A trainer is gone at once and papermill soon after its kernel; so long only because a loaded machine may have other
things to do. That hides nothing where runs would go on for longer, as those of one test in test_faults.py do, for
hours."""
STEPS = 60


@dataclass
class Bench:
    """One study in a folder of its own. Every process it starts carries a token in its environment, by which strays are
    found."""

    folder: Path
    steps: int
    ablation: str = "vq_vs_ibq"
    rounds: Counter[str] = field(default_factory=Counter)
    trouble: list[str] = field(default_factory=list)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        (self.folder / "runs").mkdir(parents=True)
        self.environment = os.environ | {
            "IBQ_RUNS": str(self.folder / "runs"),
            "IBQ_REPORTS": str(self.folder / "reports"),
            "IBQ_FAULTS_TOKEN": self.token,
        }

    def sweep(self) -> subprocess.Popen[bytes]:
        return self._start(
            "-m", "experiments", "run", self.ablation, "--preset", "smoke", "--set", f"steps={self.steps}"
        )

    def papermill(self) -> subprocess.Popen[bytes]:
        notebook, out = ROOT / "notebooks" / f"{ABLATIONS[self.ablation].notebook}.ipynb", self.folder / "out.ipynb"
        parameters = f"{{preset: smoke, overrides: {{steps: {self.steps}}}}}"
        return self._start("-m", "papermill", str(notebook), str(out), "-y", parameters, "--no-progress-bar")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    def runs(self) -> list[RunDirectory]:
        return [
            RunDirectory(path)
            for path in sorted((self.folder / "runs").glob("*/"))
            if (path / "attempts.jsonl").is_file()
        ]

    def rows(self) -> dict[str, bytes]:
        return {run.path.name: run.row.read_bytes() for run in self.runs() if run.finished}

    def processes(self) -> dict[int, str]:
        """Live processes of this bench by pid, with their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.token.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return {pid: command for pid, command in found.items() if command}

    def victim(self, target: str, parent: subprocess.Popen[bytes]) -> int | None:
        if target in ("driver", "papermill"):
            return parent.pid
        alive = self.processes()
        if target == "kernel":
            return next((pid for pid, command in alive.items() if "ipykernel" in command), None)
        started = [run.read_attempts()[-1] for run in self.runs() if run.read_attempts()]
        return next((a["pid"] for a in started if a["event"] == "started" and a["pid"] in alive), None)

    def round(self, target: str, moment_s: float, early: bool) -> None:
        """Start, wait, kill, see that everything else goes away by itself, and check what is left.

        The moment counts from the start of the first trainer or, in early rounds, from the start of everything.
        """
        before = self.rows()
        parent = self.papermill() if target in ("papermill", "kernel") else self.sweep()
        while not early and parent.poll() is None and self.victim("trainer", parent) is None:
            time.sleep(0.05)
        deadline = time.monotonic() + moment_s
        while time.monotonic() < deadline and parent.poll() is None:
            time.sleep(0.05)
        pid = self.victim(target, parent)
        while pid is None and parent.poll() is None:  # this process is not there yet
            time.sleep(0.05)
            pid = self.victim(target, parent)
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL)
                self.rounds[target] += 1
            except ProcessLookupError:
                self.rounds["ended first"] += 1
        else:
            self.rounds["ended first"] += 1
        if parent.poll() is None and target == "trainer":  # the driver lives on; ask it to stop
            parent.send_signal(signal.SIGTERM)
        self._wait_for_quiet(target, parent)
        self._check(target, before)

    def _wait_for_quiet(self, target: str, parent: subprocess.Popen[bytes]) -> None:
        """Everything must be gone within the time that stopping may take."""
        started = time.monotonic()
        while time.monotonic() - started < STOP_WITHIN_S:
            parent.poll()
            if not self.processes():
                return
            time.sleep(0.1)
        for pid, command in self.processes().items():
            self.trouble.append(f"stray after killing {target}: {pid} {command[:120]}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.wait()

    def _check(self, target: str, before: dict[str, bytes]) -> None:
        after = self.rows()
        self.trouble += [f"row lost after killing {target}: {name}" for name in before if name not in after]
        self.trouble += [
            f"row changed after killing {target}: {name}"
            for name in before
            if after.get(name, before[name]) != before[name]
        ]
        for run in self.runs():
            finished = sum(attempt["event"] == "finished" for attempt in run.read_attempts())
            if finished > 1:
                self.trouble.append(f"trained twice: {run.path.name}")

    def finish(self) -> None:
        """Let the study end undisturbed."""
        code = self.sweep().wait()
        if code:
            self.trouble.append(f"the undisturbed sweep ended with code {code}; see {self.folder / 'log.txt'}")


def results_of(runs: list[RunDirectory]) -> dict[str, object]:
    """Everything that must not depend on what happened on the way: rows and histories without times, weights."""
    found: dict[str, object] = {}
    for run in runs:
        row = {name: value for name, value in run.read_row().items() if name not in TIMING}
        history = [{name: value for name, value in line.items() if name not in TIMING} for line in run.read_history()]
        found[run.path.name] = (json.dumps(row, sort_keys=True), json.dumps(history), run.model.read_bytes())
    return found


def quiet_results(folder: Path, steps: int) -> dict[str, object]:
    """Results of an undisturbed study."""
    quiet = Bench(folder / "quiet", steps)
    quiet.finish()
    assert not quiet.trouble, quiet.trouble
    return results_of(quiet.runs())


def faults(
    rounds: int, seed: int, folder: Path, expected: dict[str, object], steps: int, ablation: str = "vq_vs_ibq"
) -> tuple[Counter[str], list[str]]:
    """Run the rounds, a fresh study whenever one is complete; returns how often each process was killed, and all that
    went wrong."""
    chance, counts, studies = random.Random(seed), Counter[str](), 0
    trouble: list[str] = []
    bench = Bench(folder / "study-0", steps, ablation)
    for i in range(rounds):
        target = TARGETS[i % len(TARGETS)]
        bench.round(target, chance.uniform(0.0, 5.0), early=chance.random() < 0.2)
        progress = f"{len(bench.rows())} of {len(expected)} rows; trouble so far: {len(trouble + bench.trouble)}"
        print(f"round {i + 1} of {rounds}: killed {target}; {progress}", flush=True)
        if len(bench.rows()) == len(expected) or i == rounds - 1:
            bench.finish()
            found = results_of(bench.runs())
            bench.trouble += [
                f"differs from the quiet run: {name}" for name, value in found.items() if value != expected.get(name)
            ]
            bench.trouble += [f"missing in the end: {name}" for name in expected if name not in found]
            counts += bench.rounds
            trouble += bench.trouble
            studies += 1
            bench = Bench(folder / f"study-{studies}", steps, ablation)
    counts["studies compared"] = studies
    return counts, trouble


def full_disk(folder: Path, expected: dict[str, object], steps: int) -> list[str]:
    """Run the study on a file system that fills up: one sentence, then, with space, every result as on a quiet
    machine."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        print(
            "full disk: mounts are not allowed here; tests/experiments/runner/test_disk_full.py makes the writes fail "
            "instead"
        )
        return []
    try:
        bench, ballast = Bench(folder / "study", steps), folder / "ballast"
        ballast.write_bytes(b"0" * (15 * 2**20))
        code = bench.sweep().wait()
        said = (bench.folder / "log.txt").read_text()
        trouble = (
            [] if code and said.count("is full; make space") == 1 else [f"full disk: code {code}, said {said[-500:]!r}"]
        )
        ballast.unlink()
        bench.finish()
        found = results_of(bench.runs())
        return (
            trouble
            + bench.trouble
            + [f"differs after a full disk: {name}" for name in expected if found.get(name) != expected[name]]
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ibq-faults-") as folder:
        expected = quiet_results(Path(folder), STEPS)
        counts, trouble = faults(arguments.rounds, arguments.seed, Path(folder), expected, STEPS)
        trouble += full_disk(Path(folder) / "full disk", expected, STEPS)
    print(f"killed: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    for kind in (
        "row lost",
        "row changed",
        "trained twice",
        "stray",
        "differs",
        "missing",
        "full disk",
        "the undisturbed",
    ):
        print(f"{kind}: {sum(line.startswith(kind) for line in trouble)}")
    print("\n".join(trouble))
    sys.exit(bool(trouble))


if __name__ == "__main__":
    main()
