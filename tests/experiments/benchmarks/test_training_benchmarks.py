"""The benchmarks of training: real trainers on small networks, kept cells, and reports of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.benchmarks import cells, overfit, tokenizer_training, training_cell
from ibq.config import TrainConfig
from ibq.data import load_images
from ibq.ops import index_backprop
from ibq.run_directory import RunDirectory

CELL = {"device": "cpu", "method": "ibq", "K": 16, "compiled": False, "operator": "ours", "batch": 2, "accumulate": 1}
CELL |= {"precision": "fp32", "small": True}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    return tmp_path


@pytest.mark.parametrize("operator", ["ours", "matrix"])
def test_a_cell_trains_by_the_operator_that_it_names(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], index_backprop

    def noting(*tensors: torch.Tensor, backend: str, **options: object) -> object:
        asked.append(backend)
        return real(*tensors, backend=backend, **options)

    monkeypatch.setattr("ibq.quantizers.ibq.index_backprop", noting)
    monkeypatch.setattr(training_cell.measure, "limit_memory", lambda: None)
    monkeypatch.setattr(training_cell, "WARM_UP", 1)
    monkeypatch.setattr(training_cell, "TIMED", 2)
    result = training_cell.measure_training(CELL | {"operator": operator})
    assert result["status"] == "ok"
    assert result["images_per_second"] > 0
    assert result["resolution"] == 32
    assert len(asked) == 3
    assert set(asked) == {"dense" if operator == "matrix" else "auto"}


@pytest.mark.parametrize("method", ["vq", "lfq"])
def test_a_cell_trains_the_method_that_it_names_in_micro_batches(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, real = [], training_cell.train_tokenizer

    def noting(config: TrainConfig, *others: Any, **options: Any) -> Any:
        trained.append(config)
        return real(config, *others, **options)

    monkeypatch.setattr(training_cell, "train_tokenizer", noting)
    monkeypatch.setattr(training_cell.measure, "limit_memory", lambda: None)
    monkeypatch.setattr(training_cell, "WARM_UP", 1)
    monkeypatch.setattr(training_cell, "TIMED", 1)
    result = training_cell.measure_training(CELL | {"method": method, "accumulate": 2})
    assert result["status"] == "ok"
    (config,) = trained
    assert (config.quantizer.method, config.quantizer.codebook_size, config.accumulate) == (method, 16, 2)


def test_the_papers_size_is_the_recipe_itself(tmp_path: Path) -> None:
    config = training_cell.config_of(
        CELL | {"small": False, "K": 262144, "batch": 32, "accumulate": 8, "precision": "bf16"}, tmp_path
    )
    assert (config.data.resolution, config.model.base_channels, config.loss.perceptual) == (256, 128, "lpips-vgg")
    assert (config.quantizer.codebook_size, config.batch_size, config.accumulate, config.precision) == (
        262144,
        32,
        8,
        "bf16",
    )


@pytest.mark.usefixtures("folders")
def test_rows_hold_every_mode_and_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(folder: Path, cell: dict, module: str) -> dict:
        sizes = {"parameters": 5, "resolution": 32}
        return sizes | (
            {"status": "does not fit"}
            if cell["operator"] == "matrix"
            else {"status": "ok", "images_per_second": 3.0, "peak_gib": 1.0}
        )

    monkeypatch.setattr(cells, "cached", measured)
    said: list[str] = []
    rows = tokenizer_training.run("cpu", (16, 32), 2, accumulate=1, small=True, say=said.append)
    assert rows[["K", "compiled", "operator"]].apply(tuple, axis=1).nunique() == len(rows) == len(said) == 8
    table = tokenizer_training.table(rows)
    assert list(table["matrix images/s"]) == ["does not fit"] * 4
    assert list(table["ours images/s"]) == ["3.0"] * 4
    folder = tokenizer_training.write(rows)
    assert {path.name for path in folder.iterdir()} >= {"rows.csv", "table.md", "table.tex", "figure.png", "figure.pdf"}
    assert "does not fit" in (folder / "table.md").read_text()
    assert set(tokenizer_training.known_rows()["machine"]) == set(rows["machine"])
    others = tokenizer_training.run("cpu", (16,), 2, method="vq", accumulate=2, small=True, say=said.append)
    assert list(others["operator"]) == ["ours", "ours"], "there is no matrix to leave out"
    for _ in range(2):
        tokenizer_training.write(others)
    assert len(tokenizer_training.known_rows()) == 8 + 2, "what was measured before stays known"
    assert list(pd.read_csv(folder / "table.csv")["step"]) == ["2 × 1 images, fp32"] * 2, (
        "the table shows the last call alone"
    )


def test_a_cell_that_fails_says_why_and_is_not_kept(tmp_path: Path) -> None:
    result = cells.cached(tmp_path, {"device": "cpu"}, "experiments.benchmarks.training_cell")
    assert result["status"].startswith("failed: KeyError")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("folders")
def test_sixteen_crops_are_trained_measured_at_stops_and_drawn(folders: Path) -> None:
    said: list[str] = []
    rows = overfit.run("cpu", small=True, say=said.append)
    assert list(rows["step"]) == [2, 4, 6]
    assert (rows["psnr_db"] > 0).all()
    assert rows["seconds"].is_monotonic_increasing
    assert said[-1].endswith("wanted: over 30 dB")
    (run,) = (RunDirectory(path) for path in (folders / "runs").rglob("run"))
    config = overfit.config_of(run.path.parent / "crops", small=True)
    splits = [load_images(config.data, split).images_NCHW for split in ("train", "test")]
    assert torch.equal(*splits)
    assert splits[0].shape == (16, 3, 64, 64)
    assert len({crop.numpy().tobytes() for crop in splits[0]}) == 16
    again = overfit.run("cpu", small=True, say=lambda _: None)
    pd.testing.assert_frame_equal(rows, again)
    folder = overfit.write(rows)
    assert {path.name for path in folder.iterdir()} >= {"rows.csv", "table.md", "figure.png", "figure.pdf"}


def test_the_config_of_overfit_has_every_term_but_the_perceptual_one(tmp_path: Path) -> None:
    config = overfit.config_of(tmp_path)
    assert config.loss.pixel == "l1"
    assert config.loss.perceptual == "none"
    assert (config.loss.adversarial.weight, config.loss.adversarial.lecam_weight, config.loss.adversarial.start) == (
        0.1,
        0.05,
        0.0,
    )
    assert {"commitment", "codebook", "double", "sample_entropy", "codebook_entropy"} == set(
        config.quantizer.loss_weights
    )


def test_the_published_run_overfits() -> None:
    rows = pd.read_csv(cells.published_folder(overfit.NAME) / "rows.csv")
    assert not rows["small"].any()
    end = rows.iloc[-1]
    assert end["step"] == overfit.config_of(Path("crops")).steps
    assert end["psnr_db"] > overfit.WANTED_DB
