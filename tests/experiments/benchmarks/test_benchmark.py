"""The benchmark measures what it says, keeps what it measured, and reports what does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.benchmarks import cells, measure
from experiments.benchmarks import index_backprop as benchmark
from ibq.errors import ConfigError
from ibq.ops import index_backprop

TINY = {"device_name": "cpu", "tokens": (8,), "codes": (16,), "dim": 4}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    return tmp_path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQ_RUNS", str(tmp_path_factory.mktemp("runs")))
        measured = benchmark.run(**TINY, say=lambda _: None)
        patch.setattr(cells.subprocess, "run", lambda *_, **__: pytest.fail("a finished cell was measured again"))
        again = benchmark.run(**TINY, say=lambda _: None)
    pd.testing.assert_frame_equal(measured, again)
    return measured


def test_every_rival_is_measured_once_with_and_without_entropy(rows: pd.DataFrame) -> None:
    assert rows[["method", "entropy"]].apply(tuple, axis=1).tolist() == [
        (method, entropy) for entropy in (True, False) for method in ("released", "dense", "chunked")
    ]
    assert (rows["status"] == "ok").all()
    assert (rows["seconds"] > 0).all()
    assert rows["tflops"].iloc[0] == pytest.approx(16 * 8 * 16 * 4 / rows["seconds"].iloc[0] / 1e12)


@pytest.mark.parametrize("N", [23, 512])
def test_the_released_formulation_computes_what_the_operator_computes(N: int) -> None:
    z_ND, codebook_KD = (torch.randn(rows, 5, dtype=torch.float64).requires_grad_() for rows in (N, 11))
    weight_ND = torch.randn_like(z_ND)
    results = []
    for method in (measure.released, lambda *tensors: measure.operator("chunked", torch.float64, *tensors)):
        z_q_ND, penalty = method(z_ND, codebook_KD, 0.1)
        loss = (weight_ND * z_q_ND).sum() + 0.05 * penalty
        results.append([z_q_ND, penalty, *torch.autograd.grad(loss, (z_ND, codebook_KD))])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)
    assert torch.equal(z_q_ND.detach() / 2, codebook_KD[index_backprop(z_ND, codebook_KD)[1]])


@pytest.mark.usefixtures("folders")
def test_what_does_not_fit_is_said_in_table_and_figure(rows: pd.DataFrame) -> None:
    rows = rows.assign(status=["does not fit", *rows["status"][1:]], seconds=rows["seconds"].where(rows.index > 0))
    assert benchmark.table(rows).iloc[0]["released s"] == "does not fit"
    folder = benchmark.write(rows)
    assert {path.name for path in folder.iterdir()} >= {"rows.csv", "table.md", "table.tex", "figure.png", "figure.pdf"}
    assert "does not fit" in (folder / "table.md").read_text()
    pd.testing.assert_frame_equal(benchmark.known_rows(), rows, check_dtype=False)


def test_an_allocation_beyond_memory_is_a_row() -> None:
    code = (
        "import json; from experiments.benchmarks import measure; real = measure._status; "
        "measure._status = lambda file, name: 2**29 if name == 'MemAvailable' else real(file, name); "
        "print(json.dumps(measure.measure({'device': 'cpu', 'dtype': 'float32', 'method': 'released', 'N': 16384, 'K': "
        "16384, 'D': 4, "
        "'entropy': True})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == '{"status": "does not fit"}', done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not known; use 'float32' or 'bfloat16'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' on a CPU would compare different arithmetic"),
        ({"codes": (0,)}, "a size of 0 cannot be measured"),
        ({"device_name": "tpu"}, "device='tpu' is not known"),
    ],
)
def test_wrong_requests_are_one_sentence(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.run(**TINY | change)
