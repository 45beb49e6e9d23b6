"""Transformers in a study: what plan, rows, report, and the commands on single runs make of them and their
tokenizers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_transformers import TIMING, TOY, names
from typer.testing import CliRunner

from experiments import rows
from experiments.analysis.projections import project_all
from experiments.cli import app
from experiments.report import pages, tables
from experiments.report.configs import differing_fields
from experiments.report.curves import curves
from experiments.report.figures.theme import finished_cells
from experiments.runner import runs, throughput
from experiments.runner.plan import expected_cost, plan_table
from experiments.runner.sweep import train_study
from experiments.study import Study
from ibq.data import Images, load_images
from ibq.errors import ConfigError
from ibq.pretrained import extractors
from ibq.run_directory import RunDirectory, append_line, write_json, write_tensors

pytestmark = pytest.mark.usefixtures("toy")
runner = CliRunner()


# ---------------------------------------------------------------------------------------------------------------- plan,


def test_the_plan_counts_both_stages_and_weighs_their_steps(empty: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(empty.preset, seconds_per_step=2.0, transformer_seconds_per_step=3.0)
    monkeypatch.setattr(Study, "preset", preset)
    table = plan_table(empty, TOY).set_index("arm")
    assert list(table.index) == ["vq", "ibq", "ibq_deep"]
    assert table.loc["ibq", ["tokenizer", "steps", "seeds", "finished"]].tolist() == ["6 steps, 0 finished", 4, 1, 0]
    deep = throughput.work(empty.waiting[2], preset)
    shallow = throughput.work(empty.waiting[1], preset)
    assert deep == 4  # the preset's own size
    assert 4 / 16 < shallow < 4 / 4
    cost = expected_cost(empty, slots=1)
    assert cost.startswith(
        "5 runs, 0 finished; 12 steps of tokenizers left at 2.000 s a step (measured on 2 cores of a server CPU, two "
        "runs at a time) and "
        "12 of transformers (3 runs wait for their tokenizers) at 3.000 s a step of the preset's size, encoding and "
        "evaluation included "
    )
    assert cost.endswith(f"1 at a time: about {(12 * 2 + (2 * shallow + deep) * 3) / 60:.1f} minutes")
    monkeypatch.setattr(Study, "preset", replace(preset, transformer_seconds_per_step=None))
    assert (
        "how long they take is not known: no step of a transformer of preset smoke has been measured"
        in expected_cost(empty)
    )


def test_a_plan_of_what_is_finished_goes_by_what_it_took(trained_toy: tuple) -> None:
    study = trained_toy[0]
    runs = [cell for cell in study.cells if cell.tokenizer]
    spent = sum(attempts[1]["time"] - attempts[0]["time"] for attempts in (cell.run.read_attempts() for cell in runs))
    cost = throughput.step_cost(study, "transformer")
    assert cost.basis == "3 finished runs"
    assert cost.seconds == pytest.approx(spent / sum(throughput.work(cell, study.preset) for cell in runs))
    assert expected_cost(study).startswith("5 runs, 5 finished; 0 steps of tokenizers left at")


def test_time_spent_is_that_of_all_attempts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for event, at in (
        ("started", 10.0),
        ("damaged", None),
        ("stopped", 14.0),
        ("started", 20.0),
        ("started", 50.0),
        ("finished", 51.5),
    ):
        append_line(run.attempts, {"event": event} | ({} if at is None else {"time": at}))
    assert throughput.seconds_spent(run) == 5.5


def test_rows_have_the_stage_and_a_transformers_the_columns_of_its_tokenizer(trained_toy: tuple) -> None:
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
    differing = {line[0]: line[1:] for line in runs.compare(one, other)}
    assert differing["model.depth"] == (1, 2)
    assert "bits_per_image" in differing or one.read_row()["bits_per_image"] == other.read_row()["bits_per_image"]
    assert not {"tokenizer.quantizer.method", "tokenizer_sha256", "steps"} & set(differing)
    assert one.path.name in runner.invoke(app, ["compare", one.path.name, other.path.name]).output


def test_tokenizers_of_transformers_are_no_arms_of_tables_and_pages(copied: Study) -> None:
    assert tables.build("arms", TOY, rows.load(copied))["arm"].tolist() == ["vq", "ibq", "ibq_deep"]
    differing, common = differing_fields(copied, TOY)
    assert differing["arm"].tolist() == ["vq", "ibq", "ibq_deep"]
    assert {"model.depth", "tokenizer.quantizer.method"} <= set(differing)
    assert common["tokenizer.steps"] == "6"
    assert not {"seed", "tokenizer.seed", "tokenizer_sha256"} & {*differing, *common}
    assert {cell.arm.name for cell in finished_cells(copied, TOY)} == {"vq", "ibq", "ibq_deep"}
    page = (pages.write(copied).parent / "toy.html").read_text()
    assert "3 of 3 runs have a result" in page
    assert "tokenizer of" not in page
    assert set(curves(copied, TOY)["run"]) == {cell.run.path.name for cell in copied.cells}


def test_transformer_stages_are_not_projected(copied: Study) -> None:
    said: list[str] = []
    arms = tuple(replace(arm, followed=arm.name == "ibq_deep") for arm in TOY.arms)
    shown = replace(TOY, arms=arms, figures=("code_map",))
    by_name = {arm.name: arm for arm in arms}
    cells = [replace(cell, ablation=shown, arm=by_name.get(cell.arm.name, cell.arm)) for cell in copied.cells]
    project_all(cells, "pca", said.append)
    assert said == []


# ---------------------------------------------------------------------------------------------------------------- singl


def test_a_transformer_outlives_its_tokenizer(copied: Study) -> None:
    before = rows.load(copied).set_index("arm")
    tokenizer_run = next(cell for cell in copied.cells if cell.arm.name == "tokenizer of ibq").run
    output = runner.invoke(app, ["forget", tokenizer_run.path.name]).output
    assert (
        output
        == f"forgot {tokenizer_run.path.name}; 2 transformers trained on it keep their copy of it: forget them to "
        f"train them anew\n"
    )
    study = Study("smoke", ("toy",))
    assert study.waiting == []
    after = rows.load(study).set_index("arm")
    assert after.loc["ibq", "status"] == "ok"
    assert after.loc["ibq", "tokenizer.l1"] == before.loc["ibq", "tokenizer.l1"]
    one = next(cell for cell in study.cells if cell.arm.name == "ibq").run
    with pytest.raises(
        ConfigError,
        match=f"needs its tokenizer, run {tokenizer_run.path.name}, which is not finished; train that one first",
    ):
        runs.rerun(one)
    assert names(train_study(study, device="cpu", say=lambda _: None).finished) == ["tokenizer of ibq 0"]


def test_an_unfinished_transformer_without_its_tokenizer_is_an_arm_all_the_same(copied: Study) -> None:
    cells = {cell.arm.name: cell for cell in copied.cells}
    cells["ibq"].run.row.unlink()
    runs.forget(cells["tokenizer of ibq"].run)
    with pytest.raises(
        ConfigError, match=f"needs its tokenizer, run {cells['tokenizer of ibq'].run.path.name}, which is not finished"
    ):
        runs.rerun(cells["ibq"].run)


def test_a_tokenizer_trained_again_says_what_transformers_keep(copied: Study) -> None:
    runs = {cell.arm.name: cell.run.path for cell in copied.cells}
    for of, said in (
        ("ibq", "2 transformers trained on it keep their copy of it: forget them to train them anew\n"),
        ("vq", "1 transformer trained on it keeps its copy of it: forget it to train it anew\n"),
    ):
        result = runner.invoke(app, ["rerun", runs[f"tokenizer of {of}"].name])
        assert result.exit_code == 0, result.output
        assert result.output.endswith(said)


def test_a_transformer_is_trained_again_by_rerun(copied: Study) -> None:
    one = next(cell for cell in copied.cells if cell.arm.name == "ibq").run
    before, after = runs.rerun(runs.find_run(one.path.name), "cpu", lambda _: None)
    assert before
    assert after
    assert {k: v for k, v in before.items() if k not in TIMING} == {k: v for k, v in after.items() if k not in TIMING}


def test_evaluations_are_of_the_tokenizers(copied: Study) -> None:
    said: list[str] = []
    assert runs.evaluate_finished(copied, "train_split", said.append) == 2
    assert (
        said[0]
        == "train_split is of tokenizers: 3 transformers are passed by, whose own metrics came with their training"
    )
    frame = rows.load(copied).set_index("arm")
    assert frame.loc["ibq", "tokenizer.train_split.l1"] == frame.loc["tokenizer of ibq", "train_split.l1"]
    assert runs.evaluate_finished(copied, "train_split", said.append) == 0
    source = next(cell for cell in copied.cells if cell.arm.name == "tokenizer of ibq").run
    row = json.loads(source.row.read_text())
    write_json(source.row, row | {"train_seconds": 1e6})  # as if trained again
    assert rows.load(copied).set_index("arm")["tokenizer.train_split.l1"].notna().sum() == 1


def test_inception_is_also_of_what_transformers_sampled(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in network, for which FID means nothing; few images stand for the split."""
    study = copied.only([cell for cell in copied.cells if cell.arm.name in ("ibq", "tokenizer of ibq")])
    split = load_images(study.cells[0].config.data, "test")

    def network(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels_BF = images_BCHW.float().flatten(1) / 255
        return pixels_BF[:, 400:405], pixels_BF[:, 500:510]

    monkeypatch.setattr(
        runs, "load_images", lambda config, name: Images(split.name, split.split, split.images_NCHW[:120])
    )
    monkeypatch.setitem(
        extractors.EXTRACTORS,
        "inception",
        lambda device: extractors.Extractor("stand-in", "", network, "none", device),
    )
    for cell in study.cells:
        if cell.tokenizer:
            samples = load_file(cell.run.generated)
            many = {name: samples[name].repeat(8, 1) for name in samples if name.startswith("tokens@")}
            write_tensors(cell.run.generated, samples | many)
    said: list[str] = []
    assert runs.evaluate_finished(study, "inception", said.append) == 2
    frame = rows.load(study).set_index("arm")
    assert frame.loc["ibq", ["inception.kid@1", "inception.kid@2"]].notna().all()
    assert frame.loc["ibq", "tokenizer.inception.kid"] == frame.loc["tokenizer of ibq", "inception.kid"]
    assert not {"kid", "kid@1"} & set(frame)
