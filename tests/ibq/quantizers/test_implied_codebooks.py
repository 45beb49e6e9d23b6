"""Quantizers whose codebook follows from the config (lfq, bsq, fsq), and Gumbel-softmax beside IBQ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantizer_variants import assert_refused

from ibq import build_quantizer, index_backprop
from ibq.errors import ConfigError
from ibq.quantizers import FSQConfig, Quantizer

D, K, N = 6, 64, 40
binary = pytest.mark.parametrize("method", ["lfq", "bsq"])


def make(method: str, **fields: Any) -> Quantizer:
    return build_quantizer({"method": method, "codebook_size": K, "code_dim": D} | fields)


def features() -> torch.Tensor:
    return torch.randn(N, D, dtype=torch.float64, requires_grad=True)


# --- Binary codes -----------------------------------------------------------------------------------------------------


@binary
def test_channel_d_is_the_bit_of_value_two_to_the_d(method: str) -> None:
    quantizer, magnitude = make(method), 1.0 if method == "lfq" else D**-0.5
    expected_KD = torch.tensor([[magnitude if k >> d & 1 else -magnitude for d in range(D)] for k in range(K)])
    assert torch.equal(quantizer.codebook, expected_KD)
    z_BDHW = torch.tensor([0.5, -2.0, 0.1, -0.1, -3.0, 1.0]).view(1, D, 1, 1)
    assert quantizer(z_BDHW).indices.item() == 0b100101
    assert quantizer(torch.zeros(1, D, 1, 1)).indices.item() == 0, "zero is no one"
    assert "codes" not in quantizer.state_dict()


@binary
def test_entropies_per_bit_are_those_over_all_codes(method: str) -> None:
    """Exactly, with their gradients: softmax(2 <x, c> / tau) over 2^D codes falls into bits of probability sigmoid(4
    |c_d| x_d / tau)."""
    tau, quantizer, z_ND = 0.7, make(method, entropy_temperature=0.7), features()
    x_ND = z_ND if method == "lfq" else F.normalize(z_ND, dim=1)
    log_p_NK = (2 * x_ND @ quantizer.codebook.double().T / tau).log_softmax(1)
    mean_K = log_p_NK.exp().mean(0)
    expected = {
        "sample_entropy": -(log_p_NK.exp() * log_p_NK).sum(1).mean(),
        "codebook_entropy": -(mean_K * (mean_K + 1e-5).log()).sum(),
    }
    losses = quantizer.quantize(z_ND)[2]
    for name, value in expected.items():
        tolerance = (
            {"rtol": 1e-10, "atol": 1e-10} if method == "lfq" else {"rtol": 1e-6, "atol": 1e-7}
        )  # 1/sqrt(D) is a float32
        torch.testing.assert_close(losses[name], value, **tolerance)
        gradients = [torch.autograd.grad(loss, [z_ND], retain_graph=True)[0] for loss in (losses[name], value)]
        torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_entropies_are_finite_and_have_their_limits_at_any_size_of_features(scale: float) -> None:
    quantizer, z_BDHW = make("lfq"), torch.full((1, D, 1, 3), scale, requires_grad=True)
    losses = quantizer(z_BDHW).losses
    (dz,) = torch.autograd.grad(losses["sample_entropy"], [z_BDHW])
    assert dz.isfinite().all()
    assert losses["sample_entropy"].item() == pytest.approx(D * math.log(2) if scale == 0 else 0, abs=1e-5)


def test_two_to_the_18_codes_have_the_entropies_of_a_dense_softmax() -> None:
    quantizer = build_quantizer({"method": "lfq", "codebook_size": 2**18, "code_dim": 18, "entropy_temperature": 1.0})
    z_BDHW = torch.randn(1, 18, 2, 2, requires_grad=True)
    quantized = quantizer(z_BDHW)
    p_NK = (2 * z_BDHW.flatten(2)[0].T @ quantizer.codebook.T).softmax(1)
    torch.testing.assert_close(
        quantized.losses["sample_entropy"], torch.special.entr(p_NK).sum(1).mean(), rtol=1e-4, atol=1e-4
    )
    mean_K = p_NK.mean(0)
    torch.testing.assert_close(
        quantized.losses["codebook_entropy"], -(mean_K * (mean_K + 1e-5).log()).sum(), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.z_q)


def test_the_entropy_boost_fades_with_the_training_forwards_alone() -> None:
    quantizer = make("lfq", entropy_boost=3.0, entropy_boost_steps=4, entropy_temperature=1.0)
    assert quantizer.config.loss_weights["entropy_boost"] == quantizer.config.entropy_weight
    z_BDHW, factors = torch.randn(1, D, 4, 4), []
    for _ in range(6):
        quantizer.eval()(z_BDHW)
        losses = quantizer.train()(z_BDHW).losses
        factors.append(1 + (losses["entropy_boost"] / (losses["sample_entropy"] - losses["codebook_entropy"])).item())
    assert factors == pytest.approx([3.0, 2.5, 2.0, 1.5, 1.0, 1.0])


# --- Finite scalars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [3, 4, 5, 8, 256])
def test_every_level_is_reached_and_none_beyond(level: int) -> None:
    quantizer = build_quantizer({"method": "fsq", "levels": (level, 3), "codebook_size": 3 * level, "code_dim": 2})
    z_ND = torch.stack([torch.linspace(-12, 12, 20_001), torch.zeros(20_001)], 1)
    z_q_ND, indices_N, losses = quantizer.quantize(z_ND)
    assert losses == {}
    assert indices_N.unique().tolist() == [level + k for k in range(level)]
    assert (z_q_ND[1:, 0] >= z_q_ND[:-1, 0]).all()
    expected = [(k - level // 2) / (level // 2) for k in range(level)]
    torch.testing.assert_close(z_q_ND[:, 0].unique(), torch.tensor(expected))
    assert quantizer.quantize(torch.zeros(1, 2))[0].tolist() == [[0.0, 0.0]]


def test_bounded_features_are_within_half_a_level_of_their_codes_and_pass_the_gradient_of_the_bound() -> None:
    quantizer = build_quantizer({"method": "fsq"})
    z_BDHW = torch.randn(2, 5, 4, 4, requires_grad=True)
    z_q, bounded = quantizer(z_BDHW).z_q, quantizer.to_code_space(z_BDHW)
    assert (z_q - bounded).abs().max() <= 0.5 / 2 + 1e-3
    g_BDHW = torch.randn_like(z_BDHW)
    assert torch.equal(*(torch.autograd.grad(output, [z_BDHW], g_BDHW)[0] for output in (z_q, bounded)))


# --- Gumbel-softmax and IBQ -------------------------------------------------------------------------------------------


def gumbel_in_float64(**fields: Any) -> tuple[Quantizer, torch.Tensor, torch.Tensor]:
    return make("gumbel", **fields).double(), features(), torch.randn(N, D, dtype=torch.float64)


def test_without_noise_at_temperature_one_it_is_ibqs_estimator() -> None:
    quantizer, z_ND, g_ND = gumbel_in_float64(noise=False)
    outputs = quantizer.quantize(z_ND)[:2], index_backprop(z_ND, quantizer.codebook, entropy_temperature=None)[:2]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    gradients = [torch.autograd.grad(z_q_ND, (z_ND, quantizer.embedding), g_ND) for z_q_ND, _ in outputs]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_temperature_is_an_ibq_whose_logits_are_divided_by_it() -> None:
    quantizer, z_ND, g_ND = gumbel_in_float64(noise=False, temperature=0.3)
    z_q_ND = index_backprop(z_ND / 0.3, quantizer.codebook, entropy_temperature=None)[0]
    gradients = [
        torch.autograd.grad(z_q, (z_ND, quantizer.embedding), g_ND) for z_q in (quantizer.quantize(z_ND)[0], z_q_ND)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_temperature_falls_along_half_a_cosine_with_the_training_forwards_alone() -> None:
    quantizer, z_BDHW = make("gumbel", temperature=1.0, final_temperature=0.25, anneal_steps=4), torch.randn(1, D, 4, 4)
    seen = []
    for _ in range(6):
        quantizer.eval()(z_BDHW)
        seen.append(float(quantizer.temperature))
        quantizer.train()(z_BDHW)
    assert seen == pytest.approx([0.25 + 0.375 * (1 + math.cos(math.pi * min(step, 4) / 4)) for step in range(6)])
    assert make("gumbel", temperature=0.3).temperature == 0.3


def test_an_annealed_temperature_is_that_of_the_gradient() -> None:
    annealed, z_ND, g_ND = gumbel_in_float64(noise=False, final_temperature=0.25, anneal_steps=4)
    constant, _, _ = gumbel_in_float64(noise=False, temperature=0.25)
    constant.load_state_dict(annealed.state_dict())
    annealed.schedule.steps.fill_(4)
    gradients = [
        torch.autograd.grad(q.quantize(z_ND)[0], [z_ND, q.embedding], g_ND, retain_graph=True)
        for q in (annealed, constant)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_noise_samples_codes_by_their_probability_in_training_alone() -> None:
    quantizer = make("gumbel", codebook_size=4)
    z_BDHW = torch.randn(1, D, 1, 1).expand(1, D, 100, 200)
    p_K = (z_BDHW[0, :, 0, 0] @ quantizer.codebook.T).softmax(0)
    share_K = torch.bincount(quantizer(z_BDHW).indices.flatten(), minlength=4) / 20_000
    torch.testing.assert_close(share_K, p_K.detach(), rtol=0, atol=0.015)
    assert quantizer.eval()(z_BDHW).indices.unique().tolist() == [p_K.argmax().item()]
    torch.manual_seed(8)
    first = quantizer.train()(z_BDHW).indices
    torch.manual_seed(8)
    assert torch.equal(quantizer(z_BDHW).indices, first)


def test_the_kl_term_is_that_to_the_uniform_distribution() -> None:
    quantizer, z_ND, _ = gumbel_in_float64()
    p_NK = (z_ND @ quantizer.codebook.T).softmax(1)
    expected = (p_NK * (p_NK * K).log()).sum(1).mean()
    torch.testing.assert_close(quantizer.quantize(z_ND)[2]["kl"], expected, rtol=1e-10, atol=1e-10)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        (
            {"method": "lfq", "codebook_size": 1000, "code_dim": 10},
            ("codebook_size=1000", "codebook_size=1024 with code_dim=10"),
        ),
        (
            {"method": "bsq", "codebook_size": 1024, "code_dim": 64},
            ("codebook_size=1024", "code_dim=64", "set code_dim=10"),
        ),
        ({"method": "lfq", "entropy_boost": 0.5}, ("entropy_boost", "greater than or equal to 1")),
        (
            {"method": "fsq", "levels": [8, 5, 5, 5], "code_dim": 4},
            ("codebook_size=1024", "1000", "levels=(8, 5, 5, 5)"),
        ),
        ({"method": "fsq", "code_dim": 64}, ("code_dim=64", "levels=(4, 4, 4, 4, 4)", "set it to 5")),
        ({"method": "fsq", "levels": [2] * 10, "code_dim": 10}, ("levels=(2, 2", "'lfq'")),
        ({"method": "fsq", "levels": []}, ("levels", "at least 1")),
        ({"method": "gumbel", "temperature": 0}, ("temperature", "greater than 0")),
        ({"method": "simvq", "codebook_init": "normal"}, ("codebook_init",)),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_one_sentence_with_both_values(
    fields: dict[str, Any], mentions: tuple[str, ...]
) -> None:
    assert_refused(fields, *mentions)


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 19))
def test_fsq_levels_make_exactly_the_codes(bits: int) -> None:
    levels = FSQConfig.sizes(2**bits)["levels"]
    assert math.prod(levels) == 2**bits
    assert levels.count(4) <= 2
    assert set(levels) <= {4, 8}


@pytest.mark.parametrize("method", sorted(Quantizer.registry))
def test_sizes_of_a_number_of_codes_are_a_valid_config(method: str) -> None:
    of = Quantizer.registry[method].config_class
    assert of(**of.sizes(256)).codebook_size == 256


def test_methods_without_a_learnt_codebook_need_a_power_of_two() -> None:
    with pytest.raises(ConfigError, match=r"codebook_size=1000 .* power of two"):
        FSQConfig.sizes(1000)
