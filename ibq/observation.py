"""What is seen of a training run while it goes on: windows over its tokens and losses, geometry of a step, snapshots for figures.

Suffixes: B images, D code dimension, H W token grid, N tokens, K codes.
"""

from __future__ import annotations

import torch

from ibq.analysis import code_gap, gradient_reach, logit_statistics
from ibq.data import ImageSource
from ibq.evaluation import evaluating
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
    """Code counts of the training tokens since the last reset."""

    def __init__(self, codebook_size: int, device: torch.device) -> None:
        self.counts_K = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def add(self, indices: torch.Tensor) -> None:
        self.counts_K += torch.bincount(indices.flatten(), minlength=len(self.counts_K))

    def reset(self) -> None:
        self.counts_K = torch.zeros_like(self.counts_K)


class LossWindow:
    """Mean of a loss over the batches since the last reset, gathered on its device."""

    def __init__(self, device: torch.device) -> None:
        self.sum_and_count = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor) -> None:
        self.sum_and_count[0] += loss.detach()
        self.sum_and_count[1] += 1

    def mean(self) -> float:
        total, count = self.sum_and_count.tolist()
        return total / count

    def reset(self) -> None:
        self.sum_and_count = torch.zeros_like(self.sum_and_count)


def take_snapshot(tokenizer: Tokenizer, probe: ImageSource, window: TokenWindow, device: torch.device) -> dict[str, torch.Tensor]:
    """All that a figure needs later of this moment of training (raw weights).

    Returns:
        codes (at most 1,024 of K, with code_indices), features of the first images of the probe split (at most 2,048 tokens) in the space
        of the codes, counts of the training tokens since the last snapshot, code_norms; and gap, gap_used, gap_dead: `code_gap` of these
        features and codes, in use if counted since the last snapshot, each absent where there are no such codes or it would not be finite;
        before anything is counted, gap alone.
    """
    f = tokenizer.config.model.downsampling
    n_images = max(1, min(len(probe), SNAPSHOT_FEATURES // (tokenizer.config.data.resolution // f) ** 2))
    with evaluating(tokenizer):
        codebook_KD = tokenizer.quantize.codebook
        z_BDHW = tokenizer.quantize.to_code_space(tokenizer.features(probe.batch(torch.arange(n_images), device)))
        features_ND = z_BDHW.permute(0, 2, 3, 1).flatten(0, 2)[:SNAPSHOT_FEATURES]
        chosen = torch.randperm(len(codebook_KD), generator=torch.Generator().manual_seed(0))[:SNAPSHOT_CODES].sort().values
        codes_kD = codebook_KD[chosen.to(device)]
        used_k = window.counts_K[chosen.to(device)] > 0 if window.counts_K.any() else None
        gaps = code_gap(features_ND, codes_kD, used_k)
        return {
            "codes": codes_kD,
            "code_indices": chosen,
            "features": features_ND,
            "counts": window.counts_K,
            "code_norms": codebook_KD.norm(dim=1),
        } | {name: torch.tensor(gap, dtype=torch.float64) for name, gap in gaps.items()}


@torch.no_grad()
def geometry(tokenizer: Tokenizer, z_BDHW: torch.Tensor, z_q_BDHW: torch.Tensor) -> dict[str, float]:
    """Of the last step: gradient reach (where codes have a gradient), and, in the space of the codes, logits of its first tokens, norms and
    relative quantization error. Features and error are the step's own; logits and the norm of the codes are of codes as its update has
    left them."""
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
