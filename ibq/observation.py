"""What is seen of a training run while it goes on: windows over its tokens and losses, geometry of a step, snapshots for figures.

Suffixes: B images, D code dimension, H W token grid, N tokens, K codes.
"""

from __future__ import annotations

import torch

from ibq.analysis import code_gap, gradient_reach, logit_statistics
from ibq.data import ImageSource
from ibq.distributed import is_writer, sum_over_ranks, world_size
from ibq.evaluation import measuring
from ibq.models.tokenizer import Tokenizer

SNAPSHOT_CODES, SNAPSHOT_FEATURES = 1024, 2048
LEAST_TOKENS, LOGITS = 64, 2**21
"""Of a batch the log looks at the logits of so many tokens: 2,048 at 1,024 codes, 64 at 2^18."""
CODEBOOK_PARAMETER = "quantize.embedding"
GAPS = ("gap", "gap_used", "gap_dead")
GAP_PROTOCOL = (
    f"raw weights; at most {SNAPSHOT_FEATURES} features of the first test images, {SNAPSHOT_CODES} codes; "
    "in use: counted in training since the last snapshot"
)
"""The gaps are the last snapshot's, and so of other weights and images than what the evaluation measures."""


class TokenWindow:
    """Code counts of the training tokens since the last reset.

    Each process counts its own tokens, so that no step waits for another: the truth is the sum over processes, `total`. That sum goes into
    a checkpoint, and `restore` gives it to rank 0 alone, so that it stays the sum whatever number of processes goes on.
    """

    def __init__(self, codebook_size: int, device: torch.device) -> None:
        self.counts_K = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def add(self, indices: torch.Tensor) -> None:
        self.counts_K += torch.bincount(indices.flatten(), minlength=len(self.counts_K))

    def total(self) -> torch.Tensor:
        """The counts of all processes, a new tensor (K,); a collective."""
        return _total(self.counts_K)

    def restore(self, counts_K: torch.Tensor) -> None:
        """Go on from what `total` was."""
        self.counts_K = _of_first(counts_K.to(self.counts_K.device))

    def reset(self) -> None:
        self.counts_K = torch.zeros_like(self.counts_K)


class LossWindow:
    """Mean of a loss over the batches of all processes since the last reset, gathered on its device; as `TokenWindow` otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.sum_and_count = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor) -> None:
        share = 1 / world_size()  # of a batch: so that each step counts the same where another number of processes goes on
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


def take_snapshot(tokenizer: Tokenizer, probe: ImageSource, window: TokenWindow, device: torch.device) -> dict[str, torch.Tensor]:
    """All that a figure needs later of this moment of training (raw weights); with several processes a collective, the same on each.

    Returns:
        codes (at most 1,024 of K, with code_indices), features of the first images of the probe split (at most 2,048 tokens) in the space
        of the codes, counts of the training tokens since the last snapshot, code_norms; and gap, gap_used, gap_dead: `code_gap` of these
        features and codes, in use if counted since the last snapshot, each absent where there are no such codes or it would not be finite;
        before anything is counted, gap alone.
    """
    f = tokenizer.config.model.downsampling
    counts_K = window.total()
    n_images = max(1, min(len(probe), SNAPSHOT_FEATURES // (tokenizer.config.data.resolution // f) ** 2))
    with measuring(tokenizer):
        codebook_KD = tokenizer.quantize.codebook
        z_BDHW = tokenizer.quantize.to_code_space(tokenizer.features(probe.batch(torch.arange(n_images), device)))
        features_ND = z_BDHW.permute(0, 2, 3, 1).flatten(0, 2)[:SNAPSHOT_FEATURES]
        chosen = torch.randperm(len(codebook_KD), generator=torch.Generator().manual_seed(0))[:SNAPSHOT_CODES].sort().values
        codes_kD = codebook_KD[chosen.to(device)]
        used_k = counts_K[chosen.to(device)] > 0 if counts_K.any() else None
        gaps = code_gap(features_ND, codes_kD, used_k)
        return {
            "codes": codes_kD,
            "code_indices": chosen,
            "features": features_ND,
            "counts": counts_K,
            "code_norms": codebook_KD.norm(dim=1),
        } | {name: torch.tensor(gap, dtype=torch.float64) for name, gap in gaps.items()}


@torch.no_grad()
def geometry(tokenizer: Tokenizer, z_BDHW: torch.Tensor, z_q_BDHW: torch.Tensor) -> dict[str, float]:
    """Of the last step: gradient reach (where codes have a gradient), and, in the space of the codes, logits of its first tokens, norms and
    relative quantization error. Features and error are the step's own, of this process;
    logits and the norm of the codes are of codes as its update has left them."""
    parameter = dict(tokenizer.named_parameters()).get(CODEBOOK_PARAMETER)
    reach = {} if parameter is None or parameter.grad is None else gradient_reach(parameter.grad)
    n_tokens = max(LEAST_TOKENS, LOGITS // tokenizer.config.quantizer.codebook_size)
    z_nD = z_BDHW.float().permute(0, 2, 3, 1).flatten(0, 2)[:n_tokens]
    logits = logit_statistics(tokenizer.quantize.logits(z_nD))
    z_BDHW = tokenizer.quantize.to_code_space(z_BDHW.float())
    variance = z_BDHW.var(dim=(0, 2, 3), correction=0).sum()
    norms = {"feature_norm": z_BDHW.norm(dim=1).mean().item(), "code_norm": tokenizer.quantize.codebook.norm(dim=1).mean().item()}
    error = (z_BDHW - z_q_BDHW).square().sum(1).mean() / variance.clamp_min(1e-30)
    return reach | logits | norms | {"quantization_error": error.item()}
