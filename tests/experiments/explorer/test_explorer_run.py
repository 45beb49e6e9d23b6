"""Runs that are handled by hand: real trainers in real processes, stopped, killed and gone on with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from explorer_runs import PATIENCE_S, config_of, trainer_of, training, until
from filelock import FileLock
from safetensors.torch import load_file
from training_runs import assert_same_run, read_the_images_once  # noqa: F401

from experiments import rows
from experiments.explorer.run import ExplorerRun, Workers, explore_folder, load_run, new_run
from experiments.explorer.trainer import LIVE, runtime_of
from experiments.runner import runs
from experiments.study import ROOT, Study
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory, append_line
from ibq.training.interventions import scheduled
from ibq.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.processes

# --- The way of a run -------------------------------------------------------------------------------------------------


def test_a_run_from_new_to_finished(make_run: Callable[..., ExplorerRun]) -> None:
    run = make_run(steps=40)
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


def test_the_tokens_of_the_live_file_are_those_since_the_one_before(make_run: Callable[..., ExplorerRun]) -> None:
    run = make_run(steps=3)
    run.train()
    assert run.wait(PATIENCE_S)
    tokens = int(load_file(run.directory.path / LIVE)["counts"].sum()) / (
        run.config.batch_size * run.config.tokens_per_image
    )
    assert tokens in (
        1,
        2,
        3,
    )  # whole steps: all of them where the machine is fast, the last alone where each had a file of its own


def test_pause_holds_it_between_two_steps(make_run: Callable[..., ExplorerRun]) -> None:
    run = training(make_run())
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


def test_a_run_that_is_changed_paused_and_stopped_equals_one_that_is_not(
    make_run: Callable[..., ExplorerRun], tmp_path: Path
) -> None:
    run = make_run(steps=60)
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


def test_what_is_asked_before_a_stop_is_done_and_a_train_after_it_goes_on(make_run: Callable[..., ExplorerRun]) -> None:
    run = training(make_run())
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
    make_run: Callable[..., ExplorerRun], tmp_path: Path
) -> None:
    run = make_run(steps=60)
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


def test_reset_removes_a_run_that_trains_and_one_that_does_not(make_run: Callable[..., ExplorerRun]) -> None:
    run = training(make_run())
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


def test_no_method_waits(make_run: Callable[..., ExplorerRun]) -> None:
    run = make_run()
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
        assert time.perf_counter() - started < 1  # milliseconds, where nothing else runs


def test_four_runs_side_by_side(make_run: Callable[..., ExplorerRun]) -> None:
    runs = [make_run(method=method) for method in ("ibq", "vq", "simvq", "gumbel")]
    for run in runs:
        run.train()
    until(lambda: all(run.state == "training" for run in runs), "a point of each")
    runs[0].stop()
    assert runs[0].wait(PATIENCE_S)
    assert [run.state for run in runs] == ["stopped", "training", "training", "training"]
    assert len({run.name for run in runs}) == 4


# --- What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "sentence"),
    [
        ({"batch_size": 60_001}, "batch_size=60001 exceeds the 60000 training images of fashion-mnist; lower it"),
        ({"data.name": "imagefolder:/nowhere"}, "/nowhere"),
        ({"quantizer.codebook_size": 2**38, "quantizer.code_dim": 256}, "out of memory: "),
        ({"optim.lr": 1e30}, "NaN or infinite"),
    ],
)
def test_what_cannot_be_trained_fails_with_one_sentence(
    make_run: Callable[..., ExplorerRun], dotted: dict[str, Any], sentence: str
) -> None:
    run = make_run(steps=20, method="vq", **dotted)
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
    make_run: Callable[..., ExplorerRun], method: str, fields: dict[str, Any], restart_dead: bool, sentence: str
) -> None:
    run = training(make_run(method=method))
    with pytest.raises(ConfigError, match=sentence):
        run.intervene(fields, restart_dead)
    step = run.step
    until(lambda: run.step > step, "more steps")
    assert run.interventions == []
    run.stop()
    assert run.wait(PATIENCE_S)
    with pytest.raises(
        ConfigError, match=f"run {run.name} is stopped, and only a run that trains or is paused can be changed"
    ):
        run.intervene({"optim.lr": 1e-4})


def test_a_run_is_trained_once_however_often_it_is_loaded(
    make_run: Callable[..., ExplorerRun], workers: Workers
) -> None:
    run = training(make_run())
    again = load_run(run.name, workers)
    again.train()
    assert again.state == "training"
    assert [attempt["event"] for attempt in run.directory.read_attempts()] == ["started"]
    again.pause()
    assert run.state == "paused"
    of_another_kernel = load_run(run.name, Workers(device="cpu"))
    assert of_another_kernel.state == "paused"
    of_another_kernel.resume()  # any kernel may steer a run, through its control.jsonl
    assert of_another_kernel.state == run.state == "training"
    of_another_kernel.intervene({"optim.lr": 1e-4})
    until(lambda: [each.fields for each in run.interventions] == [{"optim.lr": 1e-4}], "the change")
    with pytest.raises(ConfigError, match="is being trained; stop it first"):
        of_another_kernel.reset()
    of_another_kernel.stop()
    assert of_another_kernel.state == "stopping"
    assert run.wait(PATIENCE_S)
    assert of_another_kernel.state == run.state == "stopped"
    assert [attempt["event"] for attempt in run.directory.read_attempts()] == ["started", "stopped"]


def test_a_lock_taken_in_between_trains_nothing(make_run: Callable[..., ExplorerRun]) -> None:
    run = make_run()
    lock = FileLock(run.directory.lock)
    run.train()
    with lock:
        assert run.wait(PATIENCE_S) or run.state == "training"
    assert len([attempt for attempt in run.directory.read_attempts() if attempt["event"] == "started"]) <= 1


# --- Beside the study -------------------------------------------------------------------------------------------------


def test_the_study_does_not_see_the_explorers_runs(own_folders: None, workers: Workers) -> None:
    run = new_run(config_of(2), workers)
    run.train()
    assert run.wait(PATIENCE_S)
    study = Study("smoke", ("vq_vs_ibq",))
    assert run.directory.path.parent.parent == study.runs_folder
    assert set(rows.load(study)["status"]) == {"pending"}
    for name in ("explore", run.name, "0001"):
        with pytest.raises(ConfigError, match="there are no runs"):
            runs.find_run(name)
    assert runs.transformers_on(run.directory) == []


def test_a_run_of_the_study_is_only_shown(own_folders: None, workers: Workers) -> None:
    config = config_of(2)
    study_run = RunDirectory(Study("smoke").runs_folder / config.run_id("0" * 64))
    list(train_tokenizer(config, study_run.path, runtime_of(config, "cpu")))
    run = load_run(study_run.path.name[:8], workers)
    assert (run.state, run.step, run.name, run.config) == ("loaded", 2, study_run.path.name, config)
    for method in (run.train, run.pause, run.stop, run.reset, lambda: run.intervene({"optim.lr": 1e-4})):
        with pytest.raises(ConfigError, match="is the study's and is only shown"):
            method()
    with pytest.raises(ConfigError, match=r"run 'nothing' cannot be chosen: no run has that id"):
        load_run("nothing", workers)
    explored = [new_run(config, workers) for _ in range(2)]
    assert [each.name for each in explored] == ["0001-ibq-K32-D8", "0002-ibq-K32-D8"]
    assert load_run("0002", workers).state == "new"
    with pytest.raises(
        ConfigError, match="run '000' cannot be chosen: 2 runs of the explorer begin with it; give more of its id"
    ):
        load_run("000", workers)


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    assert explore_folder() == tmp_path / "explore"
    monkeypatch.delenv("IBQ_RUNS")
    assert explore_folder() == ROOT / "runs" / "explore"


def test_the_log_cadence_hangs_on_the_steps_alone() -> None:
    assert [runtime_of(config_of(steps)).log_every for steps in (1, 199, 200, 300, 10_000)] == [1, 1, 2, 3, 5]


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
