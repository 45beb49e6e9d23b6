"""The command that samples: real runs of it on real, small transformers; what it writes against a plain loop, a kill,
and ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released_layout
import torch
from picture_files import pixels
from PIL import Image
from processes import run_processes
from sample_runs import fails, files, run
from transformer_files import write_transformer

import ibq.cli.sample
import ibq.distributed
from ibq import load_transformer
from ibq.cli.sample_folder import GAP, LEGEND, SMALL, SampleFolder
from ibq.distributed import Processes
from ibq.run_directory import write_bytes
from ibq.sampling import Guidance, Sampler, Sampling, sample_uncached

RGB = {"tokenizer.data.name": "photos", "data.name": "photos"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_transformer(tmp_path / "model")


def plain(model: Path, sampling: Sampling, seed: int, classes: list[int], **named: Any) -> torch.Tensor:
    """Samples 0, 1, ... as 8 bits, by a full forward pass for every token."""
    transformer, tokenizer, _ = load_transformer(model, **named)
    numbers_B, classes_B = torch.arange(len(classes)), torch.tensor(classes)
    tokens_BN = sample_uncached(transformer, sampling, seed=seed, numbers_B=numbers_B, classes_B=classes_B)
    grid = transformer.config.grid
    with torch.no_grad():
        return ((tokenizer.decode(tokens_BN.view(-1, grid, grid)).clamp(-1, 1) + 1) * 127.5).round()


def written(out: Path) -> torch.Tensor:
    """All samples in the order of their numbers."""
    return torch.cat([pixels(path) for path in sorted((out / "samples").iterdir())]).float()


# --- What is written --------------------------------------------------------------------------------------------------


def test_samples_are_the_samplers_and_the_tokenizers_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = (
        "--classes 3,1 --count 7 --seed 5 --batch-size 3 --temperature 0.9 --top-k 12 --top-p 0.9 --min-p 0.01 "
        "--guidance 2"
    )
    schedule = "--guidance-schedule interval --guidance-start 0.25 --guidance-end 0.75"
    run(model, out, *options.split(), *schedule.split())
    sampling = Sampling(0.9, 12, 0.9, 0.01, Guidance(2.0, "interval", start=0.25, end=0.75))
    expected = plain(model, sampling, 5, [3, 1, 3, 1, 3, 1, 3])
    assert (written(out) - expected).abs().max() <= 1
    assert len(expected.flatten(1).unique(dim=0)) == 7
    assert [path.name for path in sorted((out / "samples").iterdir())][:3] == [
        "000000-class3.png",
        "000001-class1.png",
        "000002-class3.png",
    ]
    assert {len(pixels(path)[0]) for path in out.rglob("*.png")} == {1}, "grey stays grey"
    record = json.loads((out / "samples.json").read_text())
    assert record["settings"]["model"] == load_transformer(model).digest()
    assert record["settings"]["classes"] == "3,1"
    assert record["settings"]["sampling"]["guidance"]["schedule"] == "interval"
    assert record["samples"] == 7
    assert str(tmp_path) not in (out / "samples.json").read_text()
    said = capsys.readouterr()
    assert "7 samples" in said.err
    assert said.out == f"{out / 'grid.png'}\n"


def test_how_many_and_of_which_classes_where_nothing_is_said(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "all")
    assert len(written(tmp_path / "all")) == 80
    run(model, tmp_path / "two", "--classes", "8,2")
    assert len(written(tmp_path / "two")) == 16
    names = [path.stem.partition("class")[2] for path in (tmp_path / "all" / "samples").iterdir()]
    assert all(names.count(str(label)) == 8 for label in range(10))


def test_a_released_transformer(tmp_path: Path) -> None:
    networks = released_layout.networks(multipliers=(1, 1, 1, 1, 1, 2), blocks=1, attention_levels=(5,))
    path = released_layout.write(
        tmp_path / "released.ckpt", released_layout.transformer_state(tokenizer=networks, depth=1)
    )
    run(path, tmp_path / "out", "--count", 2, "--classes", "4", "--guidance", 1.5)
    expected = plain(path, Sampling(guidance=Guidance(1.5)), 0, [4, 4])
    assert expected.shape == (2, 3, 256, 256)
    assert (written(tmp_path / "out") - expected).abs().max() <= 1
    run(path, tmp_path / "rounded", "--count", 2, "--classes", "4", "--guidance", 1.5, "--bytes", "rounded")
    lost = written(tmp_path / "rounded") - written(tmp_path / "out")
    assert lost.unique().tolist() == [0, 1]
    assert lost.float().mean() == pytest.approx(0.5, abs=0.1)
    for folder, how in (("out", "cut"), ("rounded", "rounded")):
        said = json.loads((tmp_path / folder / "samples.json").read_text())
        assert said["settings"]["bytes"] == how
        assert f"clamped, {how} to 8 bits once" in said["protocol"]["images"]


def test_subtokens_and_bfloat16(tmp_path: Path) -> None:
    model = write_transformer(tmp_path / "model", **{"model.subtoken_bits": (1, 3)})
    run(model, tmp_path / "out", "--count", 4, "--temperature", 0)
    assert (written(tmp_path / "out") - plain(model, Sampling(temperature=0), 0, [0, 1, 2, 3])).abs().max() <= 1
    run(model, tmp_path / "bf16", "--count", 4, "--precision", "bf16")
    assert json.loads((tmp_path / "bf16" / "samples.json").read_text())["settings"]["precision"] == "bf16"


@pytest.mark.parametrize("changes", [{}, RGB], ids=["grey", "RGB"])
def test_the_npz_is_numpys_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Byte by byte the file of np.savez, which is how ADM's sampler writes what its evaluator reads."""
    out = tmp_path / "out"
    run(write_transformer(tmp_path / "model", **changes), out, "--classes", "2,7,4", "--count", 5, "--npz")
    samples_NHWC = np.stack(
        [np.asarray(Image.open(path).convert("RGB")) for path in sorted((out / "samples").iterdir())]
    )
    classes_N = np.array([2, 7, 4, 2, 7])
    with np.load(out / "samples.npz") as npz:
        assert npz.files == ["arr_0", "arr_1"]
        assert npz["arr_0"].dtype == np.uint8
        assert npz["arr_0"].shape == (5, 16, 16, 3)
        np.testing.assert_array_equal(npz["arr_0"], samples_NHWC)
        np.testing.assert_array_equal(npz["arr_1"], classes_N)
    np.savez(tmp_path / "expected.npz", samples_NHWC, classes_N)
    assert (out / "samples.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()


def test_the_grid_has_a_row_for_each_class(tmp_path: Path) -> None:
    out, times = tmp_path / "out", SMALL // 16
    run(write_transformer(tmp_path / "model", **RGB), out, "--classes", "5,0,9", "--count", 8)
    grid, side = np.array(Image.open(out / "grid.png")), 16 * times + GAP
    assert grid.shape == (3 * side + GAP, LEGEND + 3 * side + GAP, 3)
    samples = [
        np.asarray(Image.open(path)).repeat(times, 0).repeat(times, 1) for path in sorted((out / "samples").iterdir())
    ]
    for number, sample in enumerate(samples):
        top, left = GAP + number % 3 * side, LEGEND + GAP + number // 3 * side
        np.testing.assert_array_equal(grid[top : top + 16 * times, left : left + 16 * times], sample)
        grid[top : top + 16 * times, left : left + 16 * times] = 255
    assert (grid[:, LEGEND:] == 255).all()
    for row in range(3):
        assert (grid[GAP + row * side : GAP + (row + 1) * side, :LEGEND] < 255).any(), "its class stands before it"


def test_a_grid_of_many_classes_shows_the_first(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, tuple(range(1000)), 50_000, (256, 256, 3))
    assert (folder.rows, folder.columns) == (20, 10)
    assert folder.file(49_999).name == "049999-class999.png"
    few = SampleFolder(tmp_path, tuple(range(1000)), 3, (256, 256, 3))
    assert (few.rows, few.columns) == (3, 1)


# --- Interrupted and given again --------------------------------------------------------------------------------------

OPTIONS = ("--count", 10, "--batch-size", 4, "--npz", "--guidance", 1.5)


@pytest.fixture
def quiet(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """Files of an undisturbed run."""
    run(model, tmp_path / "quiet", *OPTIONS)
    return files(tmp_path / "quiet")


def test_interrupted_anywhere_it_goes_on_to_the_same_files(
    model: Path,
    quiet: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []

    def counting(self: Sampler, numbers_B: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        drawn.extend(numbers_B.tolist())
        return draw(self, numbers_B, classes_B)

    draw = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", counting)
    monkeypatch.setattr(ibq.cli.sample, "WRITERS", 1)
    assert len(quiet) == 13
    for k in (0, 3, 6, 9):
        out, left = tmp_path / f"after {k}", k

        def write(path: Path, content: bytes) -> None:
            nonlocal left
            if left == 0:
                (path.parent / f".{path.name}.4711").write_bytes(content[:50])  # as a kill leaves it
                raise KeyboardInterrupt
            left -= 1
            write_bytes(path, content)

        with monkeypatch.context() as patch:
            patch.setattr("ibq.cli.sample_folder.write_bytes", write)
            assert "stopped; the same command goes on from here" in fails(capsys, model, out, *OPTIONS, code=130)
        assert len(list((out / "samples").glob("*.png"))) == k
        drawn.clear()
        run(model, out, *OPTIONS)
        assert drawn == list(range(k // 4 * 4, 10)), "whole blocks are not drawn again"
        assert files(out) == quiet


@pytest.mark.parametrize("what", ["write_grid", "write_npz"])
def test_interrupted_while_it_puts_together(
    model: Path,
    quiet: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    def interrupt(self: SampleFolder, number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt
        return read(self, number)

    read = SampleFolder.read
    with monkeypatch.context() as patch:
        if what == "write_npz":
            patch.setattr(SampleFolder, "write_grid", lambda self: None)
        patch.setattr(SampleFolder, "read", interrupt)
        fails(capsys, model, tmp_path / "out", *OPTIONS, code=130)
    assert not (tmp_path / "out" / "samples.npz").exists()
    refuse_to_draw(monkeypatch)
    run(model, tmp_path / "out", *OPTIONS)
    assert files(tmp_path / "out") == quiet


def refuse_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(ibq.cli.sample, "Sampler", refuse)


def test_a_finished_folder_is_left_as_it_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(model, out, *OPTIONS[:4])
    before = files(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    refuse_to_draw(monkeypatch)
    run(model, out, *OPTIONS[:4])
    assert files(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == times
    run(model, out, *OPTIONS[:4], "--npz")
    assert files(out).keys() - before.keys() == {"samples.npz"}


def test_a_greater_count_adds_to_the_folder(model: Path, quiet: dict[str, bytes], tmp_path: Path) -> None:
    run(model, tmp_path / "out", *OPTIONS, "--count", 5)
    run(model, tmp_path / "out", *OPTIONS)
    assert files(tmp_path / "out") == quiet


def test_another_batch_size_goes_on_and_is_noted(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", "--count", 3, "--batch-size", 3)
    run(model, tmp_path / "out", "--count", 9, "--batch-size", 2)
    run(model, tmp_path / "whole", "--count", 9)
    assert (written(tmp_path / "out") - written(tmp_path / "whole")).abs().max() <= 1
    noted = json.loads((tmp_path / "out" / "samples.json").read_text())["made_on"]
    assert [machine["batch_size"] for machine in noted] == [3, 2]


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on_to_the_same_files(model: Path, tmp_path: Path) -> None:
    options = [str(option) for option in ("--count", 48, "--batch-size", 2, "--npz")]
    command = [sys.executable, "-m", "ibq", "sample", str(model)]
    subprocess.run([*command, str(tmp_path / "quiet"), *options], check=True, capture_output=True)
    out, kills = tmp_path / "out", 0
    while True:
        samples = len(list((out / "samples").glob("[0-9]*.png"))) if out.exists() else 0
        process = subprocess.Popen([*command, str(out), *options], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list((out / "samples").glob("[0-9]*.png"))) < samples + 12:
            time.sleep(0.002)
        process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert files(out) == files(tmp_path / "quiet")


# --- Several processes ------------------------------------------------------------------------------------------------


def sample_in_a_group(processes: Processes, folder: Path) -> None:
    options = (*OPTIONS, "--batch-size", 2, "--device", "cpu")
    run(folder / "model", folder / f"of {processes.world}", *options)
    if processes.rank == 1:
        SampleFolder.write = full  # type: ignore[method-assign]
    ibq.distributed.LAST_WORDS_S = 0.0
    with pytest.raises(SystemExit) as left:  # on both, as neither waits for the other
        run(folder / "model", folder / "full", "--device", "cpu")
    assert left.value.code == 2


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.processes
def test_two_processes_share_the_samples(model: Path, tmp_path: Path) -> None:
    run_processes(sample_in_a_group, tmp_path, 2)
    run(model, tmp_path / "of 1", *OPTIONS, "--batch-size", 2)
    of_two, of_one = files(tmp_path / "of 2"), files(tmp_path / "of 1")
    records = [json.loads(found.pop("samples.json")) for found in (of_two, of_one)]
    assert of_two == of_one
    assert [machine["processes"] for record in records for machine in record.pop("made_on")] == [2, 1]
    assert records[0] == records[1]
