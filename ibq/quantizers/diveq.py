"""DiVeQ (arXiv 2509.26469, ICLR 2026): quantization as an error vector of the distance's length, so that the gradient
of the reconstruction reaches codes without a loss term.

    z_q = z + |c - z| sg[u],  u = (v + c - z) / |v + c - z|,  v ~ N(0, noise_variance I)

What it changes against VQ: z and the selected code share the gradient g of z_q. With e = (c - z) / |c - z| the code
gets e (u g), and z the rest, g - e (u g). Unused codes are put beside used ones every so many steps.

SF-DiVeQ, the field `curve`: in training z is quantized to the nearest of K - 1 points, one on each segment between
neighbouring codes, (1 - l) c_i + l c_{i+1} with l ~ U(0, 1). A code that is never the nearest one learns through its
neighbours.

Deviations from the released code (AaltoML/DiVeQ):
    value of z_q    there the noisy formula's; here the code's, or the curve's point: noise is in the gradient alone
    noise_variance  there used as a standard deviation: its 1e-3 is a variance of 1e-6
    replacement     there noise of standard deviation 1e-9, which rounding takes away from float32 codes above about
                    0.03, so that a code and its copy stay equal; here of variance 1e-9
    curve           there evaluation projects z onto the curve, which no index can name; here it takes the nearest code.
                    There quantization begins after 1,000 steps, with means of features as codes; here `quantize_from`
                    of a run and codebook_init="kmeans" do that. There "detach" takes the direction of the first end
                    for both; here each end has its own
Suffixes: N tokens, D code dimension, K codes, S segments of the curve.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from ibq.distributed import copy_from_first, sum_over_ranks
from ibq.ops import nearest_code
from ibq.ops.precision import at_least_float32
from ibq.quantizers.base import CodebookQuantizer, Quantizer, straight_through
from ibq.quantizers.config import CodebookInit, EmbeddingConfig
from ibq.quantizers.updates import Accumulator, StepCount, move, recomputing, refuse_sharding

REPLACEMENT_VARIANCE = 1e-9


class DiVeQConfig(EmbeddingConfig):
    """No loss terms. The paper wants `noise_variance` up to 0.01; 0 is its variant "detach".

    `replace_every` counts optimizer steps (`Quantizer.set_step`); None never replaces, as SF-DiVeQ. Adam's moments of a
    replaced code remain what they were; averaged weights follow at once (`sync_average`).
    """

    method: Literal["diveq"] = "diveq"
    noise_variance: float = Field(1e-3, ge=0, description="of each coordinate of v")
    replace_every: int | None = Field(100, strict=True, ge=1, description="steps after which unused codes are replaced")
    curve: bool = Field(False, strict=True, description="SF-DiVeQ: points between neighbouring codes, in training")

    @model_validator(mode="after")
    def _curve_fits(self) -> DiVeQConfig:
        if self.curve and self.replace_every is not None:
            raise ValueError(
                f"replace_every={self.replace_every} takes codes out of the order that curve=True joins them in; set "
                f"replace_every=None or curve=False"
            )
        if self.curve and self.codebook_size < 2:
            raise ValueError(
                f"codebook_size={self.codebook_size} has no neighbours for curve=True to join; set codebook_size=2 or "
                f"more, or curve=False"
            )
        return self

    @property
    def loss_weights(self) -> dict[str, float]:
        return {}

    @property
    def changes_in_forward(self) -> bool:
        return self.noise_variance > 0 or self.curve or self.replace_every is not None


class DiVeQQuantizer(CodebookQuantizer, config=DiVeQConfig):
    """Nearest code by Euclidean distance, and a gradient that shares it between z and the code.

    Gradient reach: z and selected codes through z_q; with `curve` the codes at both ends of a selected segment. Noise
    and points of the curve come from torch's global generator of the device, in training alone. With `curve` the
    indices of a training forward name the nearer end of the segment.
    """

    config: DiVeQConfig
    paper = "DiVeQ, arXiv 2509.26469"

    def __init__(self, config: DiVeQConfig) -> None:
        super().__init__(config)
        self.schedule, self.replacement = None, None
        if config.replace_every is not None:
            self.schedule = StepCount()
            self.replacement = Replacement(self.embedding, config.replace_every)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "embedding" and self.config.replace_every is not None:
            refuse_sharding(value)
        super().__setattr__(name, value)

    @property
    def leaves_to_next_forward(self) -> bool:
        return self.replacement is not None

    @property
    def trains_between_codes(self) -> bool:
        return self.config.curve

    def place_codes(self, features_MD: torch.Tensor, generator: torch.Generator, init: CodebookInit) -> None:
        super().place_codes(features_MD, generator, init)
        if self.replacement is not None:
            self.replacement.start_anew()

    @torch.no_grad()
    def restart_codes(
        self, dead_K: torch.Tensor, features_MD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        moved_K = super().restart_codes(dead_K, features_MD, generator)
        if self.replacement is not None:  # codes that have just been placed get all the steps to be used in
            self.replacement.start_anew()
        return moved_K

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        if self.training and self.config.curve:
            return *along_curve(z_ND, self.codebook, self._noise(z_ND), self._noise(z_ND)), {}
        noise_ND = self._noise(z_ND)  # before replacements draw, which a forward that is recomputed does not repeat
        moves_codes = self.training and not recomputing()
        if moves_codes:
            self._replace()
        codebook_KD = self.codebook
        indices_N = nearest_code(z_ND, codebook_KD)
        if moves_codes:
            self._observe(indices_N)
        codes_ND = codebook_KD[indices_N]
        return straight_through(towards(z_ND, codes_ND, noise_ND), codes_ND), indices_N, {}

    def _noise(self, z_ND: torch.Tensor) -> torch.Tensor | None:
        variance = self.config.noise_variance
        return variance**0.5 * torch.randn_like(z_ND) if self.training and variance else None

    def _replace(self) -> None:
        if self.schedule is not None and self.replacement is not None:
            self.replacement.require_wide()
            self.replacement.apply_to(self.embedding, self.schedule.steps)

    def _observe(self, indices_N: torch.Tensor) -> None:
        if self.schedule is not None and self.replacement is not None:
            self.replacement.observe(indices_N, self.schedule.steps)
            self.schedule.after_forward()

    @torch.no_grad()
    def sync_average(self, average: Quantizer) -> None:
        """The averages of codes that the last forward has replaced are replaced too."""
        if self.replacement is not None:
            assert isinstance(average, DiVeQQuantizer)
            move(average.embedding, self.embedding, self.replacement.applied_K)


def towards(z_ND: torch.Tensor, codes_ND: torch.Tensor, noise_ND: torch.Tensor | None) -> torch.Tensor:
    """z + |c - z| sg[u] (arXiv 2509.26469): as far from z as the code is, in a direction that is a constant."""
    error_ND = codes_ND - z_ND
    direction_ND = error_ND.detach() if noise_ND is None else error_ND.detach() + noise_ND
    return z_ND + error_ND.norm(dim=1, keepdim=True) * F.normalize(direction_ND, dim=1)


def along_curve(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, noise_ND: torch.Tensor | None, other_noise_ND: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SF-DiVeQ: z_q (N, D) with the value of the nearest point, and the index (N,) of the nearer end of its segment.

    The gradient is that of (1 - l) towards(z, c_i) + l towards(z, c_{i+1}), each with its own noise.
    """
    share_S1 = torch.rand_like(codebook_KD[1:, :1])
    points_SD = torch.lerp(codebook_KD[:-1].detach(), codebook_KD[1:].detach(), share_S1)
    segment_N = nearest_code(z_ND, points_SD)
    share_N1 = share_S1[segment_N]
    start_ND = towards(z_ND, codebook_KD[segment_N], noise_ND)
    end_ND = towards(z_ND, codebook_KD[segment_N + 1], other_noise_ND)
    z_q_ND = straight_through(torch.lerp(start_ND, end_ND, share_N1), points_SD[segment_N])
    return z_q_ND, segment_N + (share_N1[:, 0] > 0.5).long()


