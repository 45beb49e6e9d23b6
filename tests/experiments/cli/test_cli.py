from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from typer.testing import CliRunner

import ibq.evaluation.tokenizer
from experiments import rows
from experiments.cli import app
from experiments.report import figures
from experiments.runner import runs
from experiments.runner.sweep import train_study
from experiments.study import Study
from ibq.config import DataConfig
from ibq.data import Images, load_images
from ibq.evaluation.tokenizer import PERCEPTUAL
from ibq.pretrained import extractors
from ibq.run_directory import RunDirectory

runner = CliRunner()


@pytest.mark.parametrize("command", ["list", "plan --preset smoke", "status --preset smoke", "report --preset smoke"])
@pytest.mark.usefixtures("trained")
def test_commands_work(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda *_: None)  # drawn in test_report
    result = runner.invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "vq_vs_ibq" in result.output or "report:" in result.output


@pytest.mark.usefixtures("trained")
def test_plan_counts_what_is_left() -> None:
    assert "8 runs, 8 finished; 0 steps left" in runner.invoke(app, ["plan", "vq_vs_ibq", "--preset", "smoke"]).output
    assert (
        "8 runs, 0 finished; 40 steps left"
        in runner.invoke(app, ["plan", "vq_vs_ibq", "--preset", "smoke", "--set", "steps=5"]).output
    )


@pytest.mark.usefixtures("trained")
def test_status_tells_every_arm() -> None:
    output = runner.invoke(app, ["status", "--preset", "smoke"]).output
    assert output.count(" ok ") == len(Study("smoke").cells)


@pytest.mark.usefixtures("trained")
def test_evaluate_adds_columns_to_old_rows_without_training() -> None:
    study = Study("smoke")
    before = [cell.run.row.stat().st_mtime_ns for cell in study.cells]
    assert runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", "train_split"]).exit_code == 0
    assert "0 runs evaluated" in runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", "train_split"]).output
    frame = rows.load(study)
    assert (frame["train_split.protocol.split"] == "train").all()
    assert (frame["train_split.l1"] > 0).all()
    assert [cell.run.row.stat().st_mtime_ns for cell in study.cells] == before


@pytest.mark.usefixtures("trained")
def test_evaluate_without_a_networks_weights_is_one_sentence_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for metric, file in (
        ("inception", "weights-inception-2015-12-05-6726825d.pth"),
        ("lpips-alex", "alexnet-owt-7be5be79.pth"),
        ("lpips-vgg", "vgg16-397923af.pth"),
    ):
        monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path / "mine"))
        result = runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", metric])
        assert result.exit_code == 2
        *_, sentence = result.stderr.splitlines()
        assert sentence.startswith("error: the weights of ")
        assert (
            f"{file} is not in {tmp_path / 'mine'} or {tmp_path / 'hub' / 'checkpoints'}, and its download failed (no "
            f"network)" in sentence
        )
    result = runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", "fashion-cnn"])
    assert (result.exit_code, result.stderr) == (
        2,
        "error: fashion-cnn is absent: 16 images are too few, 100 are needed; evaluate more images\n",
    )
    assert not any(
        name in str(path) for cell in Study("smoke").cells for path in cell.run.path.rglob("*") for name in PERCEPTUAL
    )


@pytest.mark.usefixtures("trained")
def test_rows_that_have_a_metric_from_training_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read_row = RunDirectory.read_row
    monkeypatch.setattr(RunDirectory, "read_row", lambda run: read_row(run) | {"kid[fashion-cnn]": 0.1})
    assert "0 runs evaluated" in runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", "fashion-cnn"]).output


@pytest.mark.usefixtures("trained")
def test_what_is_measured_on_the_rows_own_images_becomes_columns_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in torchvision.models.alexnet().state_dict().items()
            if name.startswith("features.")
        }
    weights = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    monkeypatch.setattr(ibq.evaluation.tokenizer, "backbone_weights", lambda _: weights)
    study = Study("smoke")
    try:
        result = runner.invoke(app, ["evaluate", "--preset", "smoke", "--metric", "lpips-alex"])
        assert result.exit_code == 0, result.output
        assert "lpips-alex vq_vs_ibq/vq_fair seed 0: lpips[alex] " in result.output
        frame = rows.load(study)
        assert (frame["lpips[alex]"] > 0).all()
        assert frame["protocol.lpips[alex]"].str.contains("16 pairs").all()
        assert not any(column.startswith("lpips-alex.") for column in frame)
        assert (frame["protocol.n_images"] == 16).all()
    finally:
        for cell in study.cells:
            runs.evaluation_file(cell, "lpips-alex").unlink(missing_ok=True)


