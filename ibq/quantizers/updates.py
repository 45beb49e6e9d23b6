"""Codebook updates that are not gradients: moving averages, restarts of dead codes, running-average anchors.

A training forward first applies what the one before has seen, then quantizes, then looks at its own features. So the
codebook is constant from one training forward to the next, codes of its indices are its output bit for bit, and what
awaits application is in the state_dict. A forward that only recomputes one, in a backward pass, changes nothing. With
torch.distributed every process holds the same state: counts and sums are added up, what is drawn at random comes from
rank 0.

Suffixes: N tokens, K codes, k codes of one chunk, D code dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from ibq.distributed import copy_from_first, sum_over_ranks
from ibq.errors import ConfigError
from ibq.ops import nearest_code
from ibq.ops.precision import at_least_float32

SMOOTHING = 1e-5
CHUNK_ELEMENTS = 2**24


def recomputing() -> bool:
    """True in a backward pass: a forward pass there only recomputes one that has been (gradient checkpointing)."""
    return torch._C._current_graph_task_id() != -1


class Accumulator(nn.Module):
    """State that accumulates: no cast of the module makes its numbers narrower than float32, in which a sum of bfloat16
    would stop to grow at 256 times its addend."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = self._buffers[name]
            if buffer is None or cast is None or cast.dtype == buffer.dtype:
                continue
            if not buffer.is_floating_point() or cast.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(cast.device)
        return self

    def require_wide(self) -> None:
        """ConfigError: its numbers are narrower than float32, by a way that asks no module (FSDP's buffer_dtype)."""
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                raise ConfigError(
                    f"{name} accumulates and is {buffer.dtype}; keep buffers out of mixed precision (FSDP's "
                    f"buffer_dtype=torch.float32)"
                )


def refuse_sharding(embedding: object) -> None:
    """ConfigError: an embedding is sharded whose codes a forward moves; FSDP2 would gather codes for a forward, and
    forget what that has moved."""
    if hasattr(embedding, "full_tensor"):
        raise ConfigError(
            "codes that moving averages or restarts move cannot be sharded; leave the quantizer out, "
            "fully_shard(model, ignored_params=set(quantizer.parameters()))"
        )


