"""Log of a training run: windows over its tokens and losses, geometry of a step, throughput, snapshots for figures.

Suffixes: B images, D code dimension, H W token grid, N tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ibq.data import ImageSource
from ibq.distributed import is_writer, sum_over_ranks, world_size
from ibq.evaluation.tokenizer import measuring
from ibq.metrics.codebook import code_gap, gradient_reach, logit_statistics
from ibq.metrics.dimension import Moments, dimension_metrics
from ibq.metrics.usage import counts_of, part_counts_of, uncountable
from ibq.models.tokenizer import Tokenizer

SNAPSHOT_CODES, SNAPSHOT_FEATURES = 1024, 2048
LEAST_TOKENS, LOGITS = 64, 2**21
"""Of a batch the log looks at the logits of so many tokens: 2,048 at 1,024 codes, 64 at 2^18."""
DIMENSION_CODES = 4096
"""Codes of each kind whose effective dimension is looked at: enough for D = 256, and their covariance costs what the
gap does."""
CODEBOOK_PARAMETER = "quantize.embedding"
GAPS = ("gap", "gap_angular", "gap_used", "gap_dead")
GAP_PROTOCOL = (
    f"raw weights; at most {SNAPSHOT_FEATURES} features of the first test images, {SNAPSHOT_CODES} codes; "
    "in use: counted in training since the last snapshot"
)
"""The gaps are the last snapshot's, and so of other weights and images than what the evaluation measures."""


class TokenWindow:
    """Code counts of the training tokens since the last reset; none where the codebook is `uncountable`.

    Each process counts its own tokens, so that no step waits for another: the truth is the sum over processes, `total`.
    That sum goes into a checkpoint, and `restore` gives it to rank 0 alone, so that it stays the sum whatever number of
    processes goes on.
    """

    def __init__(self, codebook_size: int, device: torch.device) -> None:
        self.codebook_size = codebook_size
        self.counts_K = self.counts_of(torch.zeros(0, dtype=torch.int64, device=device))

    def counts_of(self, indices: torch.Tensor) -> torch.Tensor:
        return counts_of(indices, self.codebook_size)

    def add(self, indices: torch.Tensor) -> None:
        self.counts_K += self.counts_of(indices)

    def total(self) -> torch.Tensor:
        """The counts of all processes, a new tensor (K,); a collective."""
        return _total(self.counts_K)

    def restore(self, counts_K: torch.Tensor) -> None:
        """Go on from what `total` was."""
        self.counts_K = _of_first(counts_K.to(self.counts_K.device))

    def reset(self) -> None:
        self.counts_K = torch.zeros_like(self.counts_K)


class PartWindow(TokenWindow):
    """As `TokenWindow`, of the codes of each part, one part after the other; none where codes have no parts."""

    def __init__(self, part_sizes: Sequence[int], device: torch.device) -> None:
        self.part_sizes = part_sizes
        super().__init__(sum(part_sizes), device)

    def counts_of(self, indices: torch.Tensor) -> torch.Tensor:
        return part_counts_of(indices, self.part_sizes)


