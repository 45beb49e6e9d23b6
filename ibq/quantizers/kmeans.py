"""Lloyd's k-means, as an initialisation of codebooks. Suffixes: M features, K centers, D code dimension."""

from __future__ import annotations

import torch

from ibq.ops import nearest_code


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
