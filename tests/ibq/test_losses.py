"""The total loss: every term once, by its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ibq.losses import loss_weights, pixel_loss, weighted_sum


def test_pixel_losses_are_the_element_means() -> None:
    x, y = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(pixel_loss(x, y, "l1"), torch.nn.functional.l1_loss(y, x))
    torch.testing.assert_close(pixel_loss(x, y, "l2"), torch.nn.functional.mse_loss(y, x))
    assert pixel_loss(x, x, "l1") == pixel_loss(x, x, "l2") == 0


@pytest.mark.parametrize("method", ["vq", "ibq"])
@pytest.mark.parametrize("pixel_weight", [1.0, 2.5])
def test_weights_are_the_pixel_weight_and_the_quantizers_own(tiny: Any, method: str, pixel_weight: float) -> None:
    config = tiny(method, **{"loss.pixel_weight": pixel_weight})
    assert loss_weights(config) == {"pixel": pixel_weight, **config.quantizer.loss_weights}


def test_weighted_sum_and_its_gradient() -> None:
    terms = {name: torch.tensor(value, requires_grad=True) for name, value in {"a": 2.0, "b": 3.0, "c": 5.0}.items()}
    total = weighted_sum(terms, {"b": 10.0, "a": 1.0, "c": -0.5})
    total.backward()
    assert total.item() == 2.0 + 30.0 - 2.5
    assert {name: term.grad.item() for name, term in terms.items()} == {"a": 1.0, "b": 10.0, "c": -0.5}


@pytest.mark.parametrize(("terms", "weights"), [("ab", "a"), ("a", "ab"), ("a", "b"), ("", "a")])
def test_a_term_without_a_weight_or_a_weight_without_a_term_is_an_error(terms: str, weights: str) -> None:
    with pytest.raises(ValueError, match="exactly one weight") as caught:
        weighted_sum({name: torch.ones(()) for name in terms}, dict.fromkeys(weights, 1.0))
    assert str(sorted(terms)) in str(caught.value)
    assert str(sorted(weights)) in str(caught.value)
