"""The objective of docs/method.md section 4: raw terms by name, their weights from the config, one sum for generator
and discriminator.

generator      pixel · lpips or its stand-in · the quantizer's own terms · adversarial
discriminator  discriminator · lecam

Suffixes: B images, C channels, H W pixels or patches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ibq.config import TrainConfig
from ibq.distributed import mean_over_ranks, rank, shared_errors
from ibq.errors import DataError
from ibq.metrics.perceptual import FeatureDistance, backbone_weights, efficientnet_lite0_distance, lpips_network
from ibq.models.transformer import Transformer
from ibq.pretrained.fashion_cnn import load_fashion_cnn

Weight = float | torch.Tensor
PERCEPTUAL_TERMS = {"lpips-vgg": "lpips", "fashion-cnn": "fashion_cnn", "efficientnet-lite0": "efficientnet_lite0"}
"""Name of the perceptual term by the config's name of its network: a stand-in is never called LPIPS."""
LARGEST_ADAPTIVE_WEIGHT = 1e4


def pixel_loss(originals: torch.Tensor, reconstructions: torch.Tensor, kind: Literal["l1", "l2"]) -> torch.Tensor:
    """Mean absolute or mean squared difference of two image batches of one shape, a scalar."""
    difference = originals - reconstructions
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


class PerceptualLoss(nn.Module):
    """The mean over images of a distance in a frozen network's features; forward(originals, reconstructions) gives a
    scalar.

    "lpips-vgg" is LPIPS (arXiv 1801.03924) on VGG-16, version 0.1. Two stand in for it where its weights are absent,
    the same distance without learnt heads (`FeatureDistance`): "fashion-cnn" after each of the six convolutions of a
    classifier of Fashion-MNIST, "efficientnet-lite0" after four stages of a classifier of ImageNet, as the metric
    `perceptual[efficientnet-lite0]`. None resizes.

    Args:
        weights: of VGG-16, named as torchvision names them; None: the pretrained ones.

    Raises:
        DataError: the weights are absent or damaged; one sentence that names the file.
    """

    def __init__(
        self,
        kind: Literal["lpips-vgg", "fashion-cnn", "efficientnet-lite0"],
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.term = kind, PERCEPTUAL_TERMS[kind]
        if kind == "lpips-vgg":
            self.network = lpips_network("vgg", weights or backbone_weights("vgg"))
        elif kind == "efficientnet-lite0":
            self.network = efficientnet_lite0_distance()
        else:
            body = load_fashion_cnn().body
            self.network = FeatureDistance(nn.Sequential(*(body[i : i + 3] for i in range(0, len(body), 3))))

    def forward(self, originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> torch.Tensor:
        if self.kind != "fashion-cnn":
            originals_BCHW, reconstructions_BCHW = (
                images_BCHW.expand(-1, 3, -1, -1) for images_BCHW in (originals_BCHW, reconstructions_BCHW)
            )
        distances: torch.Tensor = self.network(originals_BCHW, reconstructions_BCHW)
        return distances.mean()


def perceptual_loss(config: TrainConfig, device: torch.device) -> PerceptualLoss | None:
    """The perceptual term that a config wants, on its device; a collective.

    Of the processes of a node the first one fetches what the network needs, while the others wait and then find it.

    Raises:
        DataError: on all processes, as `PerceptualLoss`.
    """
    if config.loss.perceptual == "none":
        return None
    loss, first = None, os.environ.get("LOCAL_RANK", str(rank())) == "0"
    for turn in (True, False):
        with shared_errors(DataError):
            if first == turn:
                loss = PerceptualLoss(config.loss.perceptual).to(device)
    return loss


# --- The adversarial game ---------------------------------------------------------------------------------------------


def discriminator_loss(
    real_BHW: torch.Tensor, fake_BHW: torch.Tensor, kind: Literal["hinge", "vanilla"]
) -> torch.Tensor:
    """Half the sum of what real and fake logits cost: max(0, 1 - real) and max(0, 1 + fake), or softplus(-real) and
    softplus(fake)."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real_BHW).mean() + F.relu(1 + fake_BHW).mean())
    return 0.5 * (F.softplus(-real_BHW).mean() + F.softplus(fake_BHW).mean())


def generator_loss(fake_BHW: torch.Tensor) -> torch.Tensor:
    """Non-saturating: softplus of minus an image's mean logit, mean over images (as released; whatever the
    discriminator's loss is)."""
    return F.softplus(-fake_BHW.flatten(1).mean(1)).mean()


def lecam_loss(real_BHW: torch.Tensor, fake_BHW: torch.Tensor, averages_2: torch.Tensor) -> torch.Tensor:
    """LeCam (arXiv 2104.03310): max(0, real - average of fake)^2 + max(0, average of real - fake)^2, means over logits.

    Args:
        averages_2: moving averages of the real and of the fake logits, without gradient.
    """
    real_average, fake_average = averages_2
    return F.relu(real_BHW - fake_average).square().mean() + F.relu(real_average - fake_BHW).square().mean()


def discriminator_terms(
    config: TrainConfig, real_BHW: torch.Tensor, fake_BHW: torch.Tensor, averages_2: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The raw terms of the discriminator's objective: `discriminator` and, where it has a weight, `lecam`."""
    terms = {"discriminator": discriminator_loss(real_BHW, fake_BHW, config.loss.adversarial.loss)}
    return terms | (
        {"lecam": lecam_loss(real_BHW, fake_BHW, averages_2)} if config.loss.adversarial.lecam_weight else {}
    )


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor, loss_scale: float = 1.0
) -> torch.Tensor:
    """VQGAN's balance (arXiv 2012.09841, eq. 7): |gradient of the reconstruction terms| / (|gradient of the adversarial
    term| + 1e-4).

    Args:
        reconstruction, adversarial: scalars of one graph, which is kept.
        last_layer: the weight of the decoder's last convolution.
        loss_scale: what losses are multiplied by in fp16, so that their gradients do not vanish on the way.

    Returns:
        A scalar without gradient, at most 1e4.
    """
    scaled = (loss_scale * loss for loss in (reconstruction, adversarial))
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] / loss_scale for loss in scaled]
    reconstruction_norm, adversarial_norm = (mean_over_ranks(gradient).norm() for gradient in gradients)
    balance = (reconstruction_norm / (adversarial_norm + 1e-4)).clamp_max(LARGEST_ADAPTIVE_WEIGHT)
    overflow = ~(
        reconstruction_norm.isfinite() & adversarial_norm.isfinite()
    )  # the whole gradient will overflow too, and is judged there
    return torch.where(overflow, 1.0, balance).detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients flow through the module, not to its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


