"""PatchGAN: its names and sizes are the released ones, its patch is 70 pixels wide, its norms see what they should."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ibq.models.config import AdversarialConfig
from ibq.models.discriminator import PatchDiscriminator


def discriminator(inputs: int = 1, **fields: object) -> PatchDiscriminator:
    config = AdversarialConfig.model_validate({"weight": 0.1, "channels": 8, "layers": 2, "norm": "group"} | fields)
    return PatchDiscriminator(config, inputs)


def test_the_released_one_has_its_names_and_its_size() -> None:
    with torch.device("meta"):
        network = PatchDiscriminator(AdversarialConfig(weight=0.1), 3)
    convolved = 3 * 64 * 16 + 64 + 64 * 128 * 16 + 128 * 256 * 16 + 256 * 512 * 16 + 512 * 16 + 1
    assert (
        sum(parameter.numel() for parameter in network.parameters()) == convolved + 2 * (128 + 256 + 512) == 2_765_633
    )
    names = {name for name, _ in network.named_parameters()}
    convolutions, norms = (0, 2, 5, 8, 11), (3, 6, 9)
    assert {f"main.{i}.weight" for i in convolutions + norms} <= names
    assert {name for name in names if name.endswith("bias")} == {f"main.{i}.bias" for i in (0, 11, *norms)}


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_one_logit_sees_a_patch_of_the_known_width(layers: int, patch: int) -> None:
    network = discriminator(layers=layers, norm="none").double()
    image_BCHW = torch.randn(1, 1, 128, 128, dtype=torch.float64, requires_grad=True)
    logits_B1HW = network(image_BCHW)
    middle = logits_B1HW.shape[2] // 2
    (gradient_BCHW,) = torch.autograd.grad(logits_B1HW[0, 0, middle, middle], image_BCHW)
    seen = gradient_BCHW[0, 0].abs() > 0
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == patch


@pytest.mark.parametrize(("size", "layers", "logits"), [(256, 3, 30), (32, 3, 2), (32, 2, 6), (64, 4, 2)])
def test_a_logit_a_patch(size: int, layers: int, logits: int) -> None:
    assert discriminator(3, layers=layers)(torch.zeros(2, 3, size, size)).shape == (2, 1, logits, logits)


@pytest.mark.parametrize(("norm", "others_matter"), [("batch", True), ("group", False), ("none", False)])
def test_only_batch_norm_looks_at_the_other_images(norm: str, others_matter: bool) -> None:
    network, images_BCHW = discriminator(norm=norm), torch.randn(4, 1, 32, 32)
    alone, together = network(images_BCHW[:2]), network(images_BCHW)[:2]
    assert torch.allclose(alone, together, atol=1e-5) != others_matter


def test_it_begins_as_pix2pix_does() -> None:
    network = discriminator(3, channels=64, layers=3, norm="batch")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not module.bias.any()
