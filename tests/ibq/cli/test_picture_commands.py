"""Reconstructing and evaluating folders of pictures: real files of mixed sizes through real, small tokenizers saved to
a folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from picture_files import draw, pixels
from PIL import Image
from released_layout import Tensors, networks, tokenizer_state, transformer_state, write
from safetensors.torch import load_file

import ibq.evaluation.tokenizer
from ibq import Tokenizer, load_released, load_tokenizer
from ibq.cli import reconstruct
from ibq.cli.app import app
from ibq.metrics.codebook import QuantizationError
from ibq.metrics.dimension import Moments, dimension_metrics
from ibq.metrics.quality import ImageQuality
from ibq.metrics.usage import usage_metrics
from ibq.run_directory import read_lines

WIDE = {"data.name": "photos", "model.channel_multipliers": (1, 1, 1, 1, 1)}  # f = 16


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("IBQ_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Path:
    """An RGB tokenizer with f = 4."""
    Tokenizer(tiny(**{"data.name": "photos"})).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of three sizes, in classes and beside them."""
    root = tmp_path / "pictures"
    sizes = {"b.png": (40, 24), "a.jpg": (24, 24), "cats/c.webp": (40, 24), "cats/d.png": (24, 24), "e.bmp": (12, 16)}
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        draw(root / name, width, height, seed=seed)
    return root


def fails(command: str, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as left:
        app([command, *map(str, arguments)])
    assert left.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "Error: "))]
    return sentence


def run(command: str, *arguments: object) -> None:
    assert not app([command, *map(str, arguments)], standalone_mode=False)


def as_seen(path: Path) -> torch.Tensor:
    return pixels(path).float() / 127.5 - 1