# --- Weights and the sum ----------------------------------------------------------------------------------------------


def loss_weights(config: TrainConfig, *, adversarial: bool = False, quantize: bool = True) -> dict[str, Weight]:
    """Weight of every raw term of the generator's objective; `adversarial` once the discriminator has started, not
    `quantize` before the quantizer has."""
    loss = config.loss
    weights: dict[str, Weight] = {"pixel": loss.pixel_weight}
    if loss.perceptual != "none":
        weights[PERCEPTUAL_TERMS[loss.perceptual]] = loss.perceptual_weight
    weights |= config.quantizer.loss_weights if quantize else {}
    return weights | ({"adversarial": loss.adversarial.weight} if adversarial else {})


def discriminator_weights(config: TrainConfig) -> dict[str, Weight]:
    """Weight of every raw term of the discriminator's objective."""
    lecam = config.loss.adversarial.lecam_weight
    return {"discriminator": 1.0, "lecam": lecam} if lecam else {"discriminator": 1.0}


def weighted(terms: Mapping[str, torch.Tensor], weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """Every term times its weight.

    Raises:
        ValueError: a term has no weight or a weight no term; nothing is dropped in silence.
    """
    if terms.keys() != weights.keys():
        raise ValueError(
            f"loss terms {sorted(terms)} and weights {sorted(weights)} differ; every term needs exactly one weight"
        )
    return {name: weights[name] * term for name, term in terms.items()}


def weighted_sum(terms: Mapping[str, torch.Tensor], weights: Mapping[str, Weight]) -> torch.Tensor:
    """The one place where loss terms are added; ValueError as in `weighted`."""
    return torch.stack([*weighted(terms, weights).values()]).sum() if terms or weights else torch.zeros(())


LARGEST_LOGITS, MOST_CODES = 2**26, 2**14
"""Logits and codes of a chunk at most: 256 MiB in float32, and up to three such matrices are alive at a time. Of many
codes no chunk has all of them, however few the tokens are."""
MULTIPLE = 128
"""Codes of a chunk are a multiple of it, as matrix units like them."""


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the tokens of images, in nats a token; a module, so that it can be wrapped for several
    processes.

    Args:
        transformer: whose parameters these are.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        """A scalar, in float32 at least; under autocast the logits are computed in its type, and what follows in
        float32.

        Args:
            tokens_BT: int64 in [0, K), all grid**2 tokens of every image, row-major.
            classes_B: int64 in [0, classes].

        Raises:
            ValueError: shapes or values do not fit; one sentence.
        """
        hidden_BSW = self.transformer.hidden(tokens_BT[:, :-1], classes_B)
        return torch.stack(
            [cross_entropy(*prediction) for prediction in self.transformer.predictions(hidden_BSW, tokens_BT)]
        ).sum()


def cross_entropy(hidden_NW: torch.Tensor, weight_KW: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """`F.cross_entropy(hidden_NW @ weight_KW.T, targets_N)`, a mean over N; never are more than LARGEST_LOGITS logits
    computed at once."""
    kind = hidden_NW.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NW.dtype
    hidden_NW, weight_KW = hidden_NW.to(dtype), weight_KW.to(dtype)
    k = min(MOST_CODES, max(1, LARGEST_LOGITS // len(hidden_NW) // MULTIPLE) * MULTIPLE)
    with torch.autocast(kind, enabled=False):
        if len(weight_KW) <= k:
            return F.cross_entropy(_logits(hidden_NW, weight_KW), targets_N)
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden_NW, weight_KW, targets_N, k)
        return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    # F.linear_cross_entropy of torch 2.15 chunks over tokens, not codes: in float32 it takes seven times as long on two
    # CPU cores (1,024 tokens, 16,384 codes, width 128), and in bfloat16 its value is off by 3e-3, not 1e-5.

    @staticmethod
    def forward(
        ctx: Any, hidden_NW: torch.Tensor, weight_KW: torch.Tensor, targets_N: torch.Tensor, k: int
    ) -> torch.Tensor:
        log_total_N = hidden_NW.new_full((len(hidden_NW),), -torch.inf, dtype=_wide(hidden_NW))
        logit_N = torch.zeros_like(log_total_N)
        for weight_kW, column_N, inside_N in _chunks(weight_KW, targets_N, k):
            logits_Nk = _logits(hidden_NW, weight_kW)
            logit_N += torch.where(inside_N, logits_Nk.gather(1, column_N[:, None])[:, 0], 0)
            log_total_N = torch.logaddexp(log_total_N, logits_Nk.logsumexp(1))
        ctx.save_for_backward(hidden_NW, weight_KW, targets_N, log_total_N)
        ctx.k = k
        return (log_total_N - logit_N).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_NW, weight_KW, targets_N, log_total_N = ctx.saved_tensors
        of_hidden_NW = torch.zeros_like(hidden_NW, dtype=_wide(hidden_NW))
        of_weight_KW = torch.empty_like(weight_KW)
        chunks = _chunks(weight_KW, targets_N, ctx.k)
        for of_weight_kW, (weight_kW, column_N, inside_N) in zip(of_weight_KW.split(ctx.k), chunks, strict=True):
            p_Nk = _logits(hidden_NW, weight_kW).sub_(log_total_N[:, None]).exp_()
            p_Nk.scatter_add_(1, column_N[:, None], -inside_N[:, None].to(p_Nk.dtype))
            of_logits_Nk = p_Nk.mul_(gradient / len(hidden_NW)).to(hidden_NW.dtype)
            of_hidden_NW += of_logits_Nk @ weight_kW
            torch.mm(of_logits_Nk.T, hidden_NW, out=of_weight_kW)
        return of_hidden_NW.to(hidden_NW.dtype), of_weight_KW, None, None


def _chunks(
    weight_KW: torch.Tensor, targets_N: torch.Tensor, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Chunks of k codes; with each the columns of the targets in it, and whether they are in it at all."""
    for i, weight_kW in enumerate(weight_KW.split(k)):
        column_N = targets_N - i * k
        inside_N = (column_N >= 0) & (column_N < len(weight_kW))
        yield weight_kW, column_N.clamp(0, len(weight_kW) - 1), inside_N


def _logits(hidden_NW: torch.Tensor, weight_KW: torch.Tensor) -> torch.Tensor:
    return (hidden_NW @ weight_KW.T).to(_wide(hidden_NW))


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
