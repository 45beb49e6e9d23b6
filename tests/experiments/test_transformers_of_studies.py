"""Transformers in a study: each is trained on the tokens of a tokenizer that is trained first."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from toy_transformers import TIMING, TOY, names, pretend

from experiments import ablations, rows, status
from experiments.ablations import Contrast
from experiments.ablations.quantizers.tuning import Tuning
from experiments.analysis.findings import findings
from experiments.analysis.verdicts import verdicts
from experiments.cells import unique_runs
from experiments.recipes import PRESETS, get_preset, tokenizer, transformer
from experiments.report.configs import differing_fields
from experiments.runner import runs, worker
from experiments.runner.sweep import train_study
from experiments.study import Study, advance
from ibq.config import TransformerTrainConfig
from ibq.errors import ConfigError
from ibq.models.tokenizer import load_tokenizer
from ibq.run_directory import RunDirectory, append_line

pytestmark = pytest.mark.usefixtures("toy")


# ---------------------------------------------------------------------------------------------------------------- what


def test_tokenizers_come_first_and_transformers_wait_for_them(empty: Study) -> None:
    assert names(empty.cells) == ["tokenizer of vq 0", "tokenizer of ibq 0", "tokenizer of ibq_deep 0"]
    assert names(empty.waiting) == ["vq 0", "ibq 0", "ibq_deep 0"]
    assert len(unique_runs(empty.cells)) == 2
    for cell in empty.waiting:
        assert isinstance(cell.config, TransformerTrainConfig)
        assert cell.tokenizer
        assert cell.config.tokenizer == cell.tokenizer.config
        assert cell.config.data == cell.tokenizer.config.data
        assert (cell.stage, cell.is_arm, cell.tokenizer.stage, cell.tokenizer.is_arm) == (
            "transformer",
            True,
            "tokenizer",
            False,
        )
    assert [cell.config.model.depth for cell in empty.waiting if isinstance(cell.config, TransformerTrainConfig)] == [
        1,
        1,
        2,
    ]
    waits = f"waits for its tokenizer {empty.cells[1].run.path.name}"
    assert [rows.waits_for(empty, cell) for cell in empty.waiting[1:]] == [waits, waits]
    empty, joined = advance(empty)
    assert joined == []

    pretend(empty.cells[1])
    empty, joined = advance(empty)
    assert names(joined) == ["ibq 0", "ibq_deep 0"]
    assert names(empty.waiting) == ["vq 0"]
    assert names(empty.cells) == names(Study("smoke", ("toy",)).cells)


def test_a_transformer_of_a_seed_is_on_the_tokenizer_of_that_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("quick", ("toy",), seeds=2)
    assert [cell.seed for cell in study.cells] == [0, 0, 0, 1, 1, 1]
    for cell in study.waiting:
        assert cell.tokenizer
        assert cell.seed == cell.config.seed == cell.tokenizer.config.seed
    assert len(unique_runs(study.waiting)) == 6


def test_a_tokenizer_that_is_an_arm_of_another_ablation_is_trained_once(empty: Study) -> None:
    both = Study("smoke", ("vq_vs_ibq", "toy"))
    assert len(unique_runs(both.cells)) == len(unique_runs(Study("smoke", ("vq_vs_ibq",)).cells))


def test_transformer_stage_fields_are_set_apart_from_the_tokenizers(empty: Study) -> None:
    changed = Study("smoke", ("toy",), overrides={"transformer.steps": 9, "transformer.optim.lr": 0.01, "steps": 5})
    assert {cell.config.steps for cell in changed.cells} == {5}
    assert {(cell.config.steps, cell.config.optim.lr) for cell in changed.waiting} == {(9, 0.01)}
    assert changed.name == "smoke+steps=5+transformer.optim.lr=0.01+transformer.steps=9"
    same = Study("smoke", ("toy",), overrides={"transformer.steps": 9})
    assert [cell.run.path for cell in same.cells] == [cell.run.path for cell in empty.cells]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_transformer(name: str) -> None:
    preset = get_preset(name)
    config = transformer(preset, tokenizer(preset, {"method": "ibq"}), {"model.depth": 3}, seed=4)
    assert (config.model.depth, config.seed) == (3, 4)
    assert config.tokens == ("fresh" if name == "paper" else "cached")
    assert config.classes == (1000 if name == "paper" else 10)
    if name == "paper":
        assert (config.steps, config.batch_size) == (300 * (1_281_167 // 768), 768)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"ablation_names": ("vq_vs_ibq",), "overrides": {"transformer.steps": 9}},
            "transformer.steps=9 is of a transformer, and no arm of vq_vs_ibq has one; leave it out, or study "
            "generation, toy",
        ),
        (
            {"overrides": {"transformer.steps": 9}, "grid": {"optim.lr": [1e-3]}},
            "no arm of grid has one; leave it out$",
        ),
        ({"overrides": {"transformer.seed": 1}}, "transformer.seed would give every arm one seed; use --seeds"),
        (
            {"overrides": {"transformer.tokenizer.steps": 1}},
            "transformer.tokenizer.steps is of a tokenizer, which the study trains",
        ),
        ({"overrides": {"transformer.tokenizer_sha256": "0" * 64}}, "transformer.tokenizer_sha256 is of a tokenizer"),
        (
            {"overrides": {"transformer.model.depth": 4}},
            "transformer.model.depth is what the arms of toy differ in",
        ),
        ({"overrides": {"transformer.stepz": 4}}, "transformer of vq: there is no field 'stepz'.*'steps'"),
        (
            {"overrides": {"transformer.batch_size": 9, "transformer.accumulate": 2}},
            "transformer of vq: .*batch_size=9 is not a multiple",
        ),
        ({"overrides": {"quantizer.method": "vq"}}, "quantizer.method is what the arms of toy differ in"),
        (
            {"ablation_names": (), "grid": {"transformer.steps": [1]}},
            "the grid cannot have the field transformer.steps.*use --set transformer.steps",
        ),
        (
            {"ablation_names": (), "grid": {"steps": [1]}, "bases": ("toy/ibq",)},
            "base 'toy/ibq' is a transformer, and a grid is of tokenizers",
        ),
    ],
)
def test_refusals_are_one_sentence(arguments: dict, sentence: str) -> None:
    if "grid" in arguments:
        arguments = {"ablation_names": (), **arguments}
    with pytest.raises(ConfigError, match=sentence) as caught:
        _ = Study(**{"preset_name": "smoke", "ablation_names": ("toy",), **arguments}).cells
    assert "\n" not in str(caught.value)


def test_a_search_before_it_is_of_the_tokenizer(empty: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = replace(TOY, arms=TOY.arms[1:2], adaptive=Tuning("optim.lr", (0.5, 1.0), 1 / 2))
    monkeypatch.setitem(ablations.ABLATIONS, "toy", tuned)
    study = Study("smoke", ("toy",))
    assert [cell.config.steps for cell in study.cells] == [3, 3]
    assert names(study.waiting) == ["tokenizer of ibq 0", "ibq 0"]
    assert {rows.waits_for(study, cell) for cell in study.waiting} == {
        "waits for the search of ibq, 0 of 2 runs finished"
    }
    assert differing_fields(study, tuned)[1]["tokenizer.optim.lr"] == "not chosen yet"
    for cell, loss in zip(study.cells, (0.1, 0.2), strict=True):
        pretend(cell)
        append_line(cell.run.history, {"step": 1, "pixel_mean": loss})
    study, joined = advance(study)
    assert names(joined) == ["tokenizer of ibq 0"]
    assert rows.waits_for(study, study.waiting[0]) == f"waits for its tokenizer {study.cells[-1].run.path.name}"
    assert differing_fields(study, tuned)[1]["tokenizer.optim.lr"] == "0.0005"


# ---------------------------------------------------------------------------------------------------------------- train


def test_one_sweep_trains_tokenizers_and_then_transformers_and_never_again(trained_toy: tuple) -> None:
    study, outcome, said = trained_toy
    assert outcome.failed == outcome.unfinished == []
    order = [cell.run.path for cell in outcome.finished]
    assert len(order) == 5
    assert all(
        order.index(cell.tokenizer.run.path) < order.index(cell.run.path) for cell in outcome.finished if cell.tokenizer
    )
    for cell in study.cells:
        assert [attempt["event"] for attempt in cell.run.read_attempts()] == ["started", "finished"]
        if cell.tokenizer:
            assert cell.run.read_row()["tokenizer_sha256"] == load_tokenizer(cell.tokenizer.run.path).digest()
            assert cell.tokenizer.run.read_attempts()[-1]["time"] < cell.run.read_attempts()[0]["time"]
    finished = next(line for line in said if "ok toy/ibq_deep seed 0: " in line)
    assert "bits/image " in finished
    assert "left" in finished
    assert any(line.startswith("[5/5]") for line in said)
    again = train_study(Study.only(study, study.cells, study.waiting), device="cpu", say=lambda _: None)
    assert (again.skipped, again.finished) == (5, [])


def test_a_transformer_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(
    copied: Study, trained_toy: tuple
) -> None:
    cell = next(cell for cell in copied.cells if cell.arm.name == "ibq")
    assert cell.tokenizer
    whole = cell.run.read_row()
    runs.forget(cell.run)
    cell.run.path.mkdir()
    stop = threading.Event()
    ended = worker.attempt(
        cell.run, cell.config, copied.preset.runtime, stop.is_set, lambda _: stop.set(), cell.tokenizer.run
    )
    assert (ended.event, ended.code) == ("stopped", 0)
    assert not cell.run.finished
    assert rows.status_lines(copied)[names(copied.cells).index("ibq 0")]["state"] == "stopped"
    outcome = train_study(Study("smoke", ("toy",)), device="cpu", say=lambda _: None)
    assert names(outcome.finished) == ["ibq 0"]
    assert [attempt["event"] for attempt in cell.run.read_attempts()] == ["started", "stopped", "started", "finished"]
    assert {k: v for k, v in cell.run.read_row().items() if k not in TIMING} == {
        k: v for k, v in whole.items() if k not in TIMING
    }


@pytest.mark.processes
def test_a_killed_transformer_goes_on_from_its_checkpoint_and_its_tokenizer_stays(copied: Study) -> None:
    """Killed as a whole process, in the middle of its steps."""
    changed = {"overrides": {"transformer.steps": 300}}
    study = Study("smoke", ("toy",), **changed)  # type: ignore[arg-type]
    cell = next(cell for cell in study.cells if cell.arm.name == "ibq")
    assert cell.tokenizer
    killer = threading.Thread(target=lambda: os.kill(pid_with_a_checkpoint(cell.run), signal.SIGKILL))
    killer.start()
    outcome = train_study(study.only([cell]), device="cpu", say=lambda _: None)
    killer.join()
    assert names(outcome.failed) == ["ibq 0"]
    assert [attempt["event"] for attempt in cell.run.read_attempts()] == ["started", "killed"]
    tokenizer_row = cell.tokenizer.run.row.stat().st_mtime_ns
    assert names(train_study(study.only([cell]), device="cpu", say=lambda _: None).finished) == ["ibq 0"]
    assert cell.tokenizer.run.row.stat().st_mtime_ns == tokenizer_row
    steps = [line["step"] for line in cell.run.read_history()]
    assert steps == list(range(2, 301, 2))
    killed = cell.run.read_row()
    runs.forget(cell.run)
    train_study(study.only([cell]), device="cpu", say=lambda _: None)
    assert {k: v for k, v in cell.run.read_row().items() if k not in TIMING} == {
        k: v for k, v in killed.items() if k not in TIMING
    }


def pid_with_a_checkpoint(run: RunDirectory) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run.checkpoint / "meta.json").is_file():
            return int(run.read_attempts()[-1]["pid"])
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


def test_transformer_stages_of_a_failed_tokenizer_have_no_result_and_the_others_finish(copied: Study) -> None:
    broken = next(cell for cell in copied.cells if cell.arm.name == "tokenizer of ibq").run
    for cell in copied.cells:
        if cell.arm.name != "tokenizer of vq":
            shutil.rmtree(cell.run.path, ignore_errors=True)
    broken.path.mkdir()
    broken.config.write_text("{")
    study = Study("smoke", ("toy",))
    outcome = train_study(study, device="cpu", say=lambda _: None)
    study, _ = advance(study)
    assert names(outcome.finished) == ["vq 0"]
    assert names(outcome.failed) == ["tokenizer of ibq 0"]
    assert names(outcome.unfinished) == ["ibq 0", "ibq_deep 0"]
    frame = rows.load(study).set_index("arm")
    assert frame.loc["tokenizer of ibq", "status"] == "failed"
    reason = f"its tokenizer {broken.path.name}: {status.of(broken).reason}"
    assert frame.loc["ibq", ["status", "reason"]].tolist() == ["failed", reason]
    assert [(line["state"], line["detail"]) for line in rows.status_lines(study)[-2:]] == [("failed", reason)] * 2
    assert findings(TOY, frame.reset_index())[0].startswith("2 of 3 runs have no result (2 failed)")
    contrast = Contrast("claim", "vq", "ibq", "A claim.", "bits_per_image", 1.0)
    (judged,) = verdicts(replace(TOY, contrasts=(contrast,)), frame.reset_index())
    assert judged.reason == "no result of ibq seed 0 (failed)"
    broken.config.unlink()
    assert sorted(names(train_study(study, device="cpu", say=lambda _: None).finished)) == [
        "ibq 0",
        "ibq_deep 0",
        "tokenizer of ibq 0",
    ]


def test_a_tokenizer_that_did_not_stay_finite_ends_its_transformers(empty: Study) -> None:
    for cell in unique_runs(empty.cells):
        pretend(cell, "nan", reason="step 3: the gradient norm overflowed")
    study = Study("smoke", ("toy",))
    said: list[str] = []
    outcome = train_study(study, device="cpu", say=said.append)
    study, _ = advance(study)
    assert outcome.failed == outcome.unfinished == study.waiting == []
    assert len(outcome.finished) == 3
    frame = rows.load(study)
    reason = (
        f"its tokenizer, run {empty.cells[0].run.path.name}, did not stay finite: step 3: the gradient norm overflowed"
    )
    assert set(frame["status"]) == {"nan"}
    assert frame.set_index("arm").loc["vq", ["reason", "tokenizer.status"]].tolist() == [reason, "nan"]
    assert any(f"nan toy/vq seed 0: {reason}" in line for line in said)
    assert findings(TOY, frame)[0].startswith("3 of 3 runs have no result (3 nan)")
    assert study.cells[-1].run.read_config() == study.cells[-1].config
    assert train_study(Study("smoke", ("toy",)), device="cpu", say=said.append).skipped == 5


def test_a_transformer_without_its_tokenizer_is_refused_and_recorded(empty: Study) -> None:
    cell = empty.waiting[0]
    assert cell.tokenizer
    cell.run.path.mkdir(parents=True)
    ended = worker.attempt(
        cell.run, cell.config, empty.preset.runtime, threading.Event().is_set, tokenizer=cell.tokenizer.run
    )
    assert ended.code == worker.UNFIT
    assert cell.run.read_attempts()[-1]["reason"].endswith(
        f"is that of run {cell.tokenizer.run.path.name}, which is not finished; train that one first"
    )
