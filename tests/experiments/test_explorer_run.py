"""Runs that are handled by hand: real trainers in real processes, stopped, killed and gone on with."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from filelock import FileLock
from safetensors.torch import load_file
from training_runs import assert_same_run, read_the_images_once  # noqa: F401

from experiments import manage, rows
from experiments.explorer.live_umap import read_live_umap
from experiments.explorer.run import ExplorerRun, Workers, explore_folder, load_run, new_run
from experiments.explorer.trainer import LIVE, runtime_of
from experiments.recipes import get_preset, tokenizer
from experiments.study import ROOT, Study
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.interventions import scheduled
from ibq.run_directory import RunDirectory, append_line
from ibq.train_tokenizer import train_tokenizer

LONG = 100_000
"""Steps that no test waits for."""
PATIENCE_S = 240.0


def config_of(steps: int, method: str = "ibq", **dotted: Any) -> TrainConfig:
    return tokenizer(get_preset("smoke"), {"method": method}).with_fields(steps=steps, **dotted)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def workers(folders: Path) -> Iterator[Workers]:
    workers = Workers(device="cpu")
    workers.warm()
    until(lambda: workers.is_warm, "warm workers")
    yield workers
    workers.close(PATIENCE_S)


@pytest.fixture
def make(workers: Workers) -> Iterator[Callable[..., ExplorerRun]]:
    """Makes a new run; what still trains at the end of the test is removed."""
    made: list[ExplorerRun] = []

    def run(steps: int = LONG, method: str = "ibq", **dotted: Any) -> ExplorerRun:
        made.append(new_run(config_of(steps, method, **dotted), workers))
        return made[-1]

    yield run
    for each in made:
        workers.remove(each.directory)
        assert each.wait(PATIENCE_S)


def training(run: ExplorerRun, step: int = 1) -> ExplorerRun:
    """The run once it has come so far."""
    run.train()
    until(lambda: run.step >= step and run.state == "training", f"step {step}")
    return run


def trainer_of(run: ExplorerRun) -> int:
    return int([attempt for attempt in run.directory.read_attempts() if attempt["event"] == "started"][-1]["pid"])


# --- The way of a run --------------------------------------------------------------------------------------------------------------------


def test_a_run_from_new_to_finished(make: Callable[..., ExplorerRun]) -> None:
    run = make(steps=40)
    assert (run.state, run.step, run.steps) == ("new", 0, 40)
    run.train()
    assert run.state in ("starting", "training")
    until(lambda: run.state == "training", "the first point")
    live = load_file(run.directory.path / LIVE)
    K = run.config.quantizer.codebook_size
    assert live["step"] >= 1
    assert live["counts"].shape == (K,)
    assert live["codes"].shape == (K, run.config.quantizer.code_dim)
    assert live["images_BCHW"].shape == live["reconstructions_BCHW"].shape == (8, 1, 32, 32)
    assert run.wait(PATIENCE_S)
    assert (run.state, run.step, run.reason) == ("finished", 40, "")
    assert run.directory.read_row()["status"] == "ok"
    assert load_file(run.directory.path / LIVE)["step"] == 40
    assert [line["step"] for line in run.directory.read_history()] == [*range(1, 41)]
    with pytest.raises(ConfigError, match="has its row and cannot be trained further; reset it, or make a new run"):
        run.train()


def test_the_tokens_of_the_live_file_are_those_since_the_one_before(make: Callable[..., ExplorerRun]) -> None:
    run = make(steps=3)
    run.train()
    assert run.wait(PATIENCE_S)
    tokens = int(load_file(run.directory.path / LIVE)["counts"].sum()) / (run.config.batch_size * run.config.tokens_per_image)
    assert tokens in (1, 2, 3)  # whole steps: all of them where the machine is fast, the last alone where each had a file of its own


def test_pause_holds_it_between_two_steps(make: Callable[..., ExplorerRun]) -> None:
    run = training(make())
    run.pause()
    assert run.state == "paused"
    time.sleep(0.3)  # the step that was under way
    step = run.step
    time.sleep(0.3)
    assert (run.step, run.state) == (step, "paused")
    run.resume()
    until(lambda: run.step > step, "a step after the pause")
    assert run.state == "training"
    run.pause()
    run.stop()
    assert run.wait(PATIENCE_S)
    assert run.state == "stopped"


def test_a_run_that_is_changed_paused_and_stopped_equals_one_that_is_not(make: Callable[..., ExplorerRun], tmp_path: Path) -> None:
    run = make(steps=60)
    training(run)
    run.intervene({"optim.lr": 3e-4, "quantizer.double": False})
    run.pause()
    run.intervene({"quantizer.entropy_weight": 0.2}, restart_dead=True)
    assert run.amended_config.quantizer.entropy_weight == 0.2  # on its way
    run.resume()
    until(lambda: len(run.interventions) == 2, "both changes")
    run.stop()
    assert run.wait(PATIENCE_S)
    assert run.state == "stopped"
    assert run.reason == ""
    run.resume()
    assert run.wait(PATIENCE_S)
    assert run.state == "finished"
    assert run.amended_config.quantizer.entropy_weight == 0.2
    assert run.directory.read_row()["interventions"] == 2
    quiet = RunDirectory(tmp_path)
    list(train_tokenizer(run.config, quiet.path, runtime_of(run.config, "cpu"), intervene=scheduled(run.interventions)))
    assert_same_run(run.directory, quiet)


def test_what_is_asked_before_a_stop_is_done_and_a_train_after_it_goes_on(make: Callable[..., ExplorerRun]) -> None:
    run = training(make())
    run.pause()
    run.intervene({"optim.lr": 1e-4})
    run.stop()
    with pytest.raises(ConfigError, match="is stopping, and only a run that trains or is paused can be changed"):
        run.intervene({"optim.lr": 1e-5})
    run.train()  # before it has ended
    until(lambda: len(run.directory.read_attempts()) == 3, "the next attempt")
    until(lambda: run.state == "training", "its first point")
    assert [attempt["event"] for attempt in run.directory.read_attempts()] == ["started", "stopped", "started"]
    assert [each.fields for each in run.interventions] == [{"optim.lr": 1e-4}]
    run.stop()
    run.train()
    run.stop()  # after all
    assert run.wait(PATIENCE_S)
    time.sleep(0.2)
    assert run.state == "stopped"
    assert len(run.directory.read_attempts()) == 4


def test_a_killed_trainer_is_a_failure_with_a_sentence_and_goes_on_from_its_checkpoint(
    make: Callable[..., ExplorerRun], tmp_path: Path
) -> None:
    run = make(steps=60)
    training(run, 5)
    run.stop()
    assert run.wait(PATIENCE_S)
    stopped_at = run.step
    run.train()
    until(lambda: run.step > stopped_at + 3, "steps after the checkpoint")
    run.pause()
    os.kill(trainer_of(run), signal.SIGKILL)
    assert run.wait(PATIENCE_S)
    assert run.state == "failed"
    assert run.reason == "killed by SIGKILL (by hand, or by the system for lack of memory)"
    run.train()
    assert run.wait(PATIENCE_S)
    assert (run.state, run.reason) == ("finished", "")
    list(train_tokenizer(run.config, tmp_path, runtime_of(run.config, "cpu")))
    assert_same_run(run.directory, RunDirectory(tmp_path))


def test_reset_removes_a_run_that_trains_and_one_that_does_not(make: Callable[..., ExplorerRun]) -> None:
    run = training(make())
    pid = trainer_of(run)
    run.reset()
    assert run.state == "new"
    assert run.wait(PATIENCE_S)
    assert not run.directory.path.exists()
    assert not psutil.pid_exists(pid)
    run.train()
    until(lambda: run.step >= 1, "a first step anew")
    run.stop()
    assert run.wait(PATIENCE_S)
    run.reset()
    assert (run.state, run.step) == ("new", 0)
    assert not run.directory.path.exists()
    run.reset()  # there is nothing left to remove
    run.train()
    run.reset()
    run.train()  # at once
    until(lambda: run.step >= 1, "a first step anew")


def test_no_method_waits(make: Callable[..., ExplorerRun]) -> None:
    run = make()
    said: list[Callable[[], object]] = [
        run.train,
        lambda: run.state,
        run.pause,
        run.resume,
        lambda: run.step,
        run.stop,
        run.train,
        run.reset,
    ]
    for method in said:
        started = time.perf_counter()
        method()
        assert time.perf_counter() - started < 0.3


def test_four_runs_side_by_side(make: Callable[..., ExplorerRun]) -> None:
    runs = [make(method=method) for method in ("ibq", "vq", "simvq", "gumbel")]
    for run in runs:
        run.train()
    until(lambda: all(run.state == "training" for run in runs), "a point of each")
    runs[0].stop()
    assert runs[0].wait(PATIENCE_S)
    assert [run.state for run in runs] == ["stopped", "training", "training", "training"]
    assert len({run.name for run in runs}) == 4


@pytest.mark.kills
def test_umap_of_a_run_that_trains(make: Callable[..., ExplorerRun]) -> None:
    run = training(make())
    assert read_live_umap(run.directory) is None
    run.project_umap()
    until(lambda: read_live_umap(run.directory) is not None, "the projection")
    projected = read_live_umap(run.directory)
    assert projected is not None
    assert projected.codes.shape == (run.config.quantizer.codebook_size, 2)
    assert len(projected.features) == len(load_file(run.directory.path / LIVE)["features"])
    assert projected.step >= 1
    assert run.state == "training"


# --- What goes wrong ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "sentence"),
    [
        ({"batch_size": 60_001}, "batch_size=60001 exceeds the 60000 training images of fashion-mnist; lower it"),
        ({"data.name": "imagefolder:/nowhere"}, "/nowhere"),
        ({"quantizer.codebook_size": 2**38, "quantizer.code_dim": 256}, "out of memory: "),
        ({"optim.lr": 1e30}, "NaN or infinite"),
    ],
)
def test_what_cannot_be_trained_fails_with_one_sentence(make: Callable[..., ExplorerRun], dotted: dict[str, Any], sentence: str) -> None:
    run = make(steps=20, method="vq", **dotted)
    run.train()
    assert run.wait(PATIENCE_S)
    assert run.state == "failed"
    assert sentence in run.reason
    assert "\n" not in run.reason
    assert "Traceback" not in run.reason


@pytest.mark.parametrize(
    ("method", "fields", "restart_dead", "sentence"),
    [
        ("ibq", {"steps": 7.0}, False, "'steps' cannot change while this run trains"),
        ("ibq", {"optim.lr": -1.0}, False, "optim.lr: Input should be greater than 0"),
        ("ibq", {"optim.lr": None}, False, "optim.lr.*valid number"),
        ("ibq", {"optim.lr": ""}, False, "optim.lr: Input should be a valid number"),
        ("simvq", {}, True, "method='simvq' has no codes that can be placed one by one; restart none"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_and_harms_nothing(
    make: Callable[..., ExplorerRun], method: str, fields: dict[str, Any], restart_dead: bool, sentence: str
) -> None:
    run = training(make(method=method))
    with pytest.raises(ConfigError, match=sentence):
        run.intervene(fields, restart_dead)
    step = run.step
    until(lambda: run.step > step, "more steps")
    assert run.interventions == []
    run.stop()
    assert run.wait(PATIENCE_S)
    with pytest.raises(ConfigError, match=f"run {run.name} is stopped, and only a run that trains or is paused can be changed"):
        run.intervene({"optim.lr": 1e-4})


def test_a_run_is_trained_once_however_often_it_is_loaded(make: Callable[..., ExplorerRun], workers: Workers) -> None:
    run = training(make())
    again = load_run(run.name, workers)
    again.train()
    assert again.state == "training"
    assert [attempt["event"] for attempt in run.directory.read_attempts()] == ["started"]
    again.pause()
    assert run.state == "paused"
    of_another_kernel = load_run(run.name, Workers(device="cpu"))
    assert of_another_kernel.state == "training"
    with pytest.raises(ConfigError, match=f"run {run.name} is being trained by another process; stop it there first"):
        of_another_kernel.train()
    for order in (of_another_kernel.pause, of_another_kernel.stop):
        with pytest.raises(ConfigError, match=f"run {run.name} is being trained by another process"):
            order()
    with pytest.raises(ConfigError, match="is being trained; stop it first"):
        of_another_kernel.reset()


def test_a_lock_taken_in_between_trains_nothing(make: Callable[..., ExplorerRun]) -> None:
    run = make()
    lock = FileLock(run.directory.lock)
    run.train()
    with lock:
        assert run.wait(PATIENCE_S) or run.state == "training"
    assert len([attempt for attempt in run.directory.read_attempts() if attempt["event"] == "started"]) <= 1


# --- Beside the study --------------------------------------------------------------------------------------------------------------------


def test_the_study_does_not_see_the_explorers_runs(own_folders: None, workers: Workers) -> None:
    run = new_run(config_of(2), workers)
    run.train()
    assert run.wait(PATIENCE_S)
    study = Study("smoke", ("vq_vs_ibq",))
    assert run.directory.path.parent.parent == study.runs_folder
    assert set(rows.load(study)["status"]) == {"pending"}
    for name in ("explore", run.name, "0001"):
        with pytest.raises(ConfigError, match="there are no runs"):
            manage.find_run(study, name)
    assert manage.generators_on(run.directory) == []


def test_a_run_of_the_study_is_only_shown(own_folders: None, workers: Workers) -> None:
    config = config_of(2)
    study_run = RunDirectory(Study("smoke").runs_folder / config.run_id("0" * 64))
    list(train_tokenizer(config, study_run.path, runtime_of(config, "cpu")))
    run = load_run(study_run.path.name[:8], workers)
    assert (run.state, run.step, run.name, run.config) == ("loaded", 2, study_run.path.name, config)
    for method in (run.train, run.pause, run.stop, run.reset, lambda: run.intervene({"optim.lr": 1e-4})):
        with pytest.raises(ConfigError, match="is the study's and is only shown"):
            method()
    run.project_umap()
    until(lambda: read_live_umap(run.directory) is not None, "the projection of a snapshot")
    with pytest.raises(ConfigError, match=r"run 'nothing' cannot be chosen: no run has that id"):
        load_run("nothing", workers)
    explored = [new_run(config, workers) for _ in range(2)]
    assert [each.name for each in explored] == ["0001-ibq-K32-D8", "0002-ibq-K32-D8"]
    assert load_run("0002", workers).state == "new"
    with pytest.raises(ConfigError, match="run '000' cannot be chosen: 2 runs of the explorer begin with it; give more of its id"):
        load_run("000", workers)


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    assert explore_folder() == tmp_path / "explore"
    monkeypatch.delenv("IBQ_RUNS")
    assert explore_folder() == ROOT / "runs" / "explore"


def test_the_log_cadence_hangs_on_the_steps_alone() -> None:
    assert [runtime_of(config_of(steps)).log_every for steps in (1, 199, 200, 300, 10_000)] == [1, 1, 2, 3, 5]


# --- Processes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.kills
def test_ten_starts_and_stops_leak_nothing(folders: Path) -> None:
    me = psutil.Process()
    workers = Workers(device="cpu")

    def cycle() -> None:
        run = new_run(config_of(LONG, batch_size=2), workers)
        run.train()
        until(lambda: run.state == "training", "the first point")
        run.stop()
        assert run.wait(PATIENCE_S)
        assert run.state == "stopped"

    def held(process: psutil.Process) -> tuple[int, int, int]:
        gc.collect()
        return len(process.children(recursive=True)), process.num_fds(), process.num_threads()

    before_all = held(me)
    cycle()
    until(lambda: workers.is_warm, "warm workers")
    assert workers._server is not None
    server = psutil.Process(workers._server.pid)
    before, memory = [held(process) for process in (me, server)], [process.memory_info().rss for process in (me, server)]
    for _ in range(10):
        cycle()
    grown = [(process.memory_info().rss - then) / 2**20 for process, then in zip((me, server), memory, strict=True)]
    after = [held(process) for process in (me, server)]
    print(f"ten cycles: children, descriptors, threads of kernel and server {before} -> {after}, MiB more {grown}")
    for now, then in zip(after, before, strict=True):
        assert all(n <= t for n, t in zip(now, then, strict=True))
    assert max(grown) < 10
    workers.close(PATIENCE_S)
    assert held(me) == before_all
    cycle()  # once more, from nothing
    workers.close(PATIENCE_S)
    assert held(me) == before_all


KERNEL = """
import sys, time
from experiments.explorer.run import WORKERS, new_run
from experiments.recipes import get_preset, tokenizer

