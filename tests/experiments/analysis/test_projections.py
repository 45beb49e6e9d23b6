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
