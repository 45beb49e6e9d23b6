"""Distances in features against torch-fidelity's own command, scipy, and sets of which the answer is known; the
classifier behind them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors import SafetensorError
from torch_fidelity import metric_fid

import ibq.metrics.distances as module
from ibq import run_directory
from ibq.config import DataConfig
from ibq.data import Images, load_images
from ibq.errors import DataError
from ibq.evaluation.tokenizer import evaluate
from ibq.metrics.distances import Distances, distances, reference_features, to_uint8
from ibq.models.tokenizer import Tokenizer
from ibq.pretrained import fashion_cnn
from ibq.pretrained.extractors import Extractor, fashion_cnn_extractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def test_split() -> Images:
    return load_images(DataConfig(), "test")


@pytest.fixture(autouse=True)
def cache(test_split: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test, once the images are read."""
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return fashion_cnn_extractor(CPU)


def blurred(images_N1HW: torch.Tensor) -> torch.Tensor:
    """Images as a poor tokenizer might reconstruct them: float in [-1, 1]."""
    x_N1HW = images_N1HW.float() / 127.5 - 1
    return torch.nn.functional.avg_pool2d(x_N1HW, 3, 1, 1) + 0.02 * torch.randn(x_N1HW.shape)


def measured(
    extractor: Extractor, references_N1HW: torch.Tensor, images_N1HW: torch.Tensor, batch_size: int = 100
) -> dict[str, float]:
    streaming = Distances(extractor, references_N1HW.split(64))
    for images_BCHW in images_N1HW.split(batch_size):
        streaming.update(images_BCHW)
    metrics, protocol = streaming.compute()
    assert protocol.keys() == {"distances[fashion-cnn]"}
    return {name.removesuffix("[fashion-cnn]"): value for name, value in metrics.items()}


# --- Distances --------------------------------------------------------------------------------------------------------


def test_distances_equal_those_of_torch_fidelitys_command_on_png_files(
    test_split: Images, extractor: Extractor, tmp_path: Path
) -> None:
    """Its command is run as it is, in a process that has registered fashion-cnn; grey PNG files become RGB there."""
    references_N1HW = test_split.images_NCHW[:300]
    images_N1HW = blurred(references_N1HW)
    for folder, pictures in (("images", to_uint8(images_N1HW)), ("references", references_N1HW)):
        (tmp_path / folder).mkdir()
        for number, picture_1HW in enumerate(pictures):
            Image.fromarray(picture_1HW[0].numpy()).save(tmp_path / folder / f"{number:04d}.png")
    program = "import ibq.pretrained.extractors, torch_fidelity.fidelity; torch_fidelity.fidelity.main()"
    options = (
        "--fid --kid --isc --prc --feature-extractor fashion-cnn --kid-subset-size 30 --cpu --json --silent "
        "--no-cache --save-cpu-ram"
    )
    command = [sys.executable, "-c", program, "--input1", "images", "--input2", "references", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    ours = measured(extractor, references_N1HW, images_N1HW)
    assert ours == {
        "fid": pytest.approx(theirs["frechet_inception_distance"], rel=1e-3),
        "kid": pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3),
        "is": pytest.approx(theirs["inception_score_mean"], rel=1e-3),
        "precision": pytest.approx(theirs["precision"], rel=1e-3),
        "recall": pytest.approx(theirs["recall"], rel=1e-3),
    }
    assert ours["fid"] > 0.1


@pytest.mark.parametrize("batch_size", [1, 7, 64, 130])
def test_the_batch_size_changes_nothing(test_split: Images, extractor: Extractor, batch_size: int) -> None:
    references_N1HW = test_split.images_NCHW[:130]
    images_N1HW = blurred(references_N1HW)
    assert measured(extractor, references_N1HW, images_N1HW, batch_size) == measured(
        extractor, references_N1HW, images_N1HW
    )


def test_a_set_against_itself(test_split: Images, extractor: Extractor) -> None:
    references_N1HW = test_split.images_NCHW[:200]
    same = measured(extractor, references_N1HW, test_split.batch(torch.arange(200), CPU))
    assert 0 <= same["fid"] < 1e-6
    assert (same["precision"], same["recall"]) == (1, 1)
    assert -0.1 < same["kid"] <= 0  # unbiased for independent sets, so below 0 for copies
    assert 1 <= same["is"] <= 10


