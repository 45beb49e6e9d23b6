"""LPIPS: how far a reconstruction is from its original in the features of a classifier, image by image (Zhang et al.
2018).

Protocol. The lpips package's own network and heads, version 0.1, on backbones as torchvision has them (AlexNet: the
authors' choice for measuring; VGG-16: closer to what VQGANs are trained with, and what many report). Images are floats
in [-1, 1], reconstructions clamped to it, neither rounded nor resized; a grey image is repeated to three channels. The
number is the mean over images, summed in float64. Comparable with numbers of other sources at the same resolution and
backbone only. Left out: resizing to 64 pixels, as some do for speed.

Suffixes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from ibq.distributed import sum_of_numbers
from ibq.errors import DataError
from ibq.ops.precision import full_float32
from ibq.pretrained.weights import load_pretrained

Backbone = Literal["alex", "vgg"]
SMALLEST_SIDE, PAIRS_AT_ONCE = 32, 16


class LPIPS:
    """Gathers pairs of batches; `compute` gives the mean over all pairs.

    Args:
        backbone: "alex" or "vgg".
        network: images_BCHW twice -> distances, B numbers in any shape, as `lpips_network` makes it.
    """

    def __init__(self, backbone: Backbone, network: nn.Module) -> None:
        self.backbone, self.network = backbone, network
        self.device = next(network.parameters()).device
        self._sum, self.images = 0.0, 0

    @torch.no_grad()
    def update(self, originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> None:
        """Add a batch of pairs.

        Args:
            originals_BCHW: float in [-1, 1], C of 1 or 3, H and W at least 32.
            reconstructions_BCHW: the same shape; clamped here.

        Raises:
            DataError: the images are too small for the backbones.
        """
        if reason := too_small(originals_BCHW):
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
        """The mean, and its protocol, both under `lpips[alex]` or `lpips[vgg]`."""
        name = f"lpips[{self.backbone}]"
        package = f"lpips {importlib.metadata.version('lpips')}"
        return {name: self._sum / self.images}, {
            name: f"{package} (v0.1), {self.images} pairs, float in [-1, 1], clamped"
        }


def too_small(images_BCHW: torch.Tensor) -> str | None:
    """The reason why the backbones cannot read these images, or None."""
    H, W = images_BCHW.shape[2:]
    if min(H, W) >= SMALLEST_SIDE:
        return None
    return f"lpips needs images of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, and these are {H} x {W}"


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
