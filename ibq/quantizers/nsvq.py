"""NS-VQ, non-stationary vector quantization (arXiv 2602.18896; its loss again in arXiv 2606.11363): a kernel of
distance makes unselected codes follow the selected ones. Not the NSVQ of 2022, which substitutes noise.

What it changes against VQ: the codebook term alone, in training. All codes move, without index backpropagation: the
control for what IBQ's gradient to unselected codes is needed for. The kernel's width falls, so that at the end the term
is VQ's. Two forms:
    features   the released code (CAIR-LAB-WFUSM/NS-VQ-TransVQ, CelebA): each code is drawn to each feature,
               mean_n sum_k w_nk |sg[z_n] - c_k|^2 / D, where w is 1 for the selected code and for the others
               min(1, strength K softmax_k(-|z_n - c_k|^2 / width)), a constant
    codes      the paper's rule: the gradient of a selected code i goes to every other j too, times
               exp(-|c_i - c_j|^2 / width)

Both are gradients that the optimizer takes, as in the released code, whose optimizer is Adam. Adam divides a code's
gradient by its own size: so the kernel says where an unselected code goes, and the width how many go, those whose
gradient is not far below Adam's epsilon; how far a code goes is the learning rate's. With SGD steps are as the formula
has them.

The released code has its width fall once an epoch, by a half, which here is a curve through the steps. Left out are
the decoder's gradient to selected codes, there 2 / (N D) times the copied one, and what arXiv 2606.11363 adds, replaced
codes and a frozen encoder. Suffixes: N tokens, n tokens of one chunk, D code dimension, K codes, s selected codes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ibq.ops.chunked import chunks
from ibq.ops.precision import coarse_center, full_float32
from ibq.quantizers.base import CodebookQuantizer, quantization_terms, straight_through
from ibq.quantizers.config import CodebookConfig
from ibq.quantizers.updates import StepCount
from ibq.quantizers.vq import nearest_with_entropies

LEAST_WIDTH = 1e-8


class NSVQConfig(CodebookConfig):
    """Terms and entropy penalty as in `VQConfig`. `width` is that of the first step, 2 sigma^2 in the paper; it halves
    every `halving_steps` steps (`Quantizer.set_step`), down to 1e-8. There an epoch of CelebA-HQ, some 1,400 steps."""

    method: Literal["nsvq"] = "nsvq"
    spread: Literal["features", "codes"] = Field("features", description="released code; or the paper's rule")
    width: float = Field(1.0, gt=0, description="of the kernel, in squared distance")
    halving_steps: int = Field(1400, strict=True, ge=1)
    strength: float = Field(0.01, gt=0, description="weight of all codes beside the selected one; for features")


class NonStationaryQuantizer(CodebookQuantizer, config=NSVQConfig):
    """Nearest code by Euclidean distance.

    Gradient reach: z through the straight-through copy and `commitment`; all codes through `codebook`, in evaluation
    the selected ones; all codes and z through the two entropy terms, where the config has them.
    """

    config: NSVQConfig
    paper = "NS-VQ, arXiv 2602.18896"

    def __init__(self, config: NSVQConfig) -> None:
        super().__init__(config)
        self.schedule = StepCount()

    @property
    def leaves_to_next_forward(self) -> bool:
        return not self.schedule.told

    @property
    def width(self) -> torch.Tensor:
        """The kernel's width in the next forward."""
        halvings = self.schedule.now.double() / self.config.halving_steps
        return (self.config.width * torch.exp2(-halvings)).clamp_min(LEAST_WIDTH)

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        codebook_KD, config = self.codebook, self.config
        indices_N, entropies = nearest_with_entropies(
            z_ND, codebook_KD, config.active_entropy_temperature, self.training_group
        )
        codes_ND = codebook_KD[indices_N]
        losses = quantization_terms(z_ND, codes_ND)
        if self.training:
            width = self.width.to(z_ND.dtype)
            if config.spread == "features":
                losses["codebook"] = drawn_to_features(z_ND, codebook_KD, indices_N, width, config.strength)
            else:
                losses["codebook"] = following_codes(z_ND, codebook_KD, indices_N, width)
            if self.leaves_to_next_forward:
                self.schedule.after_forward()
        return straight_through(z_ND, codes_ND), indices_N, losses | entropies


def drawn_to_features(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, indices_N: torch.Tensor, width: torch.Tensor, strength: float
) -> torch.Tensor:
    """The released term, differentiable in the codebook; in chunks of tokens, since its gradient only needs the sums
    sum_n w_nk and sum_n w_nk z_n of each code."""
    with torch.no_grad(), full_float32(z_ND.device):
        center_D = coarse_center(codebook_KD)
        z_ND, codes_KD = z_ND - center_D, codebook_KD - center_D
        value, weight_K1, sum_KD = z_ND.new_zeros(()), codes_KD.new_zeros(len(codes_KD), 1), torch.zeros_like(codes_KD)
        for chunk in chunks(z_ND, codes_KD):
            square_nK = squared_distances(z_ND[chunk], codes_KD)
            weight_nK = (-square_nK / width).softmax(1).mul_(strength * len(codes_KD)).clamp_max_(1)
            weight_nK.scatter_(1, indices_N[chunk, None], 1)
            value += square_nK.mul_(weight_nK).sum()
            weight_K1 += weight_nK.sum(0)[:, None]
            sum_KD.addmm_(weight_nK.T, z_ND[chunk])
        gradient_KD = (2 / z_ND.numel()) * (weight_K1 * codes_KD - sum_KD)
    return with_gradient(value / z_ND.numel(), codebook_KD, gradient_KD)


def following_codes(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, indices_N: torch.Tensor, width: torch.Tensor
) -> torch.Tensor:
    """VQ's term, differentiable in the codebook; its gradient of each selected code is added to those of all others,
    times the kernel."""
    with torch.no_grad(), full_float32(z_ND.device):
        center_D = coarse_center(codebook_KD)
        codes_KD = codebook_KD - center_D
        error_ND = codebook_KD[indices_N] - z_ND
        pull_KD = torch.zeros_like(codes_KD).index_add_(0, indices_N, (2 / z_ND.numel()) * error_ND)
        selected_s = indices_N.unique()
        gradient_KD = pull_KD.clone()
        for chunk in chunks(selected_s, codes_KD):
            selected_n = selected_s[chunk]
            kernel_nK = torch.exp(-squared_distances(codes_KD[selected_n], codes_KD) / width)
            kernel_nK.scatter_(1, selected_n[:, None], 0)  # its own is there already
            gradient_KD.addmm_(kernel_nK.T, pull_KD[selected_n])
    return with_gradient(error_ND.square().mean(), codebook_KD, gradient_KD)


def squared_distances(z_nD: torch.Tensor, codes_KD: torch.Tensor) -> torch.Tensor:
    square_nK = torch.addmm(codes_KD.square().sum(1), z_nD, codes_KD.T, alpha=-2)
    return square_nK.add_(z_nD.square().sum(1, keepdim=True)).clamp_min_(0)


def with_gradient(value: torch.Tensor, codebook_KD: torch.Tensor, gradient_KD: torch.Tensor) -> torch.Tensor:
    """The value, with this constant as its gradient in the codebook."""
    linear = (codebook_KD * gradient_KD).sum()
    return value + (linear - linear.detach())