def test_rounding_never_gives_a_negative_fid() -> None:
    """torch-fidelity alone gives small negative numbers for some sets against themselves."""
    for seed in range(10):
        features_NF = torch.randn(110, 8, generator=torch.Generator().manual_seed(seed))
        metrics, _ = distances(features_NF, torch.zeros(110, 10), features_NF)
        assert 0 <= metrics["fid"] < 1e-9


def test_precision_and_recall_point_the_right_way(test_split: Images, extractor: Extractor) -> None:
    """Two modes of ten kept: each image is still like a real one, most real ones are like none of them. Noise:
    neither."""
    images, labels = test_split.images_NCHW, test_split.labels_N
    assert labels is not None
    references_N1HW, others_N1HW, other_labels_N = images[:500], images[500:], labels[500:]
    fair = measured(extractor, references_N1HW, others_N1HW[:500].float() / 127.5 - 1)
    two_modes = others_N1HW[(other_labels_N == 1) | (other_labels_N == 9)][:500]
    collapsed = measured(extractor, references_N1HW, two_modes.float() / 127.5 - 1)
    noise = measured(extractor, references_N1HW, torch.rand(500, 1, 32, 32) * 2 - 1)
    assert collapsed["precision"] > fair["precision"] - 0.1
    assert collapsed["recall"] < 0.5 * fair["recall"]
    assert noise["precision"] < 0.1
    assert min(collapsed["fid"], noise["fid"]) > 10 * fair["fid"]
    assert min(collapsed["kid"], noise["kid"]) > abs(fair["kid"])
    assert collapsed["is"] < 0.5 * fair["is"]


def test_fid_equals_the_formula_in_float64_where_float32_would_not() -> None:
    """Features far from the origin: a float32 mean of them would be off by more than the distance is."""
    offset = 3e4
    x_NF, y_NF = (offset + torch.randn(5000, 4), offset + 1.5 * torch.randn(4000, 4))
    metrics, absent = distances(x_NF, torch.zeros(5000, 10), y_NF)
    x, y = x_NF.double().numpy(), y_NF.double().numpy()
    sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    covariance_mean = scipy.linalg.sqrtm(sigma_x @ sigma_y).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sigma_x + sigma_y - 2 * covariance_mean)
    assert metrics["fid"] == pytest.approx(expected, rel=1e-6)
    assert absent == {}


def test_what_would_mean_nothing_is_absent_and_says_why(test_split: Images, extractor: Extractor) -> None:
    few = Distances(extractor, [test_split.images_NCHW[:16]])
    few.update(test_split.batch(torch.arange(16), CPU))
    metrics, protocol = few.compute()
    assert metrics == {}
    assert protocol == {"distances[fashion-cnn]": "absent: 16 images are too few, 100 are needed"}
    metrics, absent = distances(torch.randn(120, 128), torch.randn(120, 10), torch.randn(150, 128))
    assert metrics.keys() == {"kid", "is", "precision", "recall"}
    assert absent == {"fid": "120 images are too few for a covariance of 128 features, 129 are needed"}
    certain_NL = torch.zeros(120, 10).index_fill(1, torch.tensor([3]), 2000)
    assert distances(torch.randn(120, 4), certain_NL, torch.randn(120, 4))[1] == {"is": "it is not a finite number"}


def test_a_fid_that_is_no_number_is_absent_and_not_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_fid, "fid_statistics_to_metric", lambda *_, **__: {metric_fid.KEY_METRIC_FID: math.nan})
    metrics, absent = distances(torch.randn(110, 8), torch.randn(110, 10), torch.randn(110, 8))
    assert metrics.keys() == {"kid", "is", "precision", "recall"}
    assert absent == {"fid": "it is not a finite number"}


def test_the_protocol_names_what_the_numbers_belong_to(test_split: Images, extractor: Extractor) -> None:
    streaming = Distances(extractor, test_split.images_NCHW[:200].split(50))
    streaming.update(test_split.batch(torch.arange(150), CPU))
    _, protocol = streaming.compute()
    parts = (
        "torch-fidelity 0.",
        f"fashion-cnn {fashion_cnn.WEIGHTS_SHA256[:8]}",
        "150 uint8 images against 200",
        "100 subsets of 15",
    )
    assert all(part in protocol["distances[fashion-cnn]"] for part in parts)


