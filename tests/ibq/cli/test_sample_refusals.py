"""Errors of the command that samples: classes, arguments, folders, damaged files, too little memory. Each is one
sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sample_runs import fails, files, run
from transformer_files import write_transformer

from ibq import Tokenizer, load_tokenizer
from ibq.cli.sample import as_text, parse_classes
from ibq.cli.sample_folder import SampleFolder
from ibq.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_transformer(tmp_path / "model")


# --- Classes ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), unique=True, min_size=1))
def test_classes_are_written_as_they_are_read(classes: list[int]) -> None:
    assert parse_classes(as_text(tuple(classes)), 31) == tuple(classes)


def test_lists_of_classes() -> None:
    assert parse_classes("0,3, 5-7", 10) == (0, 3, 5, 6, 7)
    assert parse_classes(None, 3) == (0, 1, 2)
    assert as_text((0, 1, 2, 9, 5, 6)) == "0-2,9,5-6"
    cases = {
        "3,10": r"--classes 3,10: there is no class 10; the model has 10, 0 to 9",
        "0-12": "there is no class 12",
        "cat": "'cat' is neither a class nor a range; write for example 0,3,5-7",
        "1,,2": "'' is neither a class nor a range",
        "-1": "'-1' is neither",
        "7-5": "the range 7-5 ends before it begins; write 5-7",
        "1-3,2": "class 2 is named twice",
        "0,0": "class 0 is named twice",
        "0-2,0": "class 0 is named twice",
    }
    for text, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            parse_classes(text, 10)
    with pytest.raises(ConfigError, match="the model has one, 0"):
        parse_classes("1", 1)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_every_wrong_argument_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Any
) -> None:
    Tokenizer(tiny()).save(tmp_path / "tokenizer")
    unguided = write_transformer(tmp_path / "unguided", **{"model.class_dropout": 0.0})
    cases: dict[str, tuple[object, ...]] = {
        "absent does not exist; pass the folder of a transformer's finished run": (tmp_path / "absent",),
        "tokenizer holds a tokenizer and no transformer": (tmp_path / "tokenizer",),
        r"the tokenizer in .* \(sha256 .*\) is not the one": (model, "--tokenizer", tmp_path / "tokenizer"),
        "there is no class 10; the model has 10, 0 to 9": (model, "--classes", "8-10"),
        r"--guidance 2 needs an unconditional class, and the transformer "
        r"\(class_dropout=0\) was trained without; leave": (
            unguided,
            "--guidance",
            2,
        ),
        "Invalid value for '--count': Input should be greater than or equal to 1": (model, "--count", 0),
        "Invalid value for '--batch-size': Input should be a valid integer": (model, "--batch-size", "x"),
        "Invalid value for '--seed': Input should be greater than or equal to 0": (model, "--seed=-1"),
        "Invalid value for '--seed': Input should be less than or equal to 18446744073709551615": (
            model,
            "--seed",
            2**64,
        ),
        "top_k=0 must be at least 1": (model, "--top-k", 0),
        "top_p=1.5 must be in": (model, "--top-p", 1.5),
        "min_p=1.0 must be in": (model, "--min-p", 1),
        "temperature=-1.0 must be a finite number": (model, "--temperature=-1"),
        "guidance scale=nan must be a finite number": (model, "--guidance", "nan"),
        "guidance power=2.0 is of schedule 'cosine'": (model, "--guidance-power", 2),
        "start=0.5 to end=0.25 is no interval": (model, "--guidance-start", 0.5, "--guidance-end", 0.25),
        "Invalid value for '--guidance-schedule': .*'constant'": (model, "--guidance-schedule", "warp"),
        "weights='raw' is for released checkpoints": (model, "--weights", "raw"),
        "device='warp' is not known": (model, "--device", "warp"),
    }
    if not torch.cuda.is_available():
        cases["device='cuda' was asked for but torch sees no CUDA device"] = (model, "--device", "cuda")
    for words, (first, *others) in cases.items():
        assert re.search(words, fails(capsys, first, tmp_path / "out", *others)), words
        assert not (tmp_path / "out").exists()
    run(unguided, tmp_path / "out", "--count", 1)


def test_an_out_folder_that_would_harm_something(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(model)
    assert "lies inside" in fails(capsys, model, model / "samples")
    assert "model's own folder; choose an OUT outside" in fails(capsys, model, model)
    assert files(model) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "grid.png").write_text("my own")
    assert "holds other files than samples" in fails(capsys, model, tmp_path / "mine")
    assert "is a file; choose a folder" in fails(capsys, model, tmp_path / "mine" / "grid.png")
    assert files(tmp_path / "mine") == {"grid.png": b"my own"}
    run(model, tmp_path / "out", "--count", 2)
    (tmp_path / "out" / "samples.json").write_text("[1]")
    assert "samples.json cannot be read" in fails(capsys, model, tmp_path / "out", "--count", 2)


def test_samples_of_other_settings_are_not_mixed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(model, out, "--count", 4)
    before = files(out)
    cases = {
        "model='[0-9a-f]{64}', not '[0-9a-f]{64}'": (write_transformer(tmp_path / "other", seed=1), out),
        "seed=0, not 1": (model, out, "--seed", 1),
        "classes='0-9', not '0-8'": (model, out, "--classes", "0-8"),
        "sampling.top_k=None, not 3": (model, out, "--top-k", 3),
        "sampling.guidance.scale=1.0, not 2.5": (model, out, "--guidance", 2.5),
        "precision='fp32', not 'bf16'": (model, out, "--precision", "bf16"),
    }
    for words, arguments in cases.items():
        assert re.search(
            rf"out holds samples with {words}; choose another OUT", fails(capsys, *arguments, "--count", 4)
        ), words
    assert "out holds 4 samples, more than --count 3; choose another OUT" in fails(capsys, model, out, "--count", 3)
    assert files(out) == before


def test_two_commands_at_one_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SampleFolder(tmp_path / "out", (0,), 1, (16, 16, 1))
    with folder.claim({}, {}, {}):
        assert "another command is writing samples into" in fails(capsys, model, tmp_path / "out")
    run(model, tmp_path / "out", "--count", 1)  # as there was no sample yet, its settings do not bind


def test_damaged_files_are_one_sentence(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(model, out, "--count", 3)
    sample = out / "samples" / "000001-class1.png"
    whole = sample.read_bytes()
    for content in (whole[:40], b"", b"no picture"):
        sample.write_bytes(content)
        assert "000001-class1.png is damaged" in fails(capsys, model, out, "--count", 3, "--npz")
    Image.new("L", (8, 8)).save(sample)
    assert "000001-class1.png is none of these samples; delete it" in fails(capsys, model, out, "--count", 3, "--npz")
    sample.unlink()
    with pytest.raises(
        ConfigError, match=r"class1\.png has gone; run the command again, all its processes with the same folder OUT"
    ):
        SampleFolder(out, tuple(range(10)), 3, (16, 16, 1)).write_grid()
    run(model, out, "--count", 3)
    assert sample.read_bytes() == whole


@pytest.mark.parametrize(("file", "name"), [("", "head.weight"), ("tokenizer", "decoder.conv_out.bias")])
def test_damaged_weights_are_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, name: str
) -> None:
    path = model / file / "model.safetensors"
    weights = load_file(path)
    weights[name][0] = float("nan")
    save_file(weights, path)
    row = json.loads((model / "row.json").read_text())
    tokenizer = load_tokenizer(model / "tokenizer")
    (model / "row.json").write_text(json.dumps(row | {"tokenizer_sha256": tokenizer.digest()}))
    assert "weights are damaged" in fails(capsys, model, tmp_path / "out")


def test_too_little_memory_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Tokenizer, "decode", full)
    assert "not enough memory for 32 samples at a time on cpu; lower --batch-size" in fails(
        capsys, model, tmp_path / "out"
    )
