"""The benchmark of sampling: real samplers of a tiny transformer, kept cells, and a report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from experiments.benchmarks import cells, sampling, sampling_cell
from experiments.cli import app
from ibq.errors import ConfigError

CELL = {"device": "cpu", "size": "XXS", "tokens": 9, "batch": 2, "K": 32, "guidance": 2.0, "precision": "fp32"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    return tmp_path


def test_modes_are_measured_kept_and_reported(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    rows = sampling.run("cpu", batch=2, small=True, say=said.append)
    assert list(rows["status"]) == ["ok", "ok"]
    assert list(rows["guidance"]) == [1.0, 2.0]
    assert list(rows["equal_samples"]) == [2, 2]
    assert (rows[["uncached_images_per_second", "cached_images_per_second", "floor_images_per_second"]] > 0).all(
        axis=None
    )
    assert said[1].startswith("2/2  XXS, guidance 2: uncached ")
    monkeypatch.setattr(cells.subprocess, "run", lambda *_, **__: pytest.fail("a finished cell was measured again"))
    pd.testing.assert_frame_equal(sampling.run("cpu", batch=2, small=True, say=said.append), rows)
    result = CliRunner().invoke(app, ["bench", "sampling", "--device", "cpu", "--batch", "2", "--small"])
    assert result.exit_code == 0
    report = folders / "reports" / "benchmarks" / "sampling"
    assert {path.name for path in report.iterdir()} >= {"rows.csv", "table.md", "table.tex", "figure.png", "figure.pdf"}
    assert "2 of 2" in (report / "table.md").read_text()
    with pytest.raises(ConfigError, match=r"^a batch of 0 cannot be measured; batch must be at least 1$"):
        sampling.run("cpu", batch=0, small=True)


def test_a_cell_that_failed_says_so_and_a_compiled_one_is_shown() -> None:
    ok = CELL | {
        "status": "ok",
        "uncached_images_per_second": 2.0,
        "cached_images_per_second": 20.0,
        "compiled_images_per_second": 40.0,
    }
    ok |= {"floor_images_per_second": 80.0, "equal_samples": 1}
    shown = sampling.table(rows := pd.DataFrame([ok, CELL | {"status": "failed: no memory"}]))
    assert shown.iloc[0].to_dict() == {
        "size": "XXS",
        "batch": "2 × 9 tokens, fp32",
        "guidance": "2",
        "uncached images/s": "2",
        "cached images/s": "20",
        "compiled images/s": "40",
        "cache gains": "10.0 ×",
        "of floor": "50%",
        "equal": "1 of 2",
    }
    assert list(shown.iloc[1])[3:] == ["", "", "", "failed: no memory", "", ""]
    assert len(sampling.figure(rows).axes[0].patches) == 6


def test_the_floor_counts_what_every_step_must_read() -> None:
    transformer = sampling_cell.random_transformer(CELL)
    W, F, K, positions = 128, 512, 32, sum(range(1, 10))
    weights = 2 * (4 * W * W + 3 * W * F + 2 * W) + W + K * W
    cache = 2 * 2 * W * 4  # keys and values of two blocks, for four sequences
    assert sampling_cell.bytes_of_a_batch(transformer, 4) == 4 * (9 * weights + positions * cache)
    assert sampling_cell.copy_rate(torch.device("cpu"), 2**20) > 0
