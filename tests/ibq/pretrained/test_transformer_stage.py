"""Transformers from folders and released files: equal weights, and each way in which one cannot be used as one
sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import released_layout
import torch
from safetensors.torch import load_file, save_file
from transformer_files import write_transformer

from ibq import Tokenizer, TrainedTransformer, load_released, load_tokenizer, load_transformer
from ibq.errors import ConfigError
from ibq.run_directory import write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_transformer(tmp_path / "run")


def refused(words: str, *arguments: Any, **named: Any) -> None:
    """One sentence with these words."""
    with pytest.raises(ConfigError, match=words) as caught:
        load_transformer(*arguments, **named)
    assert "\n" not in str(caught.value)


def change(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def test_a_runs_weights_are_where_they_belong(run: Path) -> None:
    transformer, tokenizer, averaged = load_transformer(run)
    for name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(transformer.get_parameter(name), tensor), name
        assert transformer.get_parameter(name).requires_grad
    for name, tensor in load_tokenizer(run / "tokenizer").state_dict().items():
        assert torch.equal(tokenizer.state_dict()[name], tensor), name
    assert not transformer.training
    assert not tokenizer.training
    assert not averaged
    assert transformer.config.grid == 4
    logits_BSK = transformer(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([2]))
    assert logits_BSK.shape == (1, 4, 16)


def test_averaged_weights_are_named_so(tmp_path: Path) -> None:
    assert load_transformer(write_transformer(tmp_path / "run", **{"optim.ema_decay": 0.999})).averaged


def test_a_digest_is_of_all_weights(run: Path, tmp_path: Path) -> None:
    digest = load_transformer(run).digest()
    assert load_transformer(write_transformer(tmp_path / "same")).digest() == digest
    assert load_transformer(write_transformer(tmp_path / "other", seed=1)).digest() != digest
    transformer = load_transformer(run)
    with torch.no_grad():
        transformer.tokenizer.get_parameter("decoder.conv_out.bias")[0] += 1
    assert transformer.digest() != digest
    transformer = load_transformer(run)
    with torch.no_grad():
        transformer.transformer.get_parameter("head.weight")[0, 0] += 1
    assert transformer.digest() != digest


def test_a_released_transformer(tmp_path: Path) -> None:
    path = released_layout.write(tmp_path / "released.ckpt", released_layout.transformer_state())
    loaded, released = load_transformer(path), load_released(path)
    assert isinstance(released, TrainedTransformer)
    assert loaded.digest() == released.digest()
    refused("released.ckpt holds a tokenizer of its own; leave out mine", path, tokenizer="mine")
    tokenizer = released_layout.write(tmp_path / "tokenizer.ckpt", released_layout.tokenizer_state())
    refused("tokenizer.ckpt holds a tokenizer and no transformer; pass the checkpoint of a transformer", tokenizer)


def test_a_tokenizer_that_lies_elsewhere(run: Path, tmp_path: Path) -> None:
    digest = load_transformer(run).digest()
    (run / "tokenizer").rename(tmp_path / "moved")
    refused("tokenizer holds no config.json", run)
    assert load_transformer(run, tokenizer=tmp_path / "moved").digest() == digest


def test_a_tokenizer_that_does_not_belong(run: Path, tmp_path: Path) -> None:
    other = write_transformer(tmp_path / "other", seed=1) / "tokenizer"
    digests = [load_tokenizer(folder).digest()[:12] for folder in (other, run / "tokenizer")]
    words = (
        r"the tokenizer in \S+other/tokenizer \(sha256 {}\) is not the one that the transformer in \S+run was "
        r"trained with \(sha256 {}\)"
    )
    refused(words.format(*digests), run, tokenizer=other)
    larger = write_transformer(tmp_path / "larger", **{"tokenizer.quantizer.codebook_size": 1024}) / "tokenizer"
    refused(
        "larger/tokenizer has 1,024 codes and the transformer in .* was trained on 16; pass that one",
        run,
        tokenizer=larger,
    )
    refused(
        "other is a transformer's run, not a tokenizer's; pass its tokenizer, .*other/tokenizer",
        run,
        tokenizer=other.parent,
    )


def test_folders_that_hold_no_finished_transformer(run: Path, tmp_path: Path, tiny: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    Tokenizer(tiny()).save(tmp_path / "tokenizer")
    cases = {
        "absent does not exist; pass the folder of a transformer's finished run": "absent",
        "notes.txt is neither a folder nor a .ckpt, .pt or .pth file": "notes.txt",
        "empty holds no config.json; pass the folder of a run": "empty",
        "tokenizer holds a tokenizer and no transformer; pass the folder of a transformer's run": "tokenizer",
    }
    for words, name in cases.items():
        refused(words, tmp_path / name)
    refused("weights='raw' is for released checkpoints; .*run holds one set of weights", run, "raw")
    change(run / "row.json", status="nan", reason="step 3: the loss is not finite")
    refused(r"the run in .*run was lost \(nan: step 3: the loss is not finite\); pass another", run)
    (run / "row.json").unlink()
    refused("the run in .*run is not finished; let its training go on to the end", run)
    change(run / "config.json", classes=0)
    refused("config.json cannot be read .*classes.*; forget the run and train it again", run)
    (run / "config.json").write_text("{")
    refused("config.json cannot be read", run)


def test_weights_that_do_not_fit(run: Path) -> None:
    path = run / "model.safetensors"
    weights = load_file(path)
    change(run / "config.json", classes=3)
    refused(
        r"'class_emb.embedding_table.weight' has the shape \(11, 64\) there and has the shape \(4, 64\) in the "
        r"network",
        run,
    )
    change(run / "config.json", classes=10)
    save_file({name: tensor for name, tensor in weights.items() if name != "head.weight"}, path)
    refused(r"'head.weight' is absent there and has the shape \(16, 64\) in the network", run)
    save_file(weights | {"extra": torch.zeros(1)}, path)
    refused(r"'extra' has the shape \(1,\) there and is absent in the network", run)
    path.write_bytes(path.read_bytes()[:1000])
    refused("model.safetensors is damaged", run)
    path.unlink()
    refused("run holds no model.safetensors; copy the run's folder whole", run)
