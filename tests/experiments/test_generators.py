"""Generators in a study: each is trained on the tokens of a tokenizer that is trained first, and what that asks of every command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments import ablations, manage, pace, report, rows, tables, worker
from experiments.ablations import ABLATIONS, Arm, Contrast, Factor, Tuning
from experiments.cli import app
from experiments.effects import verdict
from experiments.figures.theme import finished_cells
from experiments.findings import findings
from experiments.plan import expected_cost, plan_table
from experiments.projections import project_all
from experiments.recipes import PRESETS, generator, get_preset, tokenizer
from experiments.report.configs import differing_fields
from experiments.report.curves import curves
from experiments.study import Cell, Study, unique_runs
from experiments.sweep import Outcome, failure_reason, train_study
from ibq.data import Images, load_images
from ibq.errors import ConfigError
from ibq.generator_config import GeneratorConfig
from ibq.metrics import extractors
from ibq.models.tokenizer import load_tokenizer
from ibq.run_directory import RunDirectory, append_line, write_json, write_tensors

PAIR = ABLATIONS["vq_vs_ibq"]
TIMING = {"train_seconds", "encode_seconds", "peak_memory_gib", "sample_images_per_s"}
runner = CliRunner()


def arm(name: str, of: str, depth: int, **more: object) -> Arm:
    return Arm(name, {**PAIR.arm(of).levels, "depth": str(depth)}, **more)  # type: ignore[arg-type]


TOY = replace(
    PAIR,
    name="toy",
    notebook=None,
    factors=(*PAIR.factors, Factor("depth", ("1", "2"), "of the transformer")),
    arms=(arm("vq", "vq_published", 1), arm("ibq", "ibq_published", 1, focal=True), arm("ibq_deep", "ibq_published", 2)),
    contrasts=(),
    paper_rows=(),
    figures=(),
    tables=("arms",),
    columns=("train_seconds", "parameters"),
    generator=lambda levels, of_preset: {"transformer.depth": int(levels["depth"])},
    core=False,
)


@pytest.fixture(scope="module", autouse=True)
def _toy() -> object:
    """An ablation of three generators, two of which share their tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.ABLATIONS, "toy", TOY)
        yield


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The toy study without a run."""
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    return Study("smoke", ("toy",))


@pytest.fixture(scope="module")
def trained_toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Outcome, list[str]]:
    """The toy study as one sweep trains it, the outcome and what was said."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQ_RUNS", str(tmp_path_factory.mktemp("toy") / "runs"))
        study = Study("smoke", ("toy",))
        return study, train_study(study, device="cpu", say=said.append), said


