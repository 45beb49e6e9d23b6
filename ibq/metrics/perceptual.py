"""Perceptual distances: how far a reconstruction is from its original in the features of a classifier, image by image.

LPIPS (Zhang et al. 2018). The lpips package's own network and heads, version 0.1, on backbones as torchvision has them
(AlexNet: the authors' choice for measuring; VGG-16: closer to what VQGANs are trained with, and what many report).
Images are floats in [-1, 1], reconstructions clamped to it, neither rounded nor resized; a grey image is repeated to
three channels. The number is the mean over images, summed in float64. Comparable with numbers of other sources at the
same resolution and backbone only. Left out: resizing to 64 pixels, as some do for speed.

`perceptual[efficientnet-lite0]` stands in for it where the backbones' weights are absent: the same distance without
learnt heads, in the features of EfficientNet-Lite0 at 1/2, 1/4, 1/8 and 1/16 of the resolution.

Suffixes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ibq.distributed import sum_of_numbers
from ibq.errors import DataError
from ibq.ops.precision import full_float32
from ibq.pretrained import efficientnet_lite0
from ibq.pretrained.weights import load_pretrained

Backbone = Literal["alex", "vgg"]
SMALLEST_SIDE, PAIRS_AT_ONCE = 32, 16


class PerceptualDistance:
    """Gathers pairs of batches; `compute` gives the mean over all pairs.

    Args:
        name: of the metric.
        provenance: of the network, for the protocol.
        network: images_BCHW twice -> distances, B numbers in any shape.
    """

    def __init__(self, name: str, provenance: str, network: nn.Module) -> None:
        self.name, self.provenance, self.network = name, provenance, network
        self.device = next(network.parameters()).device
        self._sum, self.images = 0.0, 0

    @torch.no_grad()
    def update(self, originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> None:
        """Add a batch of pairs.

        Args:
            originals_BCHW: float in [-1, 1], C of 1 or 3, H and W at least 32.
            reconstructions_BCHW: the same shape; clamped here.

        Raises:
            DataError: the images are too small for the networks.
        """
        if reason := too_small(self.name, originals_BCHW):
            raise DataError(reason)
        for pair in zip(
            originals_BCHW.float().split(PAIRS_AT_ONCE),
            reconstructions_BCHW.float().clamp(-1, 1).split(PAIRS_AT_ONCE),
            strict=True,
        ):
            rgb_pair = (images_BCHW.float().expand(-1, 3, -1, -1).to(self.device) for images_BCHW in pair)
            with full_float32(self.device, convolutions=True):
                self._sum += float(self.network(*rgb_pair).double().sum())
        self.images += len(originals_BCHW)

    def reduce(self) -> None:
        """Take in what the other processes have measured; a collective, once, after the last update."""
        self._sum, images = sum_of_numbers(self._sum, self.images)
        self.images = int(images)

    def compute(self) -> tuple[dict[str, float], dict[str, Any]]:
        """The mean, and its protocol, both under the metric's name."""
        protocol = f"{self.provenance}, {self.images} pairs, float in [-1, 1], clamped"
        return {self.name: self._sum / self.images}, {self.name: protocol}


class LPIPS(PerceptualDistance):
    """LPIPS on a backbone.

    Args:
        backbone: "alex" or "vgg".
        network: as `lpips_network` makes it.
    """

    def __init__(self, backbone: Backbone, network: nn.Module) -> None:
        super().__init__(f"lpips[{backbone}]", f"lpips {importlib.metadata.version('lpips')} (v0.1)", network)


class EfficientNetLite0Distance(PerceptualDistance):
    """`perceptual[efficientnet-lite0]`.

    Args:
        network: as `efficientnet_lite0_distance` makes it.
    """

    def __init__(self, network: nn.Module) -> None:
        stages = "1/2, 1/4, 1/8 and 1/16 of the resolution"
        of = f"efficientnet-lite0 {efficientnet_lite0.WEIGHTS_SHA256[:8]} at {stages}, no learnt heads, not resized"
        super().__init__("perceptual[efficientnet-lite0]", of, network)


class FeatureDistance(nn.Module):
    """LPIPS without learnt heads: features at unit length over channels, squared differences summed over channels, mean
    over positions, mean over stages.

    Args:
        stages: parts of a network, one after the other; the output of each counts.
    """

    def __init__(self, stages: nn.Sequential) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> torch.Tensor:
        """distances_B; no gradient flows to the originals."""
        with torch.no_grad():
            targets = self._features(originals_BCHW)
        pairs = zip(targets, self._features(reconstructions_BCHW), strict=True)
        return torch.stack([(x_BCHW - y_BCHW).square().sum(1).mean((1, 2)) for x_BCHW, y_BCHW in pairs]).mean(0)

    def _features(self, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
        features, h_BCHW = [], images_BCHW
        for stage in self.stages.children():
            h_BCHW = stage(h_BCHW)
            features.append(F.normalize(h_BCHW.float(), dim=1))
        return features


def efficientnet_lite0_distance() -> FeatureDistance:
    """In four stages of EfficientNet-Lite0, of float images (B, 3, H, W) in [-1, 1] of any size. DataError: its weights
    are absent or damaged."""
    network = efficientnet_lite0.load_efficientnet_lite0()
    half, quarter, eighth, *sixteenth = network.stages[:5]
    return FeatureDistance(nn.Sequential(nn.Sequential(network.stem, half), quarter, eighth, nn.Sequential(*sixteenth)))


def too_small(name: str, images_BCHW: torch.Tensor) -> str | None:
    """The reason why a metric's network cannot read these images, or None."""
    H, W = images_BCHW.shape[2:]
    if min(H, W) >= SMALLEST_SIDE:
        return None
    return f"{name} needs images of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, and these are {H} x {W}"


def backbone_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    """ImageNet weights of AlexNet or VGG-16, as torchvision has them. DataError: absent or damaged; see
    `ibq.pretrained.weights`."""
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = {"alex": AlexNet_Weights.IMAGENET1K_V1, "vgg": VGG16_Weights.IMAGENET1K_V1}[backbone]
    return load_pretrained(
        weights.url, {"alex": "AlexNet (for lpips[alex])", "vgg": "VGG-16 (for lpips[vgg])"}[backbone]
    )


def lpips_network(backbone: Backbone, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The lpips package's network in eval mode, its gradients off; draws no random numbers.

    Args:
        backbone: "alex" or "vgg".
        weights: of the backbone, named as torchvision's classifier names them; the heads come with the package.
    """
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # lpips calls torchvision with the argument `pretrained`, which torchvision has replaced
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        network: nn.Module = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    slices = network.get_submodule("net")
    for part in slices.children():
        for position, layer in part.named_children():  # lpips keeps the positions of torchvision's `features`
            prefix = f"features.{position}."
            layer.load_state_dict(
                {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            )
    return network.eval().requires_grad_(False)