class MovingAverage(Accumulator):
    """Codes as the moving average of their features (VQ-VAE, arXiv 1711.00937, appendix; VQ-VAE-2, arXiv 1906.00446).

    counts = decay counts + (1 - decay) n, sums = decay sums + (1 - decay) (sum of the features of each code), code =
    sums / counts with Laplace-smoothed counts. It starts as if each code had been given itself once.
    """

    counts_K: torch.Tensor
    sums_KD: torch.Tensor
    observed: torch.Tensor

    def __init__(self, embedding_KD: torch.Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        codes_KD = at_least_float32(embedding_KD.detach())
        self.register_buffer("counts_K", torch.ones_like(codes_KD[:, 0]))
        self.register_buffer("sums_KD", codes_KD.clone())
        self.register_buffer("observed", torch.tensor(False))

    @torch.no_grad()
    def start_from(self, embedding_KD: torch.Tensor) -> None:
        self.counts_K.fill_(1)
        self.sums_KD.copy_(embedding_KD)
        self.observed.fill_(False)

    @torch.no_grad()
    def apply_to(self, embedding_KD: torch.Tensor) -> None:
        total, K = self.counts_K.sum(), len(self.counts_K)
        smoothed_K = (self.counts_K + SMOOTHING) / (total + K * SMOOTHING) * total
        embedding_KD.copy_(torch.where(self.observed, self.sums_KD / smoothed_K[:, None], embedding_KD))

    @torch.no_grad()
    def observe(self, z_ND: torch.Tensor, indices_N: torch.Tensor) -> None:
        counts_K = torch.zeros_like(self.counts_K).index_add_(0, indices_N, torch.ones_like(z_ND[:, 0]))
        sums_KD = torch.zeros_like(self.sums_KD).index_add_(0, indices_N, z_ND)
        sum_over_ranks(counts_K, sums_KD)
        self.counts_K.lerp_(counts_K, 1 - self.decay)
        self.sums_KD.lerp_(sums_KD, 1 - self.decay)
        self.observed.fill_(True)

    @torch.no_grad()
    def restart(self, weight_K: torch.Tensor, anchors_KD: torch.Tensor) -> None:
        """Codes of weight 1 begin anew at their anchors."""
        self.counts_K.lerp_(torch.ones_like(self.counts_K), weight_K)
        self.sums_KD.lerp_(anchors_KD.to(self.sums_KD.dtype), weight_K[:, None])


class Restart(Accumulator):
    """Moves codes towards anchors, which are features of the last batch: code = (1 - weight) code + weight anchor.

    `usage_K` is the running average of each code's share of the tokens, in units of the uniform share 1/K. A subclass
    says which weights and anchors follow from it. `applied_K` are the weights that the last training forward applied;
    no state, since none outlives a step.
    """

    usage_K: torch.Tensor
    weight_K: torch.Tensor
    anchors_KD: torch.Tensor
    applied_K: torch.Tensor

    def __init__(self, embedding_KD: torch.Tensor, usage_decay: float, first_usage: float) -> None:
        super().__init__()
        self.usage_decay = usage_decay
        codes_KD = at_least_float32(embedding_KD.detach())
        self.register_buffer("usage_K", torch.full_like(codes_KD[:, 0], first_usage))
        self.register_buffer("weight_K", torch.zeros_like(codes_KD[:, 0]))
        self.register_buffer("anchors_KD", torch.zeros_like(codes_KD))
        self.register_buffer("applied_K", torch.zeros_like(codes_KD[:, 0]), persistent=False)

    def choose(self, z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (K,) and anchors (K, D)."""
        raise NotImplementedError

    @torch.no_grad()
    def apply_to(self, embedding_KD: torch.Tensor) -> None:
        move(embedding_KD, self.anchors_KD, self.weight_K)
        self.applied_K.copy_(self.weight_K)

    @torch.no_grad()
    def observe(self, z_ND: torch.Tensor, indices_N: torch.Tensor, codebook_KD: torch.Tensor) -> None:
        counts_K = torch.zeros_like(self.usage_K).index_add_(0, indices_N, torch.ones_like(z_ND[:, 0]))
        sum_over_ranks(counts_K)
        self.usage_K.lerp_(counts_K / counts_K.mean(), 1 - self.usage_decay)
        weight_K, anchors_KD = self.choose(z_ND, codebook_KD)
        self.weight_K.copy_(weight_K)
        self.anchors_KD.copy_(anchors_KD)
        copy_from_first(self.weight_K, self.anchors_KD)


class DeadRestart(Restart):
    """Codes whose usage falls below a threshold are put on random features of the batch (Jukebox, arXiv 2005.00341),
    each on another one.

    Usage starts at 1, the uniform share, also after a restart: a code without tokens has log(threshold) /
    log(usage_decay) steps. Where more codes are dead than there are features, the others wait for the next batch.
    """

    def __init__(self, embedding_KD: torch.Tensor, usage_decay: float, threshold: float) -> None:
        super().__init__(embedding_KD, usage_decay, first_usage=1.0)
        self.threshold = threshold

    def choose(self, z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        N = len(z_ND)
        dead_K = self.usage_K < self.threshold
        turn_K = dead_K.cumsum(0) - 1
        rows_N = torch.randperm(N, device=z_ND.device)
        return (dead_K & (turn_K < N)).to(z_ND.dtype), z_ND[rows_N[turn_K.clamp(0, N - 1)]]

    @torch.no_grad()
    def apply_to(self, embedding_KD: torch.Tensor) -> None:
        super().apply_to(embedding_KD)
        self.usage_K.lerp_(torch.ones_like(self.usage_K), self.weight_K)


class OnlineClustering(Restart):
    """CVQ-VAE (arXiv 2307.15139): every code moves towards an anchor, the more the less it is used.

    Weight exp(-usage * 10 / (1 - usage_decay) - 1e-3), with usage in uniform shares (the paper's N_k K). Of the paper's
    anchor rules (random, closest, probabilistic random) it is the probabilistic one: the anchor of a code is a feature
    drawn with probability softmax(-|z - c|^2) over the batch, by Euclidean distance (of unit vectors where the
    quantizer's distance is cosine). The paper's contrastive loss is left out. Usage starts at 0.
    """

    def __init__(self, embedding_KD: torch.Tensor, usage_decay: float) -> None:
        super().__init__(embedding_KD, usage_decay, first_usage=0.0)

    def choose(self, z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norms_N = z_ND.square().sum(1)
        rows = [
            (2 * codes_kD @ z_ND.T - norms_N).softmax(1).multinomial(1).squeeze(1)
            for codes_kD in codebook_KD.split(math.ceil(CHUNK_ELEMENTS / len(z_ND)))
        ]
        return torch.exp(-self.usage_K * 10 / (1 - self.usage_decay) - 1e-3), z_ND[torch.cat(rows)]


class StepCount(Accumulator):
    """Finished optimizer steps, for schedules: as `set` says them or, until it does, one for every training forward."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.told = False
        """True once `set` has been called."""

    def set(self, steps: int) -> None:
        self.steps.fill_(steps)
        self.told = True

    @property
    def now(self) -> torch.Tensor:
        """Finished steps before this forward, or before the one that this forward recomputes."""
        return self.steps - 1 if self.training and not self.told and recomputing() else self.steps

    def after_forward(self) -> None:
        if not self.told and not recomputing():
            self.steps += 1


@torch.no_grad()
def move(codes_KD: torch.Tensor, targets_KD: torch.Tensor, weight_K: torch.Tensor) -> None:
    """Move codes towards targets by a share each, in place; in at least float32 whatever the codes are."""
    targets_KD = at_least_float32(targets_KD)
    codes_KD.copy_(torch.lerp(codes_KD.to(targets_KD.dtype), targets_KD, weight_K[:, None].to(targets_KD.dtype)))


@torch.no_grad()
def kmeans(features_MD: torch.Tensor, K: int, generator: torch.Generator, iterations: int = 10) -> torch.Tensor:
    """Centers (K, D) after some iterations from K distinct features.

    A center that no feature is nearest to moves to one of the features that are worst represented.

    Args:
        features_MD: what to cluster, M >= K.
        K: number of centers.
        generator: CPU generator of the first centers.
        iterations: assignments and means.
    """
    features_MD = at_least_float32(features_MD)
    rows = torch.randperm(len(features_MD), generator=generator)[:K]
    centers_KD = features_MD[rows.to(features_MD.device)]
    for _ in range(iterations):
        nearest_M = nearest_code(features_MD, centers_KD)
        counts_K = torch.bincount(nearest_M, minlength=K)
        sums_KD = torch.zeros_like(centers_KD).index_add_(0, nearest_M, features_MD)
        centers_KD = sums_KD / counts_K.clamp(min=1)[:, None]
        empty_K = counts_K == 0
        error_M = (features_MD - centers_KD[nearest_M]).square().sum(1)
        centers_KD[empty_K] = features_MD[error_M.topk(int(empty_K.sum())).indices]
    return centers_KD
