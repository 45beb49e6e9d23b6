from __future__ import annotations

import numpy as np
import torch

from experiments.analysis.projections import reduce


def test_the_plane_is_that_of_a_principal_component_analysis() -> None:
    from sklearn.decomposition import PCA

    points_ND = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 3, 1, 1, 1, 0.5])
    expected_N2 = PCA(2, svd_solver="full").fit_transform(points_ND.numpy())
    ours_N2 = reduce(points_ND.numpy(), "pca")
    np.testing.assert_allclose(np.abs(ours_N2), np.abs(expected_N2), atol=1e-5)
    assert reduce(points_ND[:, :1].numpy(), "pca").shape == (200, 2)


def test_points_that_left_the_finite_numbers_have_no_place() -> None:
    """As in the snapshots of a run that was lost: of the others there is a map, unless they are a handful."""
    points_ND = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    points_ND[3, 1], points_ND[7] = np.inf, np.nan
    plane_N2 = reduce(points_ND, "pca")
    assert np.flatnonzero(np.isnan(plane_N2).any(axis=1)).tolist() == [3, 7]
    points_ND[12:] = np.nan
    assert np.isnan(reduce(points_ND, "pca")).all()
