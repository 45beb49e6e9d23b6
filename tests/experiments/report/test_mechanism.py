"""The numbers behind notebook 00: what one step of each method moves."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from experiments.report.figures import gradient_flow


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vq_moves_the_selected_codes_alone_and_ibq_all(seed: int) -> None:
    vq, ibq = (gradient_flow.one_step(method, seed) for method in gradient_flow.METHODS)
    assert torch.equal(vq.codes_KD, ibq.codes_KD)
    assert torch.equal(vq.z_ND, ibq.z_ND)
    moved_K = (vq.gradient_KD != 0).any(1)
    assert set(moved_K.nonzero().flatten().tolist()) == set(vq.indices_N.tolist())
    assert (ibq.gradient_KD != 0).any(1).all()
    table = gradient_flow.reach_table(seed).set_index("method")
    assert (
        table.loc["VQ", "with a gradient"]
        == table.loc["VQ", "selected by a feature"]
        < table.loc["IBQ", "with a gradient"]
        == 64
    )


@pytest.mark.parametrize(
    "draw", [gradient_flow.gradient_arrows, gradient_flow.one_feature, gradient_flow.reach_by_dimension]
)
def test_pictures_are_drawn_and_not_empty(draw: object) -> None:
    figure = draw(seed=0)
    figure.canvas.draw()
    assert all(axis.has_data() for axis in figure.axes)
    plt.close(figure)
