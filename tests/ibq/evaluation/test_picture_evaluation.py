"""Numbers of a tokenizer on pictures that come in pairs, in batches of any order: distances as of the sets, and a
protocol or a reason for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq.config import DataConfig
from ibq.data import Images, load_images
from ibq.evaluation.pictures import PerceptualMetric
from ibq.evaluation.tokenizer import PerceptualEvaluation
from ibq.metrics.distances import Distances, PairedDistances
from ibq.pretrained.extractors import Extractor, fashion_cnn_extractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def test_split() -> Images:
    return load_images(DataConfig(), "test")


def test_pairs_in_any_order_have_the_distances_of_the_sets(
    test_split: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path))
    extractor = fashion_cnn_extractor(CPU)
    originals_N1HW = test_split.batch(torch.arange(110), CPU)
    images_N1HW = torch.nn.functional.avg_pool2d(originals_N1HW, 3, 1, 1)
    whole, paired = Distances(extractor, [test_split.images_NCHW[:110]]), PairedDistances(extractor)
    whole.update(images_N1HW)
    for positions_B in torch.randperm(110).split(30):
        paired.add_pairs(positions_B.tolist(), originals_N1HW[positions_B], images_N1HW[positions_B])
    (expected, of_whole), (metrics, of_pairs) = whole.compute(), paired.compute()
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert of_pairs == of_whole


def test_each_number_of_pictures_has_its_protocol_or_its_reason(
    test_split: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Extractor("wide", "", lambda images_BCHW: (torch.randn(len(images_BCHW), 128),) * 2, "none", CPU)
    monkeypatch.setattr(PerceptualEvaluation, "network", wide)
    metric, images_N1HW = PerceptualMetric("inception", 110, CPU), test_split.batch(torch.arange(110), CPU)
    metric.update(list(range(110)), images_N1HW, images_N1HW)
    metrics, protocol, absent = metric.compute()
    assert metrics.keys() == protocol.keys() == {"kid", "is", "precision", "recall"}
    assert all("110 uint8 images against 110" in text for text in protocol.values())
    assert absent == {"fid": "110 images are too few for a covariance of 128 features, 129 are needed"}


def test_a_network_that_fails_on_pictures_costs_its_own_numbers_alone(
    test_split: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("it cannot\nbe done.")

    monkeypatch.setattr(PerceptualEvaluation, "network", Extractor("wide", "", fail, "none", CPU))
    metric, images_N1HW = PerceptualMetric("inception", 110, CPU), test_split.batch(torch.arange(2), CPU)
    for _ in range(2):
        metric.update([0, 1], images_N1HW, images_N1HW)
    assert metric.compute() == ({}, {}, dict.fromkeys(("fid", "kid", "is", "precision", "recall"), "it cannot be done"))