def test_one_distance_may_be_absent_alone(test_split: Images) -> None:
    wide = Extractor("wide", "[wide]", lambda images_BCHW: (torch.randn(len(images_BCHW), 128),) * 2, "none", CPU)
    streaming = Distances(wide, [test_split.images_NCHW[:110]])
    streaming.update(test_split.batch(torch.arange(110), CPU))
    metrics, protocol = streaming.compute()
    assert metrics.keys() == {"kid[wide]", "is[wide]", "precision[wide]", "recall[wide]"}
    assert protocol.keys() == {"distances[wide]", "fid[wide]"}
    assert protocol["fid[wide]"] == "absent: 110 images are too few for a covariance of 128 features, 129 are needed"


def test_references_rounded_to_bytes_are_what_the_encoder_saw() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = Images("bytes", "test", every_byte)
    assert torch.equal(to_uint8(images.batch(torch.arange(1), CPU)), every_byte)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


# --- The cache of reference features ----------------------------------------------------------------------------------


def test_reference_features_are_kept_by_content(
    test_split: Images, extractor: Extractor, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references_N1HW = test_split.images_NCHW[:70]
    extracted_NF = reference_features(extractor, [references_N1HW])
    reference_features(extractor, [references_N1HW.flip(0)])
    reference_features(extractor, [references_N1HW[:-1]])
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(module, "_extract", lambda *_: pytest.fail("extracted although it is cached"))
    assert torch.equal(reference_features(extractor, references_N1HW.split(9)), extracted_NF), (
        "the batches are no part of the content"
    )


@pytest.mark.parametrize("damage", ["cut short", "one bit", "another file"])
def test_a_damaged_cache_file_is_extracted_anew(
    test_split: Images, extractor: Extractor, cache: Path, damage: str
) -> None:
    references_N1HW = test_split.images_NCHW[:70]
    extracted_NF = reference_features(extractor, [references_N1HW])
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut short": content[:-9],
            "one bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "another file": b"x",
        }[damage]
    )
    assert torch.equal(reference_features(extractor, [references_N1HW]), extracted_NF)
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_done_without(
    test_split: Images, extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "file"))
    assert reference_features(extractor, [test_split.images_NCHW[:5]]).shape == (5, fashion_cnn.FEATURES)


def test_a_full_disk_costs_the_cache_alone(
    test_split: Images, extractor: Extractor, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(run_directory, "save_file", full)
    assert reference_features(extractor, [test_split.images_NCHW[:5]]).shape == (5, fashion_cnn.FEATURES)
    assert list(cache.iterdir()) == []


def test_every_network_has_features_of_its_own_in_the_cache(test_split: Images, extractor: Extractor) -> None:
    others = (
        replace(extractor, name="other"),
        replace(extractor, weights="01234567"),
        replace(extractor, device=torch.device("cuda")),
    )
    assert len({module._content_key(each, [test_split.images_NCHW[:5]]) for each in (extractor, *others)}) == 4


# --- The classifier ---------------------------------------------------------------------------------------------------


def test_fashion_cnn_classifies_92_percent_of_the_test_split(test_split: Images) -> None:
    assert fashion_cnn.accuracy(fashion_cnn.load_fashion_cnn(), test_split) >= 0.92
    assert fashion_cnn.weights_file().stat().st_size < 2e6


def test_a_grey_picture_gives_the_same_with_one_channel_and_with_three(test_split: Images) -> None:
    network, grey_B1HW = fashion_cnn.load_fashion_cnn(), test_split.images_NCHW[:20]
    for one, three in zip(network(grey_B1HW), network(grey_B1HW.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 28, 28, dtype=torch.uint8)])
def test_fashion_cnn_refuses_what_it_was_not_trained_on(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"reads uint8 images \(B, C, 32, 32\), not .*; resize them"):
        fashion_cnn.load_fashion_cnn()(wrong)


def test_damaged_or_missing_weights_are_refused_with_both_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "weights.safetensors"
    monkeypatch.setattr(fashion_cnn, "weights_file", lambda: damaged)
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\); install ibq again"):
        fashion_cnn.load_fashion_cnn()
    damaged.write_bytes(b"no weights")
    with pytest.raises(DataError, match=f"have sha256 .* where {fashion_cnn.WEIGHTS_SHA256} is expected"):
        fashion_cnn.load_fashion_cnn()


