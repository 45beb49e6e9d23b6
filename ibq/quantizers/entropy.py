"""The entropy penalty (MAGVIT-v2, arXiv 2310.05737; docs/method.md section 4): E_n[H(p_n)] - H(mean_n p_n), p =
softmax(logits / tau).

The first part makes assignments decisive, the second spreads them over the codebook. The mean runs over the tokens at
hand, so its entropy
cannot exceed the logarithm of their number when assignments are hard: tokens per mean are a hidden hyper-parameter.
Suffixes: N tokens, K codes, D code dimension, E = D + 1.
"""

from __future__ import annotations

import torch

from ibq.ops.precision import coarse_center


def entropy_terms(
    sample_entropy: torch.Tensor | None, codebook_entropy: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The two raw terms of the penalty, or none where the operator was asked for none; the config weighs the second
    negatively."""
    if sample_entropy is None or codebook_entropy is None:
        return {}
    return {"sample_entropy": sample_entropy, "codebook_entropy": codebook_entropy}


def euclidean_as_dot(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (N, E) and keys (K, E) whose dot product is -|z - c|^2 plus a constant of the row: one more coordinate
    carries -|c|^2.

    That constant changes neither softmax nor argmax, so dot-product operators serve Euclidean quantizers, gradients
    included.
    Both are shifted by about the mean code first, which changes no distance: far from the origin the squares would
        cancel.
    """
    center_D = coarse_center(codebook_KD.detach())
    z_ND, codebook_KD = z_ND - center_D, codebook_KD - center_D
    query_NE = torch.cat([2 * z_ND, torch.ones_like(z_ND[:, :1])], 1)
    key_KE = torch.cat([codebook_KD, -codebook_KD.square().sum(1, keepdim=True)], 1)
    return query_NE, key_KE
