"""LPIPS against the lpips package's own forward, Inception through torch-fidelity; with random weights, so that none
need be fetched."""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
import torchvision
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import ibq.evaluation.tokenizer
from ibq.config import DataConfig
from ibq.data import Images, load_images
from ibq.errors import DataError
from ibq.evaluation.tokenizer import PerceptualEvaluation, UnfitError
from ibq.metrics.distances import Distances, _FeatureStream
from ibq.metrics.perceptual import LPIPS, Backbone, backbone_weights, lpips_network
from ibq.models.tokenizer import Tokenizer
from ibq.pretrained import extractors
from ibq.pretrained.extractors import inception_extractor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine is found, nothing is fetched."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("IBQ_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def random_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    """As torchvision names and shapes them; the classifier's are left out."""
    with torch.device("meta"):
        network = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[backbone]()
    shapes = {name: value.shape for name, value in network.state_dict().items() if name.startswith("features.")}
    return {
        name: torch.randn(shape) / shape[1:].numel() ** 0.5 if len(shape) > 1 else torch.rand(shape)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def alex() -> torch.nn.Module:
    torch.manual_seed(0)
    return lpips_network("alex", random_weights("alex"))


def pictures(n: int = 5, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x_BCHW = torch.rand(n, channels, 32, 32) * 2 - 1
    return x_BCHW, (x_BCHW + 0.3 * torch.randn_like(x_BCHW)).clamp(-1, 1)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_equals_the_packages_own_forward(backbone: Backbone) -> None:
    """The package's network, with weights put into it in torchvision's order, against ours, given them by name."""
    weights = random_weights(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        own = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    for parameter, value in zip(own.net.parameters(), weights.values(), strict=True):
        parameter.data.copy_(value)
    x_BCHW, y_BCHW = pictures()
    streaming = LPIPS(backbone, lpips_network(backbone, weights))
    streaming.update(x_BCHW, y_BCHW)
    metrics, protocol = streaming.compute()
    with torch.no_grad():
        expected = own(x_BCHW, y_BCHW).flatten().tolist()
    assert metrics == {f"lpips[{backbone}]": pytest.approx(sum(expected) / 5, rel=1e-6)}
    assert protocol == {f"lpips[{backbone}]": "lpips 0.1.4 (v0.1), 5 pairs, float in [-1, 1], clamped"}


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lpips_is_a_mean_over_pictures(alex: torch.nn.Module, batch_size: int) -> None:
    x_BCHW, y_BCHW = pictures()
    whole, parts = LPIPS("alex", alex), LPIPS("alex", alex)
    whole.update(x_BCHW, y_BCHW)
    for x, y in zip(x_BCHW.split(batch_size), y_BCHW.split(batch_size), strict=True):
        parts.update(x, y)
    assert parts.compute()[0] == pytest.approx(whole.compute()[0], rel=1e-6)


def test_lpips_of_grey_pictures_and_of_copies(alex: torch.nn.Module) -> None:
    x_BCHW, y_BCHW = pictures(channels=1)
    grey, colour, same = (LPIPS("alex", alex) for _ in range(3))
    grey.update(x_BCHW, y_BCHW * 3)
    colour.update(x_BCHW.repeat(1, 3, 1, 1), (y_BCHW * 3).clamp(-1, 1).repeat(1, 3, 1, 1))
    same.update(x_BCHW, x_BCHW)
    assert grey.compute() == colour.compute()
    assert same.compute()[0] == {"lpips[alex]": 0}
    with pytest.raises(
        DataError, match=r"lpips\[alex\] needs images of at least 32 x 32 pixels, and these are 16 x 16"
    ):
        same.update(x_BCHW[..., :16, :16], x_BCHW[..., :16, :16])


class Recorder(torch.nn.Module):
    """Stand-in for the network of LPIPS that records the pairs of each call and their precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, str]] = []

    def forward(self, x_BCHW: torch.Tensor, y_BCHW: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(x_BCHW), torch.backends.cudnn.conv.fp32_precision))
        return (x_BCHW - y_BCHW).square().mean((1, 2, 3))


def test_lpips_looks_at_16_pairs_at_once_in_full_float32() -> None:
    (x_BCHW, y_BCHW), recorder = pictures(40), Recorder()
    streaming = LPIPS("alex", recorder)
    streaming.update(x_BCHW, y_BCHW)
    assert recorder.calls == [(16, "ieee"), (16, "ieee"), (8, "ieee")]
    assert streaming.compute()[0]["lpips[alex]"] == pytest.approx(float((x_BCHW - y_BCHW).square().mean()), rel=1e-5)


def test_the_network_is_built_without_warnings_and_random_numbers(alex: torch.nn.Module) -> None:
    weights, state = dict(random_weights("alex")), torch.get_rng_state()
    network = lpips_network("alex", weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    del weights["features.10.bias"]
    with pytest.raises(RuntimeError, match="bias"):
        lpips_network("alex", weights)


@pytest.mark.parametrize(("backbone", "file"), [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth")])
def test_absent_backbones_are_named(backbone: Backbone, file: str) -> None:
    with pytest.raises(
        DataError,
        match=rf"\(for lpips\[{backbone}\]\) are absent: {file} is not in .*\(no network\); put that file there",
    ):
        backbone_weights(backbone)


# --- Inception --------------------------------------------------------------------------------------------------------


def test_absent_inception_is_named() -> None:
    with pytest.raises(
        DataError, match=r"Inception-v3 .* are absent: weights-inception-2015-12-05-6726825d.pth is not in"
    ):
        inception_extractor(CPU)


def test_inception_is_torch_fidelitys_own_on_the_file_that_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        own = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(own.state_dict(), tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    (tmp_path / "weights").rename(tmp_path / f"weights-{digest[:8]}.pth")
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", f"nowhere/weights-{digest[:8]}.pth")
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    read_tensors = extractors.read_tensors

    def read_and_replace(path: Path, of: str) -> dict[str, torch.Tensor]:
        tensors = read_tensors(path, of)
        path.write_bytes(b"another file, which is not to be unpickled")
        return tensors

    monkeypatch.setattr(extractors, "read_tensors", read_and_replace)
    state = torch.get_rng_state()
    extractor = inception_extractor(CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert (extractor.name, extractor.suffix, extractor.weights) == ("inception-v3-compat", "", digest[:8])
    grey_B1HW = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    stream = _FeatureStream(extractor)
    stream.add(grey_B1HW)
    for actual, expected in zip(stream.finish(), own(grey_B1HW.repeat(1, 3, 1, 1)), strict=True):
        torch.testing.assert_close(actual, expected)


# --- In an evaluation -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def test_split() -> Images:
    return load_images(DataConfig(), "test")


def test_perceptual_evaluations_of_a_tokenizer(
    test_split: Images, tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = random_weights("alex")
    monkeypatch.setattr(ibq.evaluation.tokenizer, "backbone_weights", lambda _: weights)
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path))
    tokenizer = Tokenizer(tiny())
    lpips_alex, fashion_cnn = PerceptualEvaluation("lpips-alex", CPU), PerceptualEvaluation("fashion-cnn", CPU)
    metrics, protocol = lpips_alex(tokenizer, test_split, 10, 4, weights="ema")
    assert metrics.keys() == {"lpips[alex]"}
    assert (protocol["n_images"], protocol["split"], protocol["weights"]) == (10, "test", "ema")
    again, _ = lpips_alex(tokenizer, test_split, 10, 10, weights="ema")
    assert again == pytest.approx(metrics)
    assert tokenizer.training
    metrics, _ = fashion_cnn(tokenizer, test_split, 110, 100, weights="ema")
    expected, _, _ = ibq.evaluation.tokenizer.evaluate(tokenizer, test_split, 110, 100, weights="ema")
    assert metrics == {name: value for name, value in expected.items() if name in metrics}
    assert len(metrics) == 5
    assert isinstance(fashion_cnn.metric(test_split.images_NCHW), Distances)


def test_perceptual_evaluations_that_mean_nothing_are_refused(test_split: Images, tiny: Any) -> None:
    fashion_cnn, tokenizer = PerceptualEvaluation("fashion-cnn", CPU), Tokenizer(tiny())
    with pytest.raises(
        UnfitError, match="fashion-cnn is absent: 16 images are too few, 100 are needed; evaluate more images"
    ):
        fashion_cnn(tokenizer, test_split, 16, 16, weights="ema")
    photos = Images("photos", "test", test_split.images_NCHW)
    with pytest.raises(UnfitError, match="fashion-cnn knows Fashion-MNIST, not photos"):
        fashion_cnn(tokenizer, photos, 200, 100, weights="ema")
    with pytest.raises(DataError, match="vgg16"):
        PerceptualEvaluation("lpips-vgg", CPU)(tokenizer, test_split, 16, 16, weights="ema")
    with pytest.raises(
        UnfitError, match="inception is absent: 16 images are too few"
    ):  # said before its weights are sought
        PerceptualEvaluation("inception", CPU)(tokenizer, test_split, 16, 16, weights="ema")
    small = Images("small", "test", test_split.images_NCHW[..., :16, :16].contiguous())
    with pytest.raises(
        UnfitError, match=r"lpips\[vgg\] needs images of at least 32 x 32 pixels, and these are 16 x 16"
    ):
        PerceptualEvaluation("lpips-vgg", CPU)(tokenizer, small, 16, 16, weights="ema")


def test_a_metric_that_fails_and_a_package_that_is_absent_are_one_sentence(
    test_split: Images, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of\nmemory")

    tokenizer, fashion_cnn = Tokenizer(tiny()), PerceptualEvaluation("fashion-cnn", CPU)
    monkeypatch.setattr(Distances, "update", fail)
    with pytest.raises(UnfitError, match=r"^fashion-cnn is absent: out of memory$"):
        fashion_cnn(tokenizer, test_split, 110, 100, weights="ema")
    assert tokenizer.training
    monkeypatch.setitem(sys.modules, "ibq.pretrained.extractors", None)
    with pytest.raises(
        DataError,
        match=r"^fashion-cnn needs a package that cannot be imported \(import of .* halted; .*\); install ibq again$",
    ):
        PerceptualEvaluation("fashion-cnn", CPU)(tokenizer, test_split, 110, 100, weights="ema")
