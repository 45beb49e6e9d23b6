"""FID, KID, precision and recall against their definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch

from ibq.metrics.distances import distances


def test_statistics_equal_their_definitions_on_correlated_features() -> None:
    """FID with scipy's matrix root, KID as unbiased squared MMD of the same subsets, precision and recall by balls to
    the third neighbour; features as of a ReLU network, with a falling spectrum."""
    n, features = 300, 40
    mixing_FF = torch.linspace(0, -5, features).exp()[:, None] * torch.randn(features, features)
    x_NF = (torch.randn(n, features) @ mixing_FF + 0.3).relu()
    y_NF = (torch.randn(n, features) @ mixing_FF + 0.4).relu()
    metrics, absent = distances(x_NF, torch.randn(n, 10), y_NF)
    assert absent == {}

    x, y = x_NF.double().numpy(), y_NF.double().numpy()
    sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_x @ sigma_y).real
    fid = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sigma_x + sigma_y - 2 * root)
    assert metrics["fid"] == pytest.approx(fid, rel=1e-6)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / features + 1) ** 3

    generator, m, estimates = np.random.RandomState(2020), n // 10, []  # torch-fidelity's seed
    for _ in range(100):
        a, b = (z[generator.choice(n, m, replace=False)] for z in (x, y))
        within = sum((kernel(z, z).sum() - np.trace(kernel(z, z))) / (m * (m - 1)) for z in (a, b))
        estimates.append(within - 2 * kernel(a, b).mean())
    assert metrics["kid"] == pytest.approx(np.mean(estimates), rel=1e-6)

    def inside(points: np.ndarray, balls: np.ndarray) -> float:
        radii = np.sort(scipy.spatial.distance.cdist(balls, balls), axis=1)[:, 3]
        return float((scipy.spatial.distance.cdist(points, balls) <= radii).any(1).mean())

    assert (metrics["precision"], metrics["recall"]) == pytest.approx((inside(x, y), inside(y, x)), rel=1e-6)
    assert 0.1 < metrics["recall"] < 1