@pytest.fixture
def copied(trained_toy: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The trained study in a folder that a test may change, and a folder for its report."""
    shutil.copytree(trained_toy[0].cells[0].run.path.parent, tmp_path / "runs")
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    return Study("smoke", ("toy",))


def pretend(cell: Cell, status: str = "ok", **facts: object) -> None:
    """A finished run of a tokenizer."""
    cell.run.path.mkdir(parents=True)
    write_json(cell.run.row, {"run": cell.run.path.name, "status": status, "train_seconds": 0.5, **facts})


def names(cells: list[Cell]) -> list[str]:
    return [f"{cell.arm.name} {cell.seed}" for cell in cells]


# ---------------------------------------------------------------------------------------------------------------- what a study has


def test_tokenizers_come_first_and_generators_wait_for_them(empty: Study) -> None:
    assert names(empty.cells) == ["tokenizer of vq 0", "tokenizer of ibq 0", "tokenizer of ibq_deep 0"]
    assert names(empty.waiting) == ["vq 0", "ibq 0", "ibq_deep 0"]
    assert len(unique_runs(empty.cells)) == 2
    for cell in empty.waiting:
        assert isinstance(cell.config, GeneratorConfig)
        assert cell.tokenizer
        assert cell.config.tokenizer == cell.tokenizer.config
        assert cell.config.data == cell.tokenizer.config.data
        assert (cell.stage, cell.is_arm, cell.tokenizer.stage, cell.tokenizer.is_arm) == ("generator", True, "tokenizer", False)
    assert [cell.config.transformer.depth for cell in empty.waiting if isinstance(cell.config, GeneratorConfig)] == [1, 1, 2]
    waits = f"waits for its tokenizer {empty.cells[1].run.path.name}"
    assert [rows.waits_for(empty, cell) for cell in empty.waiting[1:]] == [waits, waits]
    assert empty.advance() == []

    pretend(empty.cells[1])
    assert names(empty.advance()) == ["ibq 0", "ibq_deep 0"]
    assert names(empty.waiting) == ["vq 0"]
    assert names(empty.cells) == names(Study("smoke", ("toy",)).cells)


def test_a_generator_of_a_seed_is_on_the_tokenizer_of_that_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_generator_fields_are_set_apart_from_the_tokenizers(empty: Study) -> None:
    changed = Study("smoke", ("toy",), overrides={"generator.steps": 9, "generator.optim.lr": 0.01, "steps": 5})
    assert {cell.config.steps for cell in changed.cells} == {5}
    assert {(cell.config.steps, cell.config.optim.lr) for cell in changed.waiting} == {(9, 0.01)}
    assert changed.name == "smoke+generator.optim.lr=0.01+generator.steps=9+steps=5"
    same = Study("smoke", ("toy",), overrides={"generator.steps": 9})
    assert [cell.run.path for cell in same.cells] == [cell.run.path for cell in empty.cells]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_generator(name: str) -> None:
    preset = get_preset(name)
    config = generator(preset, tokenizer(preset, {"method": "ibq"}), {"transformer.depth": 3}, seed=4)
    assert (config.transformer.depth, config.seed) == (3, 4)
    assert config.tokens == ("fresh" if name == "paper" else "cached")
    assert config.classes == (1000 if name == "paper" else 10)
    if name == "paper":
        assert (config.steps, config.batch_size) == (300 * (1_281_167 // 768), 768)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"ablation_names": ("vq_vs_ibq",), "overrides": {"generator.steps": 9}},
            "generator.steps=9 is of a generator, and no arm of vq_vs_ibq has one; leave it out, or study generation, toy",
        ),
        ({"overrides": {"generator.steps": 9}, "grid": {"optim.lr": [1e-3]}}, "no arm of grid has one; leave it out$"),
        ({"overrides": {"generator.seed": 1}}, "generator.seed would give every arm one seed; use --seeds"),
        ({"overrides": {"generator.tokenizer.steps": 1}}, "generator.tokenizer.steps is of a tokenizer, which the study trains"),
        ({"overrides": {"generator.tokenizer_sha256": "0" * 64}}, "generator.tokenizer_sha256 is of a tokenizer"),
        ({"overrides": {"generator.transformer.depth": 4}}, "generator.transformer.depth is what the arms of toy differ in"),
        ({"overrides": {"generator.stepz": 4}}, "generator of vq: there is no field 'stepz'.*'steps'"),
        ({"overrides": {"generator.batch_size": 9, "generator.accumulate": 2}}, "generator of vq: .*batch_size=9 is not a multiple"),
        ({"overrides": {"quantizer.method": "vq"}}, "quantizer.method is what the arms of toy differ in"),
        (
            {"ablation_names": (), "grid": {"generator.steps": [1]}},
            "the grid cannot have the field generator.steps.*use --set generator.steps",
        ),
        (
            {"ablation_names": (), "grid": {"steps": [1]}, "bases": ("toy/ibq",)},
            "base 'toy/ibq' is a generator, and a grid is of tokenizers",
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
    tuned = replace(TOY, arms=TOY.arms[1:2], tuning=Tuning("optim.lr", (0.5, 1.0), 1 / 2))
    monkeypatch.setitem(ablations.ABLATIONS, "toy", tuned)
    study = Study("smoke", ("toy",))
    assert [cell.config.steps for cell in study.cells] == [3, 3]
    assert names(study.waiting) == ["tokenizer of ibq 0", "ibq 0"]
    assert {rows.waits_for(study, cell) for cell in study.waiting} == {"waits for the search of ibq, 0 of 2 runs finished"}
    assert differing_fields(study, tuned)[1]["tokenizer.optim.lr"] == "not chosen yet"
    for cell, loss in zip(study.cells, (0.1, 0.2), strict=True):
        pretend(cell)
        append_line(cell.run.history, {"step": 1, "pixel_mean": loss})
    assert names(study.advance()) == ["tokenizer of ibq 0"]
    assert rows.waits_for(study, study.waiting[0]) == f"waits for its tokenizer {study.cells[-1].run.path.name}"
    assert differing_fields(study, tuned)[1]["tokenizer.optim.lr"] == "0.0005"


# ---------------------------------------------------------------------------------------------------------------- training


def test_one_sweep_trains_tokenizers_and_then_generators_and_never_again(trained_toy: tuple) -> None:
    study, outcome, said = trained_toy
    assert outcome.failed == outcome.unfinished == []
    assert [cell.stage for cell in outcome.finished] == ["tokenizer"] * 2 + ["generator"] * 3 or outcome.finished[2].stage == "tokenizer"
    assert len(outcome.finished) == 5
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


def test_a_generator_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(copied: Study, trained_toy: tuple) -> None:
    cell = next(cell for cell in copied.cells if cell.arm.name == "ibq")
    assert cell.tokenizer
    whole = cell.run.read_row()
    manage.forget(cell.run)
    cell.run.path.mkdir()
    stop = threading.Event()
    code = worker.attempt(cell.run, cell.config.to_json_dict(), copied.preset.runtime, stop, lambda _: stop.set(), cell.tokenizer.run)
    assert code == 0
    assert not cell.run.finished
    assert rows.status_lines(copied)[names(copied.cells).index("ibq 0")]["state"] == "pending"
    outcome = train_study(Study("smoke", ("toy",)), device="cpu", say=lambda _: None)
    assert names(outcome.finished) == ["ibq 0"]
    assert [attempt["event"] for attempt in cell.run.read_attempts()] == ["started", "stopped", "started", "finished"]
    assert {k: v for k, v in cell.run.read_row().items() if k not in TIMING} == {k: v for k, v in whole.items() if k not in TIMING}


@pytest.mark.kills
def test_a_killed_generator_goes_on_from_its_checkpoint_and_its_tokenizer_stays(copied: Study) -> None:
    """Killed as a whole process, in the middle of its steps."""
    changed = {"overrides": {"generator.steps": 300}}
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
    manage.forget(cell.run)
    train_study(study.only([cell]), device="cpu", say=lambda _: None)
    assert {k: v for k, v in cell.run.read_row().items() if k not in TIMING} == {k: v for k, v in killed.items() if k not in TIMING}


def pid_with_a_checkpoint(run: RunDirectory) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run.checkpoint / "meta.json").is_file():
            return int(run.read_attempts()[-1]["pid"])
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


def test_generators_of_a_failed_tokenizer_have_no_result_and_the_others_finish(copied: Study) -> None:
    broken = next(cell for cell in copied.cells if cell.arm.name == "tokenizer of ibq").run
    for cell in copied.cells:
        if cell.arm.name != "tokenizer of vq":
            shutil.rmtree(cell.run.path, ignore_errors=True)
    broken.path.mkdir()
    broken.config.write_text("{")
    study = Study("smoke", ("toy",))
    outcome = train_study(study, device="cpu", say=lambda _: None)
    assert names(outcome.finished) == ["vq 0"]
    assert names(outcome.failed) == ["tokenizer of ibq 0"]
    assert names(outcome.unfinished) == ["ibq 0", "ibq_deep 0"]
    frame = rows.load(study).set_index("arm")
    assert frame.loc["tokenizer of ibq", "status"] == "failed"
    reason = f"its tokenizer {broken.path.name}: {failure_reason(broken)}"
    assert frame.loc["ibq", ["status", "reason"]].tolist() == ["failed", reason]
    assert [(line["state"], line["detail"]) for line in rows.status_lines(study)[-2:]] == [("failed", reason)] * 2
    assert findings(TOY, frame.reset_index())[0].startswith("2 of 3 runs have no result (2 failed)")
    contrast = Contrast("claim", "vq", "ibq", "A claim.", "bits_per_image", 1.0)
    assert verdict(contrast, frame.reset_index()).reason == "no result of ibq seed 0 (failed)"
    broken.config.unlink()
    assert sorted(names(train_study(study, device="cpu", say=lambda _: None).finished)) == ["ibq 0", "ibq_deep 0", "tokenizer of ibq 0"]


def test_a_tokenizer_that_did_not_stay_finite_ends_its_generators(empty: Study) -> None:
    for cell in unique_runs(empty.cells):
        pretend(cell, "nan", reason="step 3: the gradient norm overflowed")
    study = Study("smoke", ("toy",))
    said: list[str] = []
    outcome = train_study(study, device="cpu", say=said.append)
    assert outcome.failed == outcome.unfinished == study.waiting == []
    assert len(outcome.finished) == 3
    frame = rows.load(study)
    reason = f"its tokenizer, run {empty.cells[0].run.path.name}, did not stay finite: step 3: the gradient norm overflowed"
    assert set(frame["status"]) == {"nan"}
    assert frame.set_index("arm").loc["vq", ["reason", "tokenizer.status"]].tolist() == [reason, "nan"]
    assert any(f"nan toy/vq seed 0: {reason}" in line for line in said)
    assert findings(TOY, frame)[0].startswith("3 of 3 runs have no result (3 nan)")
    assert manage.read_config(study.cells[-1].run) == study.cells[-1].config
    assert train_study(Study("smoke", ("toy",)), device="cpu", say=said.append).skipped == 5


def test_a_generator_without_its_tokenizer_is_refused_and_recorded(empty: Study) -> None:
    cell = empty.waiting[0]
    assert cell.tokenizer
    cell.run.path.mkdir(parents=True)
    code = worker.attempt(cell.run, cell.config.to_json_dict(), empty.preset.runtime, threading.Event(), tokenizer=cell.tokenizer.run)
    assert code == worker.UNFIT
    assert cell.run.read_attempts()[-1]["reason"].endswith(
        f"is that of run {cell.tokenizer.run.path.name}, which is not finished; train that one first"
    )


# ---------------------------------------------------------------------------------------------------------------- plan, rows, report


def test_the_plan_counts_both_stages_and_weighs_their_steps(empty: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(empty.preset, seconds_per_step=2.0, generator_seconds_per_step=3.0)
    monkeypatch.setattr(Study, "preset", preset)
    table = plan_table(empty, TOY).set_index("arm")
    assert list(table.index) == ["vq", "ibq", "ibq_deep"]
    assert table.loc["ibq", ["tokenizer", "steps", "seeds", "finished"]].tolist() == ["6 steps, 0 finished", 4, 1, 0]
    deep = pace.work(empty.waiting[2], preset)
    shallow = pace.work(empty.waiting[1], preset)
    assert deep == 4  # the preset's own size
    assert 4 / 16 < shallow < 4 / 4
    cost = expected_cost(empty, slots=1)
    assert cost.startswith(
        "5 runs, 0 finished; 12 steps of tokenizers left at 2.000 s a step (measured on 2 cores of a server CPU, two runs at a time) and "
        "12 of generators (3 runs wait for their tokenizers) at 3.000 s a step of the preset's size, encoding and evaluation included "
    )
    assert cost.endswith(f"1 at a time: about {(12 * 2 + (2 * shallow + deep) * 3) / 60:.1f} minutes")
    monkeypatch.setattr(Study, "preset", replace(preset, generator_seconds_per_step=None))
    assert "how long they take is not known: no step of a generator of preset smoke has been measured" in expected_cost(empty)


def test_a_plan_of_what_is_finished_goes_by_what_it_took(trained_toy: tuple) -> None:
    study = trained_toy[0]
    runs = [cell for cell in study.cells if cell.tokenizer]
    spent = sum(attempts[1]["time"] - attempts[0]["time"] for attempts in (cell.run.read_attempts() for cell in runs))
    cost = pace.step_cost(study, "generator")
    assert cost.basis == "3 finished runs"
    assert cost.seconds == pytest.approx(spent / sum(pace.work(cell, study.preset) for cell in runs))
    assert expected_cost(study).startswith("5 runs, 5 finished; 0 steps of tokenizers left at")


def test_time_spent_is_that_of_all_attempts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for event, at in (("started", 10.0), ("damaged", None), ("stopped", 14.0), ("started", 20.0), ("started", 50.0), ("finished", 51.5)):
        append_line(run.attempts, {"event": event} | ({} if at is None else {"time": at}))
    assert pace.seconds_spent(run) == 5.5


def test_rows_have_the_stage_and_a_generators_the_columns_of_its_tokenizer(trained_toy: tuple) -> None:
    study = trained_toy[0]
    frame = rows.load(study)
    assert list(frame.columns[:8]) == [*rows.FIRST_COLUMNS, "stage"]
    assert len(frame) == 6
    assert frame["tokenizer_of"].notna().sum() == frame["stage"].eq("tokenizer").sum() == 3
    by_arm = frame.set_index("arm")
    for name in ("l1", "psnr_db", "perplexity", "usage", "bits", "run", "status", "protocol.split", "parameters"):
        for of in ("vq", "ibq", "ibq_deep"):
            assert by_arm.loc[of, f"tokenizer.{name}"] == by_arm.loc[f"tokenizer of {of}", name]
    assert not any(column.startswith("tokenizer.config.") for column in frame)
    assert (by_arm.loc[["vq", "ibq"], "config.tokenizer.steps"] == 6).all()
    assert rows.of_arms(frame)["arm"].tolist() == ["vq", "ibq", "ibq_deep"]
    alone = rows.load(study.only([cell for cell in study.cells if cell.tokenizer_of]))
    assert not any(column.startswith("tokenizer.") for column in alone)


def test_status_and_compare_know_both_stages(copied: Study) -> None:
    lines = {line["arm"]: line for line in rows.status_lines(copied)}
    assert lines["toy/ibq seed 0"]["detail"].startswith("bits/image ")
    assert lines["toy/tokenizer of ibq seed 0"]["detail"].startswith("perplexity ")
    output = runner.invoke(app, ["status", "toy", "--preset", "smoke"]).output
    assert output.count(" ok ") == 6
    one, other = (cell.run for cell in copied.cells if cell.arm.name in ("ibq", "ibq_deep"))
    differing = {line[0]: line[1:] for line in manage.compare(one, other)}
    assert differing["transformer.depth"] == (1, 2)
    assert "bits_per_image" in differing or one.read_row()["bits_per_image"] == other.read_row()["bits_per_image"]
    assert not {"tokenizer.quantizer.method", "tokenizer_sha256", "steps"} & set(differing)
    assert one.path.name in runner.invoke(app, ["compare", one.path.name, other.path.name, "--preset", "smoke"]).output


def test_tokenizers_of_generators_are_no_arms_of_tables_and_pages(copied: Study) -> None:
    assert tables.build("arms", TOY, rows.load(copied))["arm"].tolist() == ["vq", "ibq", "ibq_deep"]
    differing, common = differing_fields(copied, TOY)
    assert differing["arm"].tolist() == ["vq", "ibq", "ibq_deep"]
    assert {"transformer.depth", "tokenizer.quantizer.method"} <= set(differing)
    assert common["tokenizer.steps"] == "6"
    assert not {"seed", "tokenizer.seed", "tokenizer_sha256"} & {*differing, *common}
    assert {cell.arm.name for cell in finished_cells(copied, TOY)} == {"vq", "ibq", "ibq_deep"}
    page = (report.write(copied).parent / "toy.html").read_text()
    assert "3 of 3 runs have a result" in page
    assert "tokenizer of" not in page
    assert set(curves(copied, TOY)["run"]) == {cell.run.path.name for cell in copied.cells}


def test_generators_are_not_projected(copied: Study) -> None:
    said: list[str] = []
    shown = replace(TOY, figures=("code_map",), followed=("ibq_deep",))
    project_all([replace(cell, ablation=shown) for cell in copied.cells], "pca", said.append)
    assert said == []


# ---------------------------------------------------------------------------------------------------------------- single runs


def test_a_generator_outlives_its_tokenizer(copied: Study) -> None:
    before = rows.load(copied).set_index("arm")
    tokenizer_run = next(cell for cell in copied.cells if cell.arm.name == "tokenizer of ibq").run
    output = runner.invoke(app, ["forget", tokenizer_run.path.name, "--preset", "smoke"]).output
    assert output == f"forgot {tokenizer_run.path.name}; 2 generators trained on it keep their copy of it: forget them to train them anew\n"
    study = Study("smoke", ("toy",))
    assert study.waiting == []
    after = rows.load(study).set_index("arm")
    assert after.loc["ibq", "status"] == "ok"
    assert after.loc["ibq", "tokenizer.l1"] == before.loc["ibq", "tokenizer.l1"]
    one = next(cell for cell in study.cells if cell.arm.name == "ibq").run
    with pytest.raises(
        ConfigError, match=f"needs its tokenizer, run {tokenizer_run.path.name}, which is not finished; train that one first"
    ):
        manage.rerun(study, one)
    assert names(train_study(study, device="cpu", say=lambda _: None).finished) == ["tokenizer of ibq 0"]


def test_an_unfinished_generator_without_its_tokenizer_is_an_arm_all_the_same(copied: Study) -> None:
    cells = {cell.arm.name: cell for cell in copied.cells}
    cells["ibq"].run.row.unlink()
    manage.forget(cells["tokenizer of ibq"].run)
    with pytest.raises(ConfigError, match=f"needs its tokenizer, run {cells['tokenizer of ibq'].run.path.name}, which is not finished"):
        manage.rerun(Study("smoke", ("toy",)), cells["ibq"].run)


def test_a_tokenizer_trained_again_says_what_generators_keep(copied: Study) -> None:
    runs = {cell.arm.name: cell.run.path for cell in copied.cells}
    for of, said in (
        ("ibq", "2 generators trained on it keep their copy of it: forget them to train them anew\n"),
        ("vq", "1 generator trained on it keeps its copy of it: forget it to train it anew\n"),
    ):
        result = runner.invoke(app, ["rerun", runs[f"tokenizer of {of}"].name, "--preset", "smoke"])
        assert result.exit_code == 0, result.output
        assert result.output.endswith(said)


def test_a_generator_is_trained_again_by_rerun(copied: Study) -> None:
    one = next(cell for cell in copied.cells if cell.arm.name == "ibq").run
    before, after = manage.rerun(copied, manage.find_run(copied, one.path.name), say=lambda _: None, device="cpu")
    assert before
    assert after
    assert {k: v for k, v in before.items() if k not in TIMING} == {k: v for k, v in after.items() if k not in TIMING}


def test_evaluations_are_of_the_tokenizers(copied: Study) -> None:
    said: list[str] = []
    assert manage.evaluate_finished(copied, "train_split", said.append) == 2
    assert said[0] == "train_split is of tokenizers: 3 generators are passed by, whose own metrics came with their training"
    frame = rows.load(copied).set_index("arm")
    assert frame.loc["ibq", "tokenizer.train_split.l1"] == frame.loc["tokenizer of ibq", "train_split.l1"]
    assert manage.evaluate_finished(copied, "train_split", said.append) == 0
    source = next(cell for cell in copied.cells if cell.arm.name == "tokenizer of ibq").run
    row = json.loads(source.row.read_text())
    write_json(source.row, row | {"train_seconds": 1e6})  # as if trained again
    assert rows.load(copied).set_index("arm")["tokenizer.train_split.l1"].notna().sum() == 1


def test_inception_is_also_of_what_generators_sampled(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in network, for which FID means nothing; few images stand for the split."""
    study = copied.only([cell for cell in copied.cells if cell.arm.name in ("ibq", "tokenizer of ibq")])
    split = load_images(study.cells[0].config.data, "test")

    def network(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels_BF = images_BCHW.float().flatten(1) / 255
        return pixels_BF[:, 400:405], pixels_BF[:, 500:510]

    monkeypatch.setattr(manage, "load_images", lambda config, name: Images(split.name, split.split, split.images_NCHW[:120]))
    monkeypatch.setattr(extractors, "inception_extractor", lambda device: extractors.Extractor("stand-in", "", network, "none", device))
    for cell in study.cells:
        if cell.tokenizer:
            samples = load_file(cell.run.generated)
            many = {name: samples[name].repeat(8, 1) for name in samples if name.startswith("tokens@")}
            write_tensors(cell.run.generated, samples | many)
    said: list[str] = []
    assert manage.evaluate_finished(study, "inception", said.append) == 2
    frame = rows.load(study).set_index("arm")
    assert frame.loc["ibq", ["inception.kid@1", "inception.kid@2"]].notna().all()
    assert frame.loc["ibq", "tokenizer.inception.kid"] == frame.loc["tokenizer of ibq", "inception.kid"]
    assert not {"kid", "kid@1"} & set(frame)