config = tokenizer(get_preset("smoke"), {"method": "vq"}).with_fields(steps=100_000)
runs = [new_run(config) for _ in range(2)]
for run in runs:
    run.train()
while not all(run.step for run in runs):
    time.sleep(0.01)
print("training", flush=True)
time.sleep(1000)
"""


def processes_with(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("IBQ_EXPLORER_TOKEN") == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.kills),
        pytest.param(signal.SIGTERM, marks=pytest.mark.kills),
        pytest.param("server killed", marks=pytest.mark.kills),
    ],
)
def test_a_parent_that_is_gone_leaves_no_process_and_runs_that_go_on(tmp_path: Path, workers: Workers, how: Any) -> None:
    environment = os.environ | {"IBQ_RUNS": str(tmp_path), "IBQ_EXPLORER_TOKEN": str(tmp_path), "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", KERNEL], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "training\n"
    mine = processes_with(str(tmp_path))
    assert len(mine) == 4  # parent, server, two trainers
    if how == "server killed":
        server = next(process for process in mine if process.ppid() == parent.pid)
        server.kill()
        until(lambda: len(processes_with(str(tmp_path))) == 1, "the end of the trainers")
        parent.kill()
    else:
        parent.send_signal(how)
    parent.wait(PATIENCE_S)
    parent.stdout.close()
    until(lambda: not processes_with(str(tmp_path)), "the end of every process")
    runs = [RunDirectory(path) for path in sorted((tmp_path / "explore").iterdir())]
    assert [run.read_attempts()[-1]["event"] for run in runs] == ["stopped", "stopped"]


def test_damaged_files_and_a_full_disk_are_said_in_one_sentence(
    own_folders: None, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(config_of(2), workers)
    append_line(run.directory.attempts, {"event": "started"})
    assert run.state == "failed"
    assert run.reason == "its trainer ended without a word; train it again, it goes on from its last checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        assert run.reason.startswith(f"the disk under {explore_folder()} is full; make space and train the run again")
    run.directory.interventions.write_text('{"step": -1}\n')
    with pytest.raises(ConfigError, match=r"interventions.jsonl cannot be read \(step: Input should be greater"):
        run.train()
    run.directory.row.write_text("{")
    assert run.state == "failed"
    assert "row.json is not JSON" in run.reason


def test_a_server_that_cannot_start_says_why(make: Callable[..., ExplorerRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    run = make()
    run.workers = Workers(device="cpu")
    run.train()
    assert run.wait(PATIENCE_S)
    run.workers.close(PATIENCE_S)
    assert run.state == "failed"
    assert run.reason == "the process that starts trainers has ended: it said nothing; train the run again"
