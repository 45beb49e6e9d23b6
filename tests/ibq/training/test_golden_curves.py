"""The loss curves of a tiny run, 20 steps with every term: what proves that a change of the code has changed no number.

A change that is meant to change them raises RESULTS_VERSION and writes them anew: python
    tests/ibq/training/test_golden_curves.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from ibq.config import RESULTS_VERSION, TrainConfig
from ibq.training.runtime import Runtime
from ibq.training.tokenizer import train_tokenizer

GOLDEN = Path(__file__).with_name("golden_curves.json")
RUNS: dict[str, dict[str, float]] = {"curves": {}, "late": {"quantize_from": 0.5}}
"""By their names in the file: changes of the config."""


def config(**dotted: float) -> TrainConfig:
    config = TrainConfig.parse(
        {
            "model": {"base_channels": 4, "channel_multipliers": (1, 2, 2), "z_channels": 8, "norm_groups": 2},
            "quantizer": {"method": "ibq", "codebook_size": 8, "code_dim": 8, "entropy_temperature": 0.5},
            "loss": {
                "perceptual": "fashion-cnn",
                "adversarial": {
                    "weight": 0.1,
                    "adaptive": True,
                    "start": 0.25,
                    "channels": 8,
                    "layers": 2,
                    "norm": "batch",
                },
            },
            "optim": {"lr": 5e-5, "schedule": "cosine", "warmup": 0.1, "clip_norm": 5.0},
            "steps": 20,
            "batch_size": 2,
        }
    )
    return config.with_fields(**dotted)


def curves(folder: Path, **dotted: float) -> list[dict[str, float]]:
    """Every step's loss terms, raw and weighted, totals and gradient norms of both networks."""
    runtime = Runtime(device="cpu", log_every=1, snapshots=0, eval_images=4)
    events = train_tokenizer(config(**dotted), folder, runtime)
    return [
        {name: value for name, value in event.record.items() if "loss" in name or "weighted" in name or "norm" in name}
        for event in events
    ]


@pytest.mark.parametrize("run", RUNS)
def test_the_curves_are_the_golden_ones(tmp_path: Path, run: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["results_version"] == RESULTS_VERSION
    actual = curves(tmp_path, **RUNS[run])
    assert len(actual) == len(golden[run]) == 20
    for step, (mine, theirs) in enumerate(zip(actual, golden[run], strict=True), start=1):
        assert mine.keys() == theirs.keys(), f"step {step}"
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), f"{name} at step {step}"
    assert {
        "loss_pixel",
        "loss_fashion_cnn",
        "loss_adversarial",
        "loss_double",
        "loss_sample_entropy",
        "loss_lecam",
    } <= actual[-1].keys()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        golden = {run: curves(Path(folder, run), **dotted) for run, dotted in RUNS.items()}
        GOLDEN.write_text(json.dumps({"results_version": RESULTS_VERSION} | golden, indent=1) + "\n")
