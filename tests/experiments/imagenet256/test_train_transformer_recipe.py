"""Training the recipe of a transformer in the foreground: what it says, which tokenizer it is tied to, that it goes on,
what is refused."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from recipe_runs import command, tiny_tokenizer, transformer_command, write_pictures
from released_layout import CODES, networks, tokenizer_state, transformer_state
from released_layout import write as write_released
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.cli import app
from ibq import load_released, load_tokenizer
from ibq.config import TrainConfig
from ibq.models.tokenizer import Tokenizer
from ibq.run_directory import RunDirectory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two classes."""
    torch.manual_seed(0)
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", classes=2, side=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    tiny_tokenizer().save(folder)
    return folder


def call(arguments: list[str]) -> Result:
    return CliRunner().invoke(app, arguments)


def refusal(arguments: list[str]) -> str:
    """The one sentence."""
    result = call(arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line.removeprefix("error: ")


def digest_in(run: RunDirectory) -> str:
    digest: str = json.loads(run.config.read_text())["tokenizer_sha256"]
    return digest


def test_a_run_ends_with_a_row_and_is_not_trained_again(pictures: Path, tokenizer: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    result = call(transformer_command(pictures, tokenizer, run.path, 3))
    assert result.exit_code == 0, result.output
    another, training, progress, end = result.stdout.splitlines()
    assert another == (
        "the tokenizer is ibq with 16 codes, f = 16; the recipe has ibq with 16,384 codes, f = 16, and its expected "
        "numbers are for that"
    )
    assert training == f"training 3 steps of 8 images into {run.path}"
    assert progress.startswith("step 3 of 3: loss 2.7")
    assert progress.endswith(" nats a token, perplexity 16")
    assert re.match(r"bits/image 6\d, of uniform tokens 64, ", end)
    row = run.read_row()
    assert (row["status"], row["tokens_per_image"], row["codebook_size"], row["protocol.samples"]) == ("ok", 16, 16, 2)
    assert (
        row["tokenizer_sha256"]
        == row["config.tokenizer_sha256"]
        == load_tokenizer(tokenizer).digest()
        == digest_in(run)
    )
    again = call(transformer_command(pictures, tokenizer, run.path, 3))
    assert again.exit_code == 0
    assert f"{run.path} is finished already: bits/image 6" in again.stdout
    assert [attempt["event"] for attempt in run.read_attempts()] == ["started", "finished"]


def test_fresh_squares_come_from_the_folder(pictures: Path, tokenizer: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    result = call(transformer_command(pictures, tokenizer, run.path, 2, **{"data.crop": "random"}))
    assert result.exit_code == 0, result.output
    assert run.read_row()["token_source"] == "fresh"


def test_a_released_tokenizer_or_the_one_in_a_transformer_will_do(pictures: Path, tmp_path: Path) -> None:
    """A released file, a released transformer's file, and the run that came of it."""
    trained = networks()
    released = write_released(tmp_path / "tokenizer.ckpt", tokenizer_state())
    with_transformer = write_released(tmp_path / "transformer.ckpt", transformer_state(tokenizer=trained))
    plain = load_released(with_transformer).tokenizer
    expected = {
        released: load_released(released).digest(),
        with_transformer: plain.digest(),
        tmp_path / "run 1": plain.digest(),
    }
    for number, (path, digest) in enumerate(expected.items()):
        run = RunDirectory(tmp_path / f"run {number}")
        result = call(transformer_command(pictures, path, run.path, 1, samples=0, **{"data.resolution": "32"}))
        assert result.exit_code == 0, result.output
        assert f"the tokenizer is ibq with {CODES} codes, f = 4; the recipe has" in result.stdout
        assert digest_in(run) == digest
        assert run.read_row()["tokens_per_image"] == 64


def test_stopped_it_goes_on_and_ends_as_the_run_that_nothing_befell(
    pictures: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, whole = RunDirectory(tmp_path / "stopped"), RunDirectory(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            "experiments.runner.torchrun._Progress.__call__", lambda *_: signal.raise_signal(signal.SIGTERM)
        )  # at step 100
        result = call(transformer_command(pictures, tokenizer, stopped.path, 120))
    assert result.exit_code == 130
    assert result.stdout.endswith("stopped at step 100 of 120; the next run goes on from there\n")
    assert (stopped.checkpoint / "meta.json").is_file()
    for run in (stopped, whole):
        assert call(transformer_command(pictures, tokenizer, run.path, 120)).exit_code == 0
    assert [attempt["event"] for attempt in stopped.read_attempts()] == ["started", "stopped", "started", "finished"]
    weights, expected = load_file(stopped.model), load_file(whole.model)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert stopped.read_row()["cross_entropy"] == whole.read_row()["cross_entropy"]


# --- What is refused --------------------------------------------------------------------------------------------------


def test_which_recipe_takes_a_tokenizer(pictures: Path, tokenizer: Path, tmp_path: Path) -> None:
    without = ["train", "imagenet256_transformer_b", "--data", str(pictures)]
    assert refusal(without).startswith(
        "imagenet256_transformer_b trains a transformer on the tokens of a tokenizer; name that by --tokenizer "
    )
    for option in (["--tokenizer", str(tokenizer)], ["--sharding", "fsdp"], ["--samples", "0"]):
        sentence = (
            f"imagenet256_ibq_1024 trains a tokenizer, and {' '.join(option)} is for recipes of transformers; "
            f"leave it out"
        )
        assert refusal([*command(pictures, tmp_path / "run", 3), *option]) == sentence
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_has_to_be_there_whole(pictures: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text((tokenizer / "config.json").read_text())
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"tokenizer": {}}')
    for name, words in {
        "nowhere": "does not exist; pass the folder of a finished run or of Tokenizer.save",
        "notes.txt": "is neither a folder nor a .ckpt, .pt or .pth file",
        "unfinished": "holds no model.safetensors",
        "transformer": "holds no model.safetensors",
    }.items():
        assert words in refusal(transformer_command(pictures, tmp_path / name, tmp_path / "run", 3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "tokenizer.steps",
            "7",
            "--set tokenizer.steps cannot change the tokenizer of --tokenizer, which is trained already; leave it out",
        ),
        ("tokenizer_sha256", "0" * 64, "--set tokenizer_sha256 cannot change the tokenizer of --tokenizer, which is"),
        (
            "model.subtoken_bits",
            "[6,12]",
            "subtoken_bits=(6, 12) make 262,144 tokens and codebook_size is 16; choose",
        ),
        (
            "data.resolution",
            "40",
            "data.resolution=40 is not divided by the tokenizer's factor 16 into a grid of tokens; choose",
        ),
        ("classes", "1", "labels of imagefolder train go up to 1 and classes=1; set classes=2 or more"),
        ("batch_size", "32", "batch_size=32 exceeds the 16 training images"),
        ("model.dept", "2", "there is no field 'model.dept'; did you mean 'model.depth'?"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    pictures: Path, tokenizer: Path, tmp_path: Path, field: str, value: str, words: str
) -> None:
    assert words in refusal(transformer_command(pictures, tokenizer, tmp_path / "run", 3, **{field: value}))
    assert not (tmp_path / "run").exists()


def test_images_have_the_tokenizers_channels_and_as_many_labels_as_classes(
    pictures: Path, tokenizer: Path, tmp_path: Path, tiny: Callable[[], TrainConfig]
) -> None:
    Tokenizer(tiny()).save(tmp_path / "grey")
    assert "data.name='imagefolder:" in (
        said := refusal(transformer_command(pictures, tmp_path / "grey", tmp_path / "run", 3))
    )
    assert "has 3 channels and the tokenizer reads 1; choose data like the tokenizer's" in said
    unsorted = write_pictures(tmp_path / "unsorted", side=64)
    assert "has no labels and classes=2; set classes=1" in refusal(
        transformer_command(unsorted, tokenizer, tmp_path / "run", 3)
    )
    assert not (tmp_path / "run").exists()


def test_the_tokenizers_folder_is_no_place_for_the_run_and_a_run_keeps_its_tokenizer(
    pictures: Path, tokenizer: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in tokenizer.iterdir())
    assert f"{tokenizer} holds a run with " in refusal(transformer_command(pictures, tokenizer, tokenizer, 3))
    assert sorted(path.name for path in tokenizer.iterdir() if path.name != ".lock") == before
    run = tmp_path / "run"
    assert call(transformer_command(pictures, tokenizer, run, 1)).exit_code == 0
    other = Tokenizer(load_tokenizer(tokenizer).config)  # of the same config, with other weights
    other.save(tmp_path / "other")
    said = refusal(transformer_command(pictures, tmp_path / "other", run, 1))
    assert (
        said
        == f"{run} holds a run with tokenizer_sha256={digest_in(RunDirectory(run))!r}, not {other.digest()!r}; pass "
        f"another directory"
    )
