"""Networks whose features measure distances between sets of images, in the form that torch-fidelity uses and registers.

Imported only where a distance is computed: torch-fidelity takes seconds to import.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from ibq.pretrained import efficientnet_lite0, fashion_cnn
from ibq.pretrained.weights import hash_in_name, pretrained_file, read_tensors


class ClassifierExtractor(FeatureExtractorBase):
    """A classifier of this package for torch-fidelity: `features` and `logits` of uint8 images (B, 1 or 3, H, W).

    Once this module is imported, torch-fidelity's own functions and command know it by its name.
    """

    @staticmethod
    def load() -> nn.Module:
        """The classifier with its weights."""
        raise NotImplementedError

    def __init__(
        self, name: str, features_list: list[str], **ignored: Any
    ) -> None:  # torch-fidelity passes all settings of all metrics
        super().__init__(name, features_list)
        self.network = type(self).load()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = dict(zip(self.get_provided_features_list(), self.network(images_BCHW), strict=True))
        return tuple(outputs[name] for name in self.features_list)


class FashionCNNExtractor(ClassifierExtractor):
    """ibq.pretrained.fashion_cnn: 64 features and 10 logits of images of 32 x 32."""

    @staticmethod
    def load() -> nn.Module:
        return fashion_cnn.load_fashion_cnn()


class EfficientNetLite0Extractor(ClassifierExtractor):
    """ibq.pretrained.efficientnet_lite0: 1,280 features and 1,000 logits of images of any size."""

    @staticmethod
    def load() -> nn.Module:
        return efficientnet_lite0.load_efficientnet_lite0()


for _name, _kind in (("fashion-cnn", FashionCNNExtractor), ("efficientnet-lite0", EfficientNetLite0Extractor)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _kind)


@dataclass(frozen=True)
class Extractor:
    """A network on its device, and which weights it has.

    Args:
        name: its name in torch-fidelity.
        suffix: what its numbers are labelled with; "" for the network that the metrics' own names mean.
        network: images_BCHW (uint8) -> (features_BF, logits_BL).
        weights: the beginning of the SHA-256 of its weights.
        device: where it computes.
        resizing: what it does to the size of images, in words.
    """

    name: str
    suffix: str
    network: FeatureExtractorBase
    weights: str
    device: torch.device
    resizing: str = ""


def fashion_cnn_extractor(device: torch.device) -> Extractor:
    """The stand-in for Inception on Fashion-MNIST. DataError: its weights are absent or damaged."""
    network = create_feature_extractor("fashion-cnn", ["features", "logits"], cuda=False, verbose=False).to(device)
    return Extractor("fashion-cnn", "[fashion-cnn]", network, fashion_cnn.WEIGHTS_SHA256[:8], device)


def efficientnet_lite0_extractor(device: torch.device) -> Extractor:
    """The stand-in for Inception on colour images, and the judge of Fashion-MNIST that has not seen it. DataError: its
    weights are absent or damaged."""
    name, weights = "efficientnet-lite0", efficientnet_lite0.WEIGHTS_SHA256[:8]
    network = create_feature_extractor(name, ["features", "logits"], cuda=False, verbose=False).to(device)
    return Extractor(name, f"[{name}]", network, weights, device, efficientnet_lite0.INPUT)


def inception_extractor(device: torch.device) -> Extractor:
    """Inception-v3 as FID has it, in torch-fidelity's port: 2,048 features, logits without bias. DataError: its weights
    are absent."""
    of = "Inception-v3 (for FID and its kin)"
    path = pretrained_file(feature_extractor_inceptionv3.URL_INCEPTION_V3, of)
    tensors = (
        io.BytesIO()
    )  # torch-fidelity unpickles whatever a file holds, so it is given the tensors that were read, not the file
    torch.save(read_tensors(path, of), tensors)
    tensors.seek(0)
    layers = [
        feature_extractor_inceptionv3.FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(m)
        for m in ("fid", "isc")
    ]
    with torch.random.fork_rng(devices=[]):
        network = create_feature_extractor(
            "inception-v3-compat", layers, cuda=False, verbose=False, feature_extractor_weights_path=tensors
        ).to(device)
    return Extractor("inception-v3-compat", "", network, hash_in_name(path.name), device)


EXTRACTORS = {
    "fashion-cnn": fashion_cnn_extractor,
    "efficientnet-lite0": efficientnet_lite0_extractor,
    "inception": inception_extractor,
}
"""By the name of the evaluation."""
