"""`ibq evaluate --data`: a tokenizer on the test split of data that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ibq import Tokenizer, load_tokenizer
from ibq.cli.app import app
from ibq.config import DataConfig
from ibq.data import load_images
from ibq.evaluation.tokenizer import evaluate


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Path:
    Tokenizer(tiny(**{"data.name": "landscapes"})).save(tmp_path / "model")
    return tmp_path / "model"


def test_numbers_are_those_of_the_other_test_split(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    arguments = ["--data", "photos", "--metric", "none", "--limit", "20", "--batch-size", "8", "--out", str(out)]
    assert not app(["evaluate", str(model), *arguments], standalone_mode=False)
    said = json.loads(out.read_text())
    images = load_images(DataConfig(name="photos"), "test")
    expected, *_ = evaluate(load_tokenizer(model), images, 20, 8, weights="ema")
    assert said["pictures"] == 20
    assert said["facts"]["pictures seen"] == f"test split of photos, 3×32×32, hash {images.content_hash[:12]}"
    for name in ("l1", "psnr_db", "perplexity", "quantization_error"):
        assert said["metrics"][name]["value"] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--data", "fashion-mnist"],
            "--data fashion-mnist has 1 channel and the tokenizer 3; name a data set with as many",
        ),
        (["--data", "photo"], "did you mean 'photos'?"),
        (["--data", "imagefolder:/x"], "--data imagefolder:/x is a folder; name it as PICTURES"),
        (["pictures", "--data", "photos"], "--data photos and PICTURES pictures contradict each other; leave one out"),
        (["--data", "photos", "--resize", "8"], "--data photos and --resize 8 contradict each other; leave one out"),
        ([], "there is nothing to evaluate on; name a folder as PICTURES, or a data set by --data"),
    ],
)
def test_what_cannot_be_evaluated_on_is_one_sentence(
    arguments: list[str], sentence: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        app(["evaluate", str(model), *arguments])
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