@pytest.mark.usefixtures("trained")
def test_a_run_that_a_metric_does_not_fit_keeps_no_other_from_being_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if one row were of enough images."""
    study, read_row = Study("smoke", ("vq_vs_ibq",)), RunDirectory.read_row
    enough = study.cells[1]
    monkeypatch.setattr(
        RunDirectory,
        "read_row",
        lambda run: read_row(run) | ({"protocol.n_images": 120} if run.path == enough.run.path else {}),
    )
    try:
        result = runner.invoke(app, ["evaluate", "vq_vs_ibq", "--preset", "smoke", "--metric", "fashion-cnn"])
        assert result.exit_code == 0, result.output
        assert "1 runs evaluated" in result.output
        assert f"fashion-cnn {enough.name}: fid[fashion-cnn] " in result.output
        too_few = "16 images are too few, 100 are needed; evaluate more images"
        assert result.output.count(too_few) == len(study.cells) - 1
        assert [cell.name for cell in study.cells if runs.evaluation_file(cell, "fashion-cnn").is_file()] == [
            enough.name
        ]
    finally:
        runs.evaluation_file(enough, "fashion-cnn").unlink(missing_ok=True)


@pytest.mark.usefixtures("trained")
def test_inception_is_measured_on_the_whole_test_split_and_its_columns_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with more features than there are images, for which FID means nothing; 150 images stand for the
    split."""
    study, loads = Study("smoke", ("vq_vs_ibq",)), []
    split = load_images(study.cells[0].config.data, "test")

    def few(config: DataConfig, name: str) -> Images:
        loads.append(name)
        return Images(split.name, split.split, split.images_NCHW[:150])

    def network(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels_BF = images_BCHW.float().flatten(1) / 255
        return pixels_BF[:, 400:600], pixels_BF[:, 500:510]

    monkeypatch.setenv("IBQ_CACHE", str(tmp_path))
    monkeypatch.setattr(runs, "load_images", few)
    monkeypatch.setitem(
        extractors.EXTRACTORS,
        "inception",
        lambda device: extractors.Extractor("stand-in", "", network, "none", device),
    )
    try:
        result = runner.invoke(app, ["evaluate", "vq_vs_ibq", "--preset", "smoke", "--metric", "inception"])
        assert result.exit_code == 0, result.output
        assert "inception vq_vs_ibq/vq_fair seed 0: kid " in result.output
        assert "fid absent: 150 images are too few for a covariance of 200 features, 201 are needed" in result.output
        assert loads == ["test"]
        frame = rows.load(study)
        assert (frame["inception.protocol.n_images"] == 150).all()
        assert frame["inception.kid"].notna().all()
        assert not {"kid", "fid", "is", "precision", "recall"} & set(frame)
        assert (frame["protocol.n_images"] == 16).all()
    finally:
        for cell in study.cells:
            runs.evaluation_file(cell, "inception").unlink(missing_ok=True)


def test_compare_names_what_differs_and_nothing_else(trained: tuple) -> None:
    study: Study = trained[0]
    of = {cell.arm.name: cell.run for cell in study.cells if cell.ablation.name == "vq_vs_ibq"}
    one, other = of["vq_fair"], of["vq_features"]  # differ in the entropy penalty alone
    names = [line[0] for line in runs.compare(one, other)]
    assert "quantizer.entropy_weight" in names
    assert not {"quantizer.method", "quantizer.codebook_init", "steps", "parameters"} & set(names)
    output = runner.invoke(app, ["compare", one.path.name, other.path.name]).output
    assert one.path.name in output


def test_rerun_gives_the_same_row_and_forget_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("smoke")
    study = study.only(study.cells[:1])
    train_study(study, device="cpu", say=lambda _: None)
    name = study.cells[0].run.path.name
    result = runner.invoke(app, ["rerun", name[:12]])
    assert result.exit_code == 0, result.output
    changed = result.output.strip().rpartition(": ")[2]
    assert set(changed.split(", ")) <= {"none", "train_seconds", "peak_memory_gib"}
    assert runner.invoke(app, ["forget", name]).exit_code == 0
    assert list(tmp_path.iterdir()) == []