class Replacement(Accumulator):
    """Codes that no token of so many steps was given are put beside used ones, drawn in proportion to the forwards that
    used them.

    It follows the step count and not the forwards, and begins to count with the first forward that it sees. With
    torch.distributed a code is used if a token of any process was given it.
    """

    used_K: torch.Tensor
    since: torch.Tensor
    applied_K: torch.Tensor

    def __init__(self, embedding_KD: torch.Tensor, every: int) -> None:
        super().__init__()
        self.every = every
        unused_K = torch.zeros_like(at_least_float32(embedding_KD.detach()[:, 0]))
        self.register_buffer("used_K", unused_K)
        self.register_buffer("since", torch.tensor(-1))  # step of the first forward that is counted, -1 before it
        self.register_buffer("applied_K", unused_K.clone(), persistent=False)

    @torch.no_grad()
    def start_anew(self) -> None:
        self.used_K.zero_()
        self.since.fill_(-1)

    @torch.no_grad()
    def apply_to(self, embedding_KD: torch.Tensor, step: torch.Tensor) -> None:
        self.applied_K.zero_()
        if self.since < 0 or step - self.since < self.every:
            return
        rows_K = torch.multinomial(self.used_K, len(self.used_K), replacement=True)
        targets_KD = at_least_float32(embedding_KD[rows_K])
        targets_KD += REPLACEMENT_VARIANCE**0.5 * torch.randn_like(targets_KD)
        copy_from_first(targets_KD)
        self.applied_K.copy_(self.used_K == 0)
        move(embedding_KD, targets_KD, self.applied_K)
        self.start_anew()

    @torch.no_grad()
    def observe(self, indices_N: torch.Tensor, step: torch.Tensor) -> None:
        processes_K = torch.zeros_like(self.used_K).index_fill_(0, indices_N, 1)
        sum_over_ranks(processes_K)
        self.used_K += processes_K > 0
        self.since.copy_(torch.where(self.since < 0, step, self.since))
