"""Arms that stand for a recipe: BSQ's released loss, and equally sharp entropy penalties of VQ and IBQ, against
formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from experiments.ablations.recipe_parts import EQUALLY_SHARP
from experiments.study import Study
from ibq.config import TrainConfig
from ibq.losses import weighted_sum
from ibq.quantizers import build_quantizer


def config_of(ablation: str, arm: str) -> TrainConfig:
    study = Study("quick", (ablation,), seeds=1)
    return next(cell.config for cell in (*study.cells, *study.waiting) if cell.arm.name == arm)


def released_bsq_loss(z_ND: torch.Tensor, weight: float, multiplier: float, steps: int, step: int) -> torch.Tensor:
    """Of zhaoyue-zephyrus/bsq-vit: group_size 1, inv_temperature 1, beta 0, analytical sample entropy; the weight falls
    from `multiplier` times itself over the first steps."""
    u_ND = z_ND / z_ND.norm(dim=1, keepdim=True)
    p_ND = torch.sigmoid(4 * u_ND / z_ND.shape[1] ** 0.5)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())

    share = min(step, steps) / steps
    penalty = entropy(p_ND).sum(1).mean() - entropy(p_ND.mean(0)).sum()
    return weight * (share + multiplier * (1 - share)) * penalty


@pytest.mark.parametrize("step", [0, 37, 100, 1000])
def test_bsq_as_released_has_the_released_loss_and_gradient(step: int) -> None:
    config = config_of("quantizers", "bsq_released").quantizer
    assert (config.method, config.commitment_weight, config.entropy_temperature) == ("bsq", 0.0, 1.0)  # type: ignore[attr-defined]
    quantizer = build_quantizer(config.model_dump()).train()
    quantizer.set_step(step)
    z_ND = torch.randn(400, config.code_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses, gradients = [], []
    for ours in (True, False):
        z = z_ND.clone().requires_grad_()
        if ours:
            z_BDHW = z.T.reshape(1, config.code_dim, 20, 20)
            loss = weighted_sum(quantizer(z_BDHW).losses, config.loss_weights)
        else:
            loss = released_bsq_loss(z, 0.1, 3.0, 100, step)
        (gradient,) = torch.autograd.grad(loss, z)
        losses.append(loss.item())
        gradients.append(gradient)
    share = min(step, 100) / 100
    of_epsilon = 0.1 * (share + 3 * (1 - share)) * 2 * config.code_dim * 1e-5
    # the constant in the logarithm of the codebook's entropy is 1e-5 here and 1e-8 there; nothing else is left
    assert losses[0] - losses[1] == pytest.approx(of_epsilon, abs=1e-9)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


def test_vq_at_twice_the_temperature_is_as_sharp_as_ibq() -> None:
    """With codes of one length, whose squares softmax does not see, both penalties are the same; at equal temperature
    they are not."""
    softer, ibq = (config_of("recipe_parts", arm).quantizer for arm in EQUALLY_SHARP)
    fair = config_of("vq_vs_ibq", "vq_fair").quantizer
    assert softer.entropy_temperature == 2 * ibq.entropy_temperature == 2 * fair.entropy_temperature == 0.02  # type: ignore[attr-defined]
    assert {k for k, v in softer.model_dump().items() if v != fair.model_dump()[k]} == {"entropy_temperature"}
    generator = torch.Generator().manual_seed(0)
    codes_KD = F.normalize(torch.randn(50, 8, generator=generator, dtype=torch.float64), dim=1)
    z_BDHW = 0.05 * torch.randn(1, 8, 10, 10, generator=generator, dtype=torch.float64)
    found = {}
    for name, config in (("softer", softer), ("fair", fair), ("ibq", ibq)):
        fields = config.model_dump() | {"codebook_size": 50, "code_dim": 8, "codebook_init": "normal"}
        quantizer = build_quantizer(fields).double()
        with torch.no_grad():
            quantizer.embedding.copy_(codes_KD)
        terms = quantizer(z_BDHW).losses
        found[name] = [terms[term].item() for term in ("sample_entropy", "codebook_entropy")]
    p_NK = (z_BDHW.flatten(2)[0].T @ codes_KD.T / 0.01).softmax(1)
    mean_K = p_NK.mean(0)
    expected = [-(p_NK * p_NK.log()).sum(1).mean().item(), -(mean_K * (mean_K + 1e-5).log()).sum().item()]
    assert found["ibq"] == pytest.approx(expected, abs=1e-12)
    assert found["softer"] == pytest.approx(expected, abs=1e-12)
    assert abs(found["fair"][0] - expected[0]) > 0.1
    assert expected[0] < math.log(50)
