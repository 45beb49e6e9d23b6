"""The terms of the objective against their formulas, and the one sum."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import run_processes
from torch import nn

import ibq.losses as losses
from ibq.config import TrainConfig
from ibq.distributed import Processes, barrier
from ibq.errors import DataError
from ibq.losses import (
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    discriminator_terms,
    discriminator_weights,
    frozen,
    generator_loss,
    lecam_loss,
    loss_weights,
    perceptual_loss,
    pixel_loss,
    weighted,
    weighted_sum,
)
from ibq.metrics.perceptual import LPIPS, lpips_network
from ibq.pretrained.fashion_cnn import load_fashion_cnn

GAN = {"loss.adversarial.weight": 0.1}


def test_pixel_losses_are_the_element_means() -> None:
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pixel_loss(x, y, "l1"), torch.nn.functional.l1_loss(y, x))
    torch.testing.assert_close(pixel_loss(x, y, "l2"), torch.nn.functional.mse_loss(y, x))
    assert pixel_loss(x, x, "l1") == pixel_loss(x, x, "l2") == 0


# --- The adversarial game ---------------------------------------------------------------------------------------------


def numbers(logits: torch.Tensor) -> list[float]:
    return [float(value) for value in logits.flatten()]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_discriminators_losses_are_their_formulas() -> None:
    real, fake = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    hinge = 0.5 * (sum(max(0, 1 - r) for r in numbers(real)) + sum(max(0, 1 + f) for f in numbers(fake))) / 48
    vanilla = 0.5 * (sum(softplus(-r) for r in numbers(real)) + sum(softplus(f) for f in numbers(fake))) / 48
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(hinge)
    assert discriminator_loss(real, fake, "vanilla").item() == pytest.approx(vanilla)
    assert discriminator_loss(2 + real.abs(), -2 - fake.abs(), "hinge") == 0, "a sure discriminator has nothing to gain"


def test_the_generators_loss_is_of_the_mean_logit_of_each_image() -> None:
    fake = torch.randn(3, 4, 4, dtype=torch.float64)
    expected = sum(softplus(-sum(numbers(image)) / 16) for image in fake) / 3
    assert generator_loss(fake).item() == pytest.approx(expected)
    patchwise = torch.nn.functional.softplus(-fake).mean().item()
    assert generator_loss(fake).item() < patchwise, "the mean is taken inside"


def test_lecam_holds_logits_near_the_other_sides_average() -> None:
    real, fake = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    averages = torch.tensor([0.4, -0.3], dtype=torch.float64)
    expected = (
        sum(max(0, r + 0.3) ** 2 for r in numbers(real)) / 18 + sum(max(0, 0.4 - f) ** 2 for f in numbers(fake)) / 18
    )
    assert lecam_loss(real, fake, averages).item() == pytest.approx(expected)
    assert lecam_loss(torch.full((1, 2), -0.3), torch.full((1, 2), 0.4), averages.float()) == 0


@pytest.mark.parametrize("lecam_weight", [0.0, 0.05])
def test_the_discriminators_terms_have_their_weights(tiny: Any, lecam_weight: float) -> None:
    config = tiny(**GAN, **{"loss.adversarial.lecam_weight": lecam_weight})
    terms = discriminator_terms(config, torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.zeros(2))
    assert discriminator_weights(config) == (
        {"discriminator": 1.0, "lecam": 0.05} if lecam_weight else {"discriminator": 1.0}
    )
    assert terms.keys() == discriminator_weights(config).keys()


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer() -> None:
    layer = nn.Linear(3, 2).double()
    outputs = layer(torch.randn(4, 3, dtype=torch.float64))
    reconstruction, adversarial = outputs.square().mean(), 0.01 * outputs.sum()
    by_hand = [
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    balance = adaptive_weight(reconstruction, adversarial, layer.weight)
    torch.testing.assert_close(balance, by_hand[0] / (by_hand[1] + 1e-4))
    assert not balance.requires_grad
    torch.testing.assert_close(adaptive_weight(reconstruction, adversarial, layer.weight, 1024.0), balance)
    assert adaptive_weight(1e9 * reconstruction, 0 * adversarial, layer.weight) == 1e4
    infinite = adversarial * torch.tensor(math.inf, dtype=torch.float64)
    assert adaptive_weight(reconstruction, infinite, layer.weight) == 1, (
        "a gradient that overflows is not to be multiplied by zero"
    )
    (reconstruction + balance * adversarial).backward()  # the graph is still there


def test_a_frozen_network_passes_gradients_on_and_keeps_none() -> None:
    layer, x = nn.Linear(3, 1), torch.randn(2, 3, requires_grad=True)
    with frozen(layer):
        loss = layer(x).sum()
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad is None
    assert layer.weight.requires_grad


# --- Perceptual terms -------------------------------------------------------------------------------------------------


def test_the_stand_in_is_the_distance_of_unit_features_after_every_activation() -> None:
    loss = PerceptualLoss("fashion-cnn")
    x, y = torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1
    collected: dict[str, list[torch.Tensor]] = {"x": [], "y": []}
    body = load_fashion_cnn().body
    for name, images in (("x", x), ("y", y)):
        hidden = images
        for position, layer in enumerate(body):
            hidden = layer(hidden.clone())
            if position % 3 == 2:
                collected[name].append(hidden.clone())
    layers = []
    for a, b in zip(*collected.values(), strict=True):
        a, b = (h / h.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12) for h in (a, b))
        layers.append(((a - b) ** 2).sum(1).mean())
    assert len(layers) == 6
    torch.testing.assert_close(loss(x, y), sum(layers) / 6)
    assert loss(x, x) == 0


def test_the_perceptual_gradient_reaches_the_reconstruction_alone() -> None:
    loss = PerceptualLoss("fashion-cnn")
    x, y = torch.rand(2, 1, 32, 32, requires_grad=True), torch.rand(2, 1, 32, 32, requires_grad=True)
    loss(x, y).backward()
    assert x.grad is None
    assert y.grad is not None
    assert y.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_lpips_as_a_loss_is_lpips_as_a_metric() -> None:
    from torchvision.models import vgg16

    weights = {name: value for name, value in vgg16(weights=None).state_dict().items() if name.startswith("features.")}
    x, y = torch.rand(2, 1, 32, 32) * 2 - 1, (torch.rand(2, 1, 32, 32) * 2 - 1).requires_grad_()
    value = PerceptualLoss("lpips-vgg", weights)(x, y)
    metric = LPIPS("vgg", lpips_network("vgg", weights))
    metric.update(x, y.detach())
    assert value.item() == pytest.approx(metric.compute()[0]["lpips[vgg]"], rel=1e-5)
    value.backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


def test_lpips_without_its_weights_says_which_file_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(backbone: str) -> dict[str, torch.Tensor]:
        raise DataError("the weights of VGG-16 (for lpips[vgg]) are absent: vgg16-397923af.pth")

    monkeypatch.setattr(losses, "backbone_weights", absent)
    with pytest.raises(DataError, match=r"vgg16-397923af\.pth"):
        PerceptualLoss("lpips-vgg")


def fetch(processes: Processes, folder: Path) -> None:
    def slowly(_: str) -> dict[str, torch.Tensor]:
        (folder / f"{len(list(folder.iterdir()))} of {processes.rank}").touch()
        time.sleep(0.3 * (processes.rank == 0))
        if (folder / "absent").exists():
            raise DataError("vgg16.pth is not there")
        return {}

    config = TrainConfig.parse({"quantizer": {"method": "ibq"}, "loss": {"perceptual": "lpips-vgg"}})
    with (
        mock.patch("ibq.losses.backbone_weights", slowly),
        mock.patch("ibq.losses.lpips_network", return_value=nn.Identity()),
    ):
        assert perceptual_loss(config, torch.device("cpu")) is not None
        (folder / "absent").touch()
        barrier()
        with pytest.raises(DataError, match=r"^vgg16.pth is not there$"):
            perceptual_loss(config, torch.device("cpu"))


def test_one_process_fetches_the_weights_and_the_others_wait(tmp_path: Path) -> None:
    run_processes(fetch, tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"0 of 0", "1 of 1", "absent", "3 of 0"}, (
        "of what is absent only one asks"
    )


# --- Weights and the sum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vq", "ibq"])
@pytest.mark.parametrize("pixel_weight", [1.0, 2.5])
def test_weights_are_the_pixel_weight_and_the_quantizers_own(tiny: Any, method: str, pixel_weight: float) -> None:
    config = tiny(method, **{"loss.pixel_weight": pixel_weight})
    assert loss_weights(config) == {"pixel": pixel_weight, **config.quantizer.loss_weights}


def test_every_term_that_is_on_has_a_weight_and_the_stand_in_has_its_own_name(tiny: Any) -> None:
    config = tiny(**GAN, **{"loss.perceptual": "fashion-cnn", "loss.perceptual_weight": 0.5})
    assert loss_weights(config) == {"pixel": 1.0, "fashion_cnn": 0.5, **config.quantizer.loss_weights}
    assert loss_weights(config, adversarial=True) == loss_weights(config) | {"adversarial": 0.1}
    assert "lpips" in loss_weights(tiny(**{"loss.perceptual": "lpips-vgg"}))


def test_weighted_sum_and_its_gradient() -> None:
    terms = {name: torch.tensor(value, requires_grad=True) for name, value in {"a": 2.0, "b": 3.0, "c": 5.0}.items()}
    weights = {"b": 10.0, "a": 1.0, "c": -0.5}
    total = weighted_sum(terms, weights)
    total.backward()
    assert total.item() == 2.0 + 30.0 - 2.5
    assert {name: term.grad.item() for name, term in terms.items()} == {"a": 1.0, "b": 10.0, "c": -0.5}
    assert {name: term.item() for name, term in weighted(terms, weights).items()} == {"a": 2.0, "b": 30.0, "c": -2.5}


@pytest.mark.parametrize(("terms", "weights"), [("ab", "a"), ("a", "ab"), ("a", "b"), ("", "a")])
def test_a_term_without_a_weight_or_a_weight_without_a_term_is_an_error(terms: str, weights: str) -> None:
    with pytest.raises(ValueError, match="exactly one weight") as caught:
        weighted_sum({name: torch.ones(()) for name in terms}, dict.fromkeys(weights, 1.0))
    assert str(sorted(terms)) in str(caught.value)
    assert str(sorted(weights)) in str(caught.value)