def plain(tokenizer: Tokenizer, x_BCHW: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return ((tokenizer(x_BCHW).images.clamp(-1, 1) + 1) * 127.5).round()


# --- Reconstruct ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_reconstructions_are_the_tokenizers_own(model: Path, folder: Path, tmp_path: Path, batch_size: int) -> None:
    run("reconstruct", model, folder, tmp_path / "out", "--batch-size", batch_size)
    tokenizer, out = load_tokenizer(model), tmp_path / "out"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        original = pixels(out / "originals" / f"{name}.png")
        with Image.open(file) as image:
            assert torch.equal(original[0].permute(1, 2, 0), torch.from_numpy(np.asarray(image.convert("RGB")).copy()))
        written = pixels(out / "reconstructions" / f"{name}.png").float()
        assert (written - plain(tokenizer, as_seen(out / "originals" / f"{name}.png"))).abs().max() <= (batch_size > 1)
        indices = load_file(out / "indices" / f"{name}.safetensors")["indices_BHW"]
        with torch.no_grad():
            decoded = ((tokenizer.decode(indices).clamp(-1, 1) + 1) * 127.5).round()
        assert (written - decoded).abs().max() <= (batch_size > 1)
        difference = (original.float() - written).abs().amax(1).mul(4).clamp(max=255)
        assert torch.equal(pixels(out / "differences" / f"{name}.png")[:, 0].float(), difference)


def test_a_picture_of_1024_pixels(tiny: Any, tmp_path: Path) -> None:
    Tokenizer(tiny(**WIDE)).save(tmp_path / "model")
    draw(tmp_path / "pictures" / "large.png", 1024, 1024)
    draw(tmp_path / "pictures" / "small.png", 32, 48)
    run("reconstruct", tmp_path / "model", tmp_path / "pictures", tmp_path / "out")
    x_BCHW = as_seen(tmp_path / "pictures" / "large.png")
    assert torch.equal(
        pixels(tmp_path / "out" / "reconstructions" / "large.png.png").float(),
        plain(load_tokenizer(tmp_path / "model"), x_BCHW),
    )
    assert load_file(tmp_path / "out" / "indices" / "large.png.safetensors")["indices_BHW"].shape == (1, 64, 64)


def test_a_rerun_does_what_is_missing_or_changed(
    model: Path, folder: Path, tmp_path: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("reconstruct", model, folder, out)
    times = {path: path.stat().st_mtime_ns for path in (out / "reconstructions").rglob("*.png")}
    page = (out / "index.html").read_text()

    def changed() -> set[str]:
        now = {path: path.stat().st_mtime_ns for path in (out / "reconstructions").rglob("*.png")}
        names = {path.name for path in now if times.get(path) != now[path]}
        times.update(now)
        return names

    capsys.readouterr()
    run("reconstruct", model, folder, out)
    assert changed() == set()
    assert "5 were finished and are unchanged" in capsys.readouterr().err
    assert (out / "index.html").read_text() == page
    draw(folder / "a.jpg", 24, 24, seed=9)  # as large and as old as it was, and another picture
    (out / "indices" / "b.png.safetensors").unlink()
    with open(out / "pictures.jsonl", "a") as file:  # torn by a kill
        file.write('{"name": "e.bmp", "ke')
    run("reconstruct", model, folder, out)
    assert changed() == {"a.jpg.png", "b.png.png"}
    Tokenizer(tiny("vq", **{"data.name": "photos"})).save(model)
    run("reconstruct", model, folder, out, "--limit", 2)
    assert changed() == {"a.jpg.png", "b.png.png"}
    run("reconstruct", model, folder, out, "--resize", 8, "--limit", 1)
    assert changed() == {"a.jpg.png"}


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(400):
        draw(tmp_path / "pictures" / f"{number:03d}.png", 32, 32, seed=number)
    out, command = (
        tmp_path / "out",
        [sys.executable, "-m", "ibq", "reconstruct", str(model), str(tmp_path / "pictures"), str(tmp_path / "out")],
    )
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(read_lines(out / "pictures.jsonl")) < 20:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = len(read_lines(out / "pictures.jsonl"))
    assert not (out / "index.html").exists()
    run("reconstruct", model, tmp_path / "pictures", out)
    assert f"{finished:,} were finished and are unchanged" in capsys.readouterr().err
    assert len(list((out / "reconstructions").glob("*.png"))) == 400
    assert sum(page.read_text().count("<article") for page in out.glob("*.html")) == 400


def test_a_grey_tokenizer_sees_grey_and_says_so(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer(tiny()).save(tmp_path / "model")
    draw(tmp_path / "pictures" / "colour.png", 24, 16)
    run("reconstruct", tmp_path / "model", tmp_path / "pictures", tmp_path / "out")
    assert "shown every picture in grey" in capsys.readouterr().err
    with Image.open(tmp_path / "pictures" / "colour.png") as image:
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / "out" / "originals" / "colour.png.png")), np.asarray(image.convert("L"))
        )
    assert "grey" in (tmp_path / "out" / "index.html").read_text()


HOSTILE = [
    "<script>alert(1).png",
    "\"quoted\" 'twice' & more.png",
    "two\nlines.png",
    "ü #1 100%?.png",
    "n" * 240 + ".png",
    "{{ 7 }}.png",
    os.fsdecode(b"\xff.png"),
]