class LossWindow:
    """Mean of a loss over the batches of all processes since the last reset, gathered on its device; as `TokenWindow`
    otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.sum_and_count = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor) -> None:
        share = (
            1 / world_size()
        )  # of a batch: so that each step counts the same where another number of processes goes on
        self.sum_and_count[0] += share * loss.detach().double()
        self.sum_and_count[1] += share

    def total(self) -> torch.Tensor:
        """Sum and count of all processes, a new tensor (2,); a collective."""
        return _total(self.sum_and_count)

    def restore(self, sum_and_count: torch.Tensor) -> None:
        """Go on from what `total` was."""
        self.sum_and_count = _of_first(sum_and_count.to(self.sum_and_count.device))

    def mean(self) -> float:
        """A collective."""
        total, count = self.total().tolist()
        return total / count

    def reset(self) -> None:
        self.sum_and_count = torch.zeros_like(self.sum_and_count)


def _total(of_this_process: torch.Tensor) -> torch.Tensor:
    sum_over_ranks(total := of_this_process.clone())
    return total


def _of_first(total: torch.Tensor) -> torch.Tensor:
    return total.clone() if is_writer() else torch.zeros_like(total)


def take_snapshot(
    tokenizer: Tokenizer, probe: ImageSource, counts_K: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """All that a figure needs later of this moment of training (raw weights).

    Args:
        tokenizer: on the device.
        probe: images whose first ones give the features.
        counts_K: training tokens of each code since the snapshot before; codes with one are in use.
        device: of tokenizer and counts.

    Returns:
        codes (at most 1,024 of K, with code_indices), features (at most 2,048 tokens) in the space of the codes,
        counts, code_norms; and
        gap, gap_angular, gap_used, gap_dead: `code_gap` of these features and codes, each absent where there are no
        such codes or it would not be finite; before anything is counted, the first two alone. `dimension_metrics` of
        the features and of at most 4,096 codes stand beside.
    """
    f = tokenizer.config.model.downsampling
    n_images = max(1, min(len(probe), SNAPSHOT_FEATURES // (tokenizer.config.data.resolution // f) ** 2))
    with measuring(tokenizer):
        z_BDHW = tokenizer.quantize.to_code_space(tokenizer.features(probe.batch(torch.arange(n_images), device)))
        features_ND = z_BDHW.permute(0, 2, 3, 1).flatten(0, 2)[:SNAPSHOT_FEATURES]
        chosen = watched_codes(tokenizer.config.quantizer.codebook_size)
        codes_kD = tokenizer.quantize.codes_of(chosen.to(device))
        gaps = code_gap(features_ND, codes_kD, _used(counts_K, chosen))
        codebook_KD = tokenizer.quantize.codebook if len(counts_K) else None
        numbers = gaps | _dimensions(features_ND, codebook_KD, counts_K)
        # of all codes, or of the watched ones where they are too many
        normed_KD = codes_kD if codebook_KD is None else codebook_KD
        return {
            "codes": codes_kD,
            "code_indices": chosen,
            "features": features_ND,
            "counts": counts_K,
            "code_norms": normed_KD.norm(dim=1),
        } | {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def watched_codes(codebook_size: int) -> torch.Tensor:
    """Indices of the codes that snapshots and gaps look at: all, or 1,024 drawn once for each K."""
    if uncountable(codebook_size):
        return torch.randint(codebook_size, (SNAPSHOT_CODES,), generator=torch.Generator().manual_seed(0)).unique()
    return torch.randperm(codebook_size, generator=torch.Generator().manual_seed(0))[:SNAPSHOT_CODES].sort().values


def _used(counts_K: torch.Tensor, chosen_k: torch.Tensor) -> torch.Tensor | None:
    """True for those of the chosen codes that have a token (k,), None before any is counted."""
    return counts_K[chosen_k.to(counts_K.device)] > 0 if counts_K.any() else None


def _dimensions(
    features_ND: torch.Tensor, codebook_KD: torch.Tensor | None, counts_K: torch.Tensor
) -> dict[str, float]:
    """`dimension_metrics` of at most DIMENSION_CODES codes; before any token is counted none is in use."""
    features = Moments(features_ND.shape[1], features_ND.device)
    features.update(features_ND)
    return dimension_metrics(features, codebook_KD, counts_K, DIMENSION_CODES)


@torch.no_grad()
def geometry(
    tokenizer: Tokenizer, z_BDHW: torch.Tensor, z_q_BDHW: torch.Tensor, counts_K: torch.Tensor
) -> dict[str, float]:
    """Of the last step: gradient reach (where codes have a gradient), and, in the space of the codes, logits of its
    first tokens, norms, relative quantization error, the gap between its first features and the codes, and the
    effective dimension of both. Features and error are the step's own, of this process; logits, gap, dimensions and
    norm of the codes are of codes as its update has left them. K, D and, where the gradient goes through a softmax, the
    logits' factor stand beside, so that a line explains itself. Of a codebook that is `uncountable` there are no logits
    and no dimensions of codes, and the norm is that of the watched codes.

    Args:
        counts_K: training tokens of each code since the log step before, which tell codes in use for the gap and the
            dimension.
    """
    parameter = dict(tokenizer.named_parameters()).get(CODEBOOK_PARAMETER)
    reach = {} if parameter is None or parameter.grad is None else gradient_reach(parameter.grad)
    quantizer, K, D = tokenizer.quantize, tokenizer.config.quantizer.codebook_size, tokenizer.config.quantizer.code_dim
    chosen, logits = watched_codes(K).to(z_BDHW.device), {}
    if uncountable(K):
        codebook_KD = codes_kD = quantizer.codes_of(chosen)
    else:
        n_tokens = max(LEAST_TOKENS, LOGITS // K)
        logits = logit_statistics(quantizer.logits(z_BDHW.float().permute(0, 2, 3, 1).flatten(0, 2)[:n_tokens]))
        codebook_KD = quantizer.codebook
        codes_kD = codebook_KD[chosen]
    z_BDHW = quantizer.to_code_space(z_BDHW.float())
    variance = z_BDHW.var(dim=(0, 2, 3), correction=0).sum()
    norms = {"feature_norm": z_BDHW.norm(dim=1).mean().item(), "code_norm": codebook_KD.norm(dim=1).mean().item()}
    error = (z_BDHW - z_q_BDHW).square().sum(1).mean() / variance.clamp_min(1e-30)
    features_nD = z_BDHW.permute(0, 2, 3, 1).flatten(0, 2)[:SNAPSHOT_FEATURES]
    gaps = code_gap(features_nD, codes_kD, _used(counts_K, chosen))
    dimensions = _dimensions(features_nD, None if uncountable(K) else codebook_KD, counts_K)
    scale = {} if quantizer.logit_scale is None else {"logit_scale": quantizer.logit_scale}
    return (
        reach
        | logits
        | norms
        | {"quantization_error": error.item()}
        | gaps
        | dimensions
        | {"codebook_size": K, "code_dim": D}
        | scale
    )


@torch.no_grad()
def feature_dimensions(tokenizer: Tokenizer, z_BDHW: torch.Tensor) -> dict[str, float]:
    """Effective dimension of the last step's first features, as `geometry` has it: what there is to say before the
    quantizer begins."""
    z_BDHW = tokenizer.quantize.to_code_space(z_BDHW.float())
    features_nD = z_BDHW.permute(0, 2, 3, 1).flatten(0, 2)[:SNAPSHOT_FEATURES]
    return _dimensions(features_nD, None, torch.zeros(0))


class EntropyPull:
    """Gradient of the entropy penalty at the features, against all other terms together, in one backward pass.

    To be made between a forward pass and its backward pass, and asked after it; without an entropy penalty it has
    nothing to report.

    Args:
        z_BDHW: features that the quantizer was given, with a graph.
        terms: the quantizer's raw loss terms.
        weights: of all terms of the objective.
    """

    def __init__(
        self, z_BDHW: torch.Tensor, terms: Mapping[str, torch.Tensor], weights: Mapping[str, float | torch.Tensor]
    ) -> None:
        self.z_BDHW, entropies = z_BDHW, [weights[name] * term for name, term in terms.items() if "entropy" in name]
        self.of_entropy_BDHW = None
        if entropies:
            (self.of_entropy_BDHW,) = torch.autograd.grad(torch.stack(entropies).sum(), z_BDHW, retain_graph=True)
            z_BDHW.retain_grad()  # only now: it would have kept the entropies' gradient too

    def report(self, loss_scale: float) -> dict[str, float]:
        """entropy_pull: norm of the gradient that the weighted entropy terms give the features, over that of all other
        terms.

        Args:
            loss_scale: what the loss was multiplied by in the backward pass.
        """
        if self.of_entropy_BDHW is None or self.z_BDHW.grad is None:
            return {}
        entropy_BDHW = self.of_entropy_BDHW.float()
        others = (self.z_BDHW.grad.float() / loss_scale - entropy_BDHW).norm()
        return {"entropy_pull": float(entropy_BDHW.norm() / others.clamp_min(1e-30))}


class Progress(Protocol):
    """Progress of a training state: finished updates, and the seconds that they took."""

    step: int
    seconds: float


class Throughput:
    """Images a second, and the share of time spent waiting for data, since the last report."""

    def __init__(self, state: Progress, batch_size: int) -> None:
        self.state, self.batch_size = state, batch_size
        self.step, self.seconds, self.waited_s = state.step, state.seconds, 0.0

    def report(self, waited_s: float) -> dict[str, float]:
        """images_per_s, over all processes, and data_wait_pct, the share of that time in which this process waited for
        pixels.

        Args:
            waited_s: seconds of waiting since the start.
        """
        images, seconds = (self.state.step - self.step) * self.batch_size, self.state.seconds - self.seconds
        waited, self.waited_s = waited_s - self.waited_s, waited_s
        self.step, self.seconds = self.state.step, self.state.seconds
        return {"images_per_s": images / seconds, "data_wait_pct": 100 * waited / seconds}
