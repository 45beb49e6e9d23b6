"""Commands on a tokenizer of 36 bits: all but the usage, which is absent with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from picture_files import draw

from ibq import Tokenizer
from ibq.cli.app import app
from ibq.config import TrainConfig


def test_pictures_are_reconstructed_and_evaluated(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny(**{"data.name": "photos"}).to_json_dict()
    quantizer = {"method": "bsq", "codebook_size": 2**36, "code_dim": 36}
    Tokenizer(TrainConfig.parse(tree | {"quantizer": quantizer})).save(tmp_path / "model")
    for seed in range(2):
        draw(tmp_path / "pictures" / f"{seed}.png", 24, 24, seed=seed)
    given = [str(tmp_path / "model"), str(tmp_path / "pictures")]
    reason = "68,719,476,736 codes are too many to be counted one by one, 16,777,216 are the most"

    assert not app(["reconstruct", *given, str(tmp_path / "out")], standalone_mode=False)
    assert reason in (tmp_path / "out" / "index.html").read_text()

    out = tmp_path / "numbers.json"
    assert not app(["evaluate", *given, "--metric", "none", "--out", str(out)], standalone_mode=False)
    numbers = json.loads(out.read_text())
    assert numbers["absent"]["usage"] == reason
    assert not {"usage", "bits", "perplexity"} & numbers["metrics"].keys()
    assert "over 72 tokens" in numbers["metrics"]["quantization_error"]["protocol"]
    assert reason in capsys.readouterr().out