def test_training_learns_and_is_repeatable(test_split: Images, capsys: pytest.CaptureFixture[str]) -> None:
    assert test_split.labels_N is not None
    few = Images("fashion-mnist", "train", test_split.images_NCHW[:1024].contiguous(), test_split.labels_N[:1024])
    first, second = (fashion_cnn.train(few, epochs=2) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[2:] == losses[:2]
    assert losses[1] < losses[0] - 0.2


# --- In an evaluation -------------------------------------------------------------------------------------------------


def test_an_evaluation_of_fashion_mnist_has_the_distances(test_split: Images, extractor: Extractor, tiny: Any) -> None:
    tokenizer = Tokenizer(tiny())
    random_state = torch.get_rng_state()
    metrics, protocol, _ = evaluate(tokenizer, test_split, 110, 40, weights="ema")
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        reconstructions_N1HW = tokenizer.eval()(test_split.batch(torch.arange(110), CPU))[0]
    expected = measured(extractor, test_split.images_NCHW[:110], reconstructions_N1HW)
    assert {
        name.removesuffix("[fashion-cnn]"): value for name, value in metrics.items() if "[fashion-cnn]" in name
    } == pytest.approx(expected)
    assert protocol["distances[fashion-cnn]"].startswith("torch-fidelity")


@pytest.mark.parametrize("lack", ["images", "weights", "torch-fidelity"])
def test_an_evaluation_without_distances_says_why(
    test_split: Images, tiny: Any, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    n_images, reason = 110, "absent: fashion-cnn's weights elsewhere cannot be read (No such file or directory)"
    if lack == "images":
        n_images, reason = 16, "absent: 16 images are too few, 100 are needed"
    elif lack == "weights":
        monkeypatch.setattr(fashion_cnn, "weights_file", lambda: Path("elsewhere"))
    else:
        monkeypatch.setitem(sys.modules, "ibq.pretrained.extractors", None)
        reason = "absent: import of ibq.pretrained.extractors halted"
    metrics, protocol, _ = evaluate(Tokenizer(tiny()), test_split, n_images, 55, weights="ema")
    assert not any("[fashion-cnn]" in name for name in metrics)
    assert protocol["distances[fashion-cnn]"].startswith(reason)
    assert metrics["l1"] > 0


@pytest.mark.parametrize("step", ["update", "compute"])
@pytest.mark.parametrize("failure", [RuntimeError, MemoryError, ValueError, torch.linalg.LinAlgError])
def test_distances_that_fail_cost_no_evaluation(
    test_split: Images, tiny: Any, monkeypatch: pytest.MonkeyPatch, step: str, failure: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise failure("it cannot\nbe done.")

    monkeypatch.setattr(Distances, step, fail)
    metrics, protocol, _ = evaluate(Tokenizer(tiny()), test_split, 110, 55, weights="ema")
    assert not any("[fashion-cnn]" in name for name in metrics)
    assert protocol["distances[fashion-cnn]"] == "absent: it cannot be done"
    assert metrics["l1"] > 0


def test_importing_the_evaluation_imports_none_of_the_slow_packages() -> None:
    """The command line imports it, and lists, plans and reports without a network."""
    program = (
        "import sys, ibq.evaluation.tokenizer; print({'torch_fidelity', 'lpips', 'torchvision', 'torchmetrics'} "
        "& set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_samples_are_cut_to_bytes_as_released() -> None:
    """Against the released code's formula, floor(255 (x + 1) / 2); and against rounding."""
    x_BCHW = torch.rand(2, 3, 50, 50, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    levels = 255 * ((x_BCHW.clamp(-1, 1) + 1) / 2)
    cut, rounded = to_uint8(x_BCHW, cut=True), to_uint8(x_BCHW)
    assert torch.equal(cut, levels.floor().to(torch.uint8))
    assert torch.equal(rounded, levels.round().to(torch.uint8))
    assert (rounded.int() - cut.int()).unique().tolist() == [0, 1]
    assert to_uint8(torch.tensor([-1.0, 1.0, 7.0]), cut=True).tolist() == [0, 255, 255]