def test_weird_names_and_links_in_a_circle(model: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "pictures", tmp_path / "out"
    for name in HOSTILE:
        draw(root / "<b>" / name, 8, 8)
    (root / "loop").symlink_to(root)
    run("reconstruct", model, root, out)
    page = (out / "index.html").read_text()
    assert "<script" not in page
    assert page.count("<article") == len(HOSTILE)
    sources = [unquote_to_bytes(part.partition('"')[0]) for part in page.split('<img src="')[1:]]
    assert len(sources) == 3 * len(HOSTILE)
    assert all(os.path.isfile(os.path.join(os.fsencode(out), source)) for source in sources)


def test_more_pictures_than_a_page_holds(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruct, "PICTURES_A_PAGE", 2)
    run("reconstruct", model, folder, tmp_path / "out")
    pages = sorted((tmp_path / "out").glob("*.html"))
    assert [page.name for page in pages] == ["index-2.html", "index-3.html", "index.html"]
    assert [page.read_text().count("<article") for page in pages] == [2, 1, 2]
    run("reconstruct", model, folder, tmp_path / "out", "--limit", 2)
    assert [page.name for page in (tmp_path / "out").glob("*.html")] == ["index.html"]


# --- Which part of a picture ------------------------------------------------------------------------------------------


def test_pictures_that_do_not_fit_are_skipped_with_numbers_and_remedy(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(folder / "odd.png", 30, 33)
    (folder / "broken.png").write_bytes(b"no picture")
    run("reconstruct", model, folder, tmp_path / "out")
    said = capsys.readouterr().err
    assert "5 pictures, 2 skipped" in said
    assert (
        "odd.png is 30×33 pixels, not multiples of the tokenizer's down-sampling factor 4; use --fit crop or --resize"
        in said
    )
    assert "broken.png has not the content of" in said
    assert "odd.png is 30×33 pixels" in (tmp_path / "out" / "index.html").read_text()


# --- Evaluate ---------------------------------------------------------------------------------------------------------


def evaluated(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    run("evaluate", *arguments, "--out", tmp_path / "numbers.json")
    numbers: dict[str, Any] = json.loads((tmp_path / "numbers.json").read_text())
    return numbers


def test_numbers_equal_a_plain_loop_over_the_pictures(model: Path, folder: Path, tmp_path: Path) -> None:
    run("reconstruct", model, folder, tmp_path / "out")
    tokenizer, counts_K = load_tokenizer(model), torch.zeros(16, dtype=torch.int64)
    quality, error, features = ImageQuality(), QuantizationError(), []
    with torch.no_grad():
        for file in sorted((tmp_path / "out" / "originals").rglob("*.png")):
            x_BCHW = as_seen(file)
            y_BCHW, z_BDHW, quantized = tokenizer(x_BCHW)
            quality.update(x_BCHW, y_BCHW)
            error.update(z_BDHW, quantized.z_q)
            features.append(z_BDHW.permute(0, 2, 3, 1).flatten(0, 2))
            counts_K += torch.bincount(quantized.indices.flatten(), minlength=16)
    cloud = Moments(tokenizer.config.quantizer.code_dim, torch.device("cpu"))
    cloud.update(torch.cat(features))
    expected = usage_metrics(counts_K) | dimension_metrics(cloud, tokenizer.quantize.codebook, counts_K)
    expected |= quality.compute() | {"quantization_error": error.compute()}
    for batch_size in (1, 3):
        numbers = evaluated(tmp_path, model, folder, "--metric", "none", "--batch-size", batch_size)
        assert numbers["pictures"] == 5
        assert numbers["sizes"] == {"24×24": 2, "40×24": 2, "12×16": 1}
        metrics = {name: entry["value"] for name, entry in numbers["metrics"].items()}
        assert metrics == pytest.approx(expected, rel=1e-5)
        assert all(entry["protocol"] for entry in numbers["metrics"].values())


def test_pictures_are_scaled_as_in_the_tokenizers_training_and_the_numbers_say_so(tmp_path: Path) -> None:
    path = write(tmp_path / "released.ckpt", tokenizer_state())
    pictures = tmp_path / "pictures"
    draw(pictures / "a.png", 70, 40)
    released, ours, chosen = (
        evaluated(tmp_path, path, pictures, "--metric", "none", "--resize", 32, *more)
        for more in ((), ("--scaling", "antialiased"), ("--scaling", "released"))
    )
    assert "OpenCV's INTER_LINEAR), not turned by EXIF, as released" in released["facts"]["pictures seen"]
    assert "32: antialiased bicubic, upright as EXIF says" in ours["facts"]["pictures seen"]
    assert chosen == released
    assert released["metrics"]["l1"]["value"] != ours["metrics"]["l1"]["value"]
    assert (
        "the released code takes bytes, cut and not rounded, in a 7×7 uniform window"
        in ours["metrics"]["ssim"]["protocol"]
    )
    assert "the released code takes bytes, cut and not rounded" in ours["metrics"]["psnr_db"]["protocol"]


def test_what_cannot_be_measured_is_absent_with_its_reason(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(folder / "tiny.png", 8, 8)
    numbers = evaluated(tmp_path, model, folder)
    assert "1 of 6 pictures are smaller" in numbers["absent"]["ssim"]
    assert "6 images are too few" in numbers["absent"]["fid"]
    assert "alexnet-owt-7be5be79.pth is not in" in numbers["absent"]["lpips[alex]"]
    assert not numbers["absent"].keys() & numbers["metrics"].keys()
    said = capsys.readouterr()
    assert "dead_codes" in said.out
    assert "peak memory" in said.err


def test_lpips_and_stand_ins_through_the_evaluations_own_networks(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LPIPS with random weights equals the plain call on each picture; fashion-cnn's numbers bear its name."""
    from torchvision.models import alexnet

    from ibq.metrics.perceptual import LPIPS, lpips_network

    weights = alexnet(weights=None).state_dict()
    monkeypatch.setattr(ibq.evaluation.tokenizer, "backbone_weights", lambda _: weights)
    Tokenizer(tiny()).save(tmp_path / "model")
    for number in range(100):
        draw(tmp_path / "pictures" / f"{number:03d}.png", 32, 32, "L", seed=number)
    wanted = ("--metric", "lpips-alex", "--metric", "fashion-cnn", "--limit", 100)
    numbers = [
        evaluated(tmp_path, tmp_path / "model", tmp_path / "pictures", *wanted, "--batch-size", size)
        for size in (7, 50)
    ]
    values = [{name: entry["value"] for name, entry in each["metrics"].items()} for each in numbers]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
    assert {"fid[fashion-cnn]", "kid[fashion-cnn]", "precision[fashion-cnn]", "lpips[alex]"} <= values[0].keys()
    assert "fid" not in values[0]
    lpips, tokenizer = LPIPS("alex", lpips_network("alex", weights)), load_tokenizer(tmp_path / "model")
    with torch.no_grad():
        for file in sorted((tmp_path / "pictures").iterdir()):
            lpips.update(as_seen(file), tokenizer(as_seen(file)).images)
    assert values[0]["lpips[alex]"] == pytest.approx(lpips.compute()[0]["lpips[alex]"], rel=1e-4)
    draw(tmp_path / "pictures" / "small.png", 16, 16, "L")
    absent = evaluated(tmp_path, tmp_path / "model", tmp_path / "pictures", *wanted[:4])["absent"]
    assert "lpips[alex] needs images of at least 32 x 32 pixels" in absent["lpips[alex]"]


@pytest.mark.parametrize(
    ("state", "labels"),
    [
        (tokenizer_state(), {"ema": "averaged (EMA), as released", "raw": "as trained, not averaged"}),
        (transformer_state(), dict.fromkeys(("ema", "raw"), "as in the transformer's checkpoint")),
        (
            transformer_state(tokenizer=tokenizer_state()),
            {"ema": "averaged (EMA), as released", "raw": "as in the transformer's checkpoint"},
        ),
    ],
    ids=["tokenizer", "transformer", "transformer with averages"],
)
def test_released_weights_are_chosen_and_labelled(tmp_path: Path, state: Tensors, labels: dict[str, str]) -> None:
    draw(tmp_path / "pictures" / "a.png", 8, 8)
    path = write(tmp_path / "released.ckpt", state)
    for weights, label in labels.items():
        numbers = evaluated(tmp_path, path, tmp_path / "pictures", "--metric", "none", "--weights", weights)
        assert numbers["facts"]["weights"] == label
    loaded = [load_released(path, weights) for weights in ("ema", "raw")]
    tokenizers = [each if isinstance(each, Tokenizer) else each.tokenizer for each in loaded]
    same = torch.equal(*(tokenizer.get_parameter("quant_conv.bias") for tokenizer in tokenizers))
    assert same == (labels["ema"] == labels["raw"])


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_every_wrong_argument_is_one_sentence(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    draw(tmp_path / "odd" / "odd.png", 30, 33)
    plain_file = write(tmp_path / "plain.ckpt", networks())
    cases = {
        "absent does not exist; pass the folder of a finished run": ("absent", folder),
        "b.png is neither a folder nor a .ckpt, .pt or .pth file": (folder / "b.png", folder),
        "holds no config.json; pass a folder written by": (folder, folder),
        "absent does not exist": (model, tmp_path / "absent"),
        "holds no image: nothing in it or below it ends in .png": (model, tmp_path / "empty"),
        "no picture of .*odd can be used: odd.png is 30×33 pixels": (model, tmp_path / "odd"),
        "--resize 30 is not a multiple": (model, folder, "--resize", 30),
        "device='warp' is not known": (model, folder, "--device", "warp"),
        "--fit crop and --resize 8 contradict each other": (model, folder, "--fit", "crop", "--resize", 8),
        "Invalid value for '--limit': Input should be greater than or equal to 1": (model, folder, "--limit", 0),
        "Invalid value for '--batch-size': Input should be a valid integer": (model, folder, "--batch-size", "x"),
        "--weights raw is for released checkpoints; .*model holds one set of weights": (
            model,
            folder,
            "--weights",
            "raw",
        ),
        "holds no averaged weights .*--weights raw": (plain_file, folder),
    }
    for words, arguments in cases.items():
        for command, out in (("evaluate", ()), ("reconstruct", (tmp_path / "out",))):
            assert re.search(words, fails(command, capsys, *arguments, *out)), words
    assert "--out" in fails("evaluate", capsys, model, folder, "--out", tmp_path)
    contradiction = fails("evaluate", capsys, model, folder, "--metric", "inception", "--metric", "none")
    assert contradiction == "error: --metric none and --metric inception contradict each other; leave one out"


def test_an_out_folder_that_would_harm_something(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "lies inside" in fails("reconstruct", capsys, model, folder, folder / "out")
    assert "lies inside" in fails("reconstruct", capsys, model, folder, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my own page")
    assert "holds other files than reconstructions" in fails("reconstruct", capsys, model, folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "index.html").read_text() == "my own page"
    assert "is a file; choose a folder" in fails("reconstruct", capsys, model, folder, tmp_path / "mine" / "index.html")
    run("reconstruct", model, folder, tmp_path / "out")
    (tmp_path / "out" / "indices" / "b.png.safetensors").write_bytes(b"torn")
    assert "b.png.safetensors is damaged; delete it" in fails("reconstruct", capsys, model, folder, tmp_path / "out")


@pytest.mark.parametrize("part", ["encoder.conv_in.bias", "decoder.conv_out.bias"])
def test_damaged_weights_are_one_sentence(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    tokenizer = load_tokenizer(model)
    with torch.no_grad():
        tokenizer.get_parameter(part).fill_(float("nan"))
    tokenizer.save(model)
    assert "a.jpg (24×24 pixels, 2 at a time)" in fails("reconstruct", capsys, model, folder, tmp_path / "out")
    assert "error: " in fails("evaluate", capsys, model, folder, "--metric", "none")


def test_too_little_memory_is_one_sentence(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Tokenizer, "forward", full)
    assert "not enough memory for a.jpg (24×24 pixels, 2 at a time); lower --batch-size" in fails(
        "evaluate", capsys, model, folder
    )
