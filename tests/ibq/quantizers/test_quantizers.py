"""VQ and IBQ as released: losses, initialisation, refusals. The contract of all quantizers is in
`test_quantizer_contract`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from quantizer_variants import assert_refused

from ibq import IBQConfig, IndexBackpropQuantizer, VectorQuantizer, VQConfig, build_quantizer
from ibq.errors import ConfigError
from ibq.losses import weighted_sum
from ibq.ops import index_backprop, nearest_code
from ibq.quantizers import Quantized, Quantizer, QuantizerConfig
from ibq.quantizers.base import CodebookQuantizer, quantization_terms
from ibq.quantizers.entropy import entropy_terms, euclidean_as_dot

K, D, GRID = 40, 5, (2, 5, 3, 4)
ARMS: dict[str, dict[str, Any]] = {
    "vq": {"method": "vq"},
    "vq with entropy": {"method": "vq", "entropy_weight": 0.05},
    "ibq": {"method": "ibq"},
    "ibq without entropy and double": {"method": "ibq", "entropy_weight": 0.0, "double": False},
    "ibq without double": {"method": "ibq", "double": False},
}
METHODS = ", ".join(sorted(Quantizer.registry))
DOCS = Path(__file__).parents[3] / "docs" / "quantizers.md"
every_arm = pytest.mark.parametrize("arm", ARMS)


def make(arm: str, **fields: Any) -> CodebookQuantizer:
    quantizer = build_quantizer(ARMS[arm] | {"codebook_size": K, "code_dim": D} | fields)
    assert isinstance(quantizer, CodebookQuantizer)
    return quantizer


def near_codes(arm: str, **fields: Any) -> tuple[CodebookQuantizer, torch.Tensor]:
    """Features and codes so small that no assignment at the entropy temperature underflows; some codes stay
    unselected."""
    quantizer = make(arm, **fields)
    with torch.no_grad():
        quantizer.embedding.normal_(std=0.05)
    return quantizer, (0.05 * torch.randn(GRID)).requires_grad_()


# --- What they are ----------------------------------------------------------------------------------------------------


def test_vq_takes_the_nearest_code_and_ibq_the_largest_dot_product() -> None:
    for arm in ARMS:
        quantizer, z_BDHW = make(arm, codebook_init="normal"), torch.randn(GRID)
        z_ND = z_BDHW.permute(0, 2, 3, 1).reshape(-1, D)
        distance, dot = torch.cdist(z_ND, quantizer.codebook).argmin(1), (z_ND @ quantizer.codebook.T).argmax(1)
        assert not torch.equal(distance, dot)
        assert torch.equal(quantizer(z_BDHW).indices.flatten(), distance if arm.startswith("vq") else dot)


@every_arm
def test_the_options_of_the_comparison_leave_the_released_methods_as_they_were_to_the_bit(arm: str) -> None:
    """The same lines as before there were any, in the same order; and no state but theirs."""
    quantizer, z_BDHW = make(arm, codebook_init="normal"), torch.randn(GRID, requires_grad=True)
    assert quantizer.state_dict().keys() == {"embedding", "initialized"}
    codebook_KD, z_ND = quantizer.codebook, z_BDHW.permute(0, 2, 3, 1).reshape(-1, D)
    tau = quantizer.config.active_entropy_temperature
    if arm == "vq":
        indices_N, both = nearest_code(z_ND, codebook_KD), (None, None)
    else:
        queries_keys = (z_ND, codebook_KD) if arm.startswith("ibq") else euclidean_as_dot(z_ND, codebook_KD)
        z_q_ND, indices_N, *both = index_backprop(*queries_keys, entropy_temperature=tau)
    codes_ND = codebook_KD[indices_N]
    if arm.startswith("vq"):
        z_q_ND = codes_ND.detach() + (z_ND - z_ND.detach())
    losses = quantization_terms(z_ND, codes_ND) | entropy_terms(*both)
    if "double" in quantizer.config.loss_weights:
        losses["double"] = (z_q_ND - z_ND).square().mean()
    expected = Quantized(z_q_ND.reshape(2, 3, 4, D).permute(0, 3, 1, 2), indices_N.reshape(2, 3, 4), losses)

    actual, weights = quantizer(z_BDHW), quantizer.config.loss_weights
    results = []
    for z_q, indices, terms in (actual, expected):
        total = z_q.square().mean() + weighted_sum(terms, weights)
        results.append([z_q, indices, *terms.values(), *torch.autograd.grad(total, (z_BDHW, quantizer.embedding))])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@every_arm
def test_a_codebook_of_one_code_works(arm: str) -> None:
    quantizer = make(arm, codebook_size=1)
    z_q, indices, losses = quantizer(torch.randn(GRID))
    assert torch.equal(z_q, quantizer.codebook[0].view(1, D, 1, 1).expand(GRID))
    assert not indices.any()
    assert all(term.isfinite() for term in losses.values())


def test_the_released_recipe_is_the_default_of_ibq() -> None:
    config = IBQConfig()
    assert (config.codebook_init, config.entropy_temperature) == ("normal", 0.01)
    assert config.loss_weights == {
        "double": 1.0,
        "commitment": 1.0,
        "codebook": 0.25,
        "sample_entropy": 0.05,
        "codebook_entropy": -0.05,
    }
    assert VQConfig().loss_weights == {"commitment": 1.0, "codebook": 0.25}
    assert VQConfig().codebook_init == "uniform"


def test_a_new_quantizer_registers_itself_by_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quantizer, "registry", dict(Quantizer.registry))

    class SignConfig(QuantizerConfig):
        method: Literal["first-sign"] = "first-sign"

        @property
        def loss_weights(self) -> dict[str, float]:
            return {}

    class SignQuantizer(Quantizer, config=SignConfig):
        @property
        def codebook(self) -> torch.Tensor:
            return torch.tensor([[-1.0], [1.0]]).expand(2, self.config.code_dim)

        def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            indices_N = (z_ND[:, 0] > 0).long()
            return self.codebook[indices_N], indices_N, {}

    quantizer = build_quantizer({"method": "first-sign", "codebook_size": 2, "code_dim": D})
    z_q, indices, _ = quantizer(torch.randn(GRID))
    assert torch.equal(z_q, quantizer.indices_to_codes(indices))


# --- Losses -----------------------------------------------------------------------------------------------------------


@every_arm
@pytest.mark.parametrize(
    ("beta_on", "commitment", "codebook"), [("commitment", 0.3, 1.0), ("codebook", 1.0, 0.3), ("both", 0.3, 0.3)]
)
def test_beta_stands_where_the_config_says(arm: str, beta_on: str, commitment: float, codebook: float) -> None:
    quantizer, z_BDHW = near_codes(arm, beta=0.3, beta_on=beta_on)
    weights = quantizer.config.loss_weights
    assert (weights["commitment"], weights["codebook"]) == (commitment, codebook)
    losses = quantizer(z_BDHW).losses
    codes_BDHW = quantizer.indices_to_codes(quantizer(z_BDHW).indices).detach()
    (dz,) = torch.autograd.grad(weights["commitment"] * losses["commitment"], [z_BDHW], retain_graph=True)
    (dC,) = torch.autograd.grad(weights["codebook"] * losses["codebook"], [quantizer.embedding], retain_graph=True)
    pull_BDHW = 2 * (z_BDHW.detach() - codes_BDHW) / z_BDHW.numel()
    torch.testing.assert_close(dz, commitment * pull_BDHW)
    expected_KD = torch.zeros(K, D).index_add_(
        0, quantizer(z_BDHW).indices.flatten(), -codebook * pull_BDHW.permute(0, 2, 3, 1).reshape(-1, D)
    )
    torch.testing.assert_close(dC, expected_KD)


@pytest.mark.parametrize("arm", ["vq", "vq with entropy"])
def test_straight_through_copies_the_gradient_exactly(arm: str) -> None:
    quantizer, z_BDHW, g_BDHW = make(arm), torch.randn(GRID, requires_grad=True), torch.randn(GRID)
    (dz,) = torch.autograd.grad(quantizer(z_BDHW).z_q, [z_BDHW], g_BDHW)
    assert torch.equal(dz, g_BDHW)


@pytest.mark.parametrize("arm", ARMS)
def test_term_values_are_the_papers(arm: str) -> None:
    quantizer, z_BDHW = make(arm, codebook_init="normal"), torch.randn(GRID)
    z_q, _, losses = quantizer(z_BDHW)
    for name in {"commitment", "codebook", "double"} & losses.keys():
        torch.testing.assert_close(losses[name], torch.nn.functional.mse_loss(z_BDHW, z_q))


def test_the_double_term_has_the_gradient_of_its_formula_without_any_stop() -> None:
    quantizer, z_BDHW = near_codes("ibq")
    quantizer, z_BDHW = quantizer.double(), z_BDHW.detach().double().requires_grad_()
    z_ND = z_BDHW.permute(0, 2, 3, 1).reshape(-1, D)
    p_NK = (z_ND @ quantizer.codebook.T).softmax(1)
    onehot_NK = torch.eye(K, dtype=torch.float64)[p_NK.argmax(1)]
    expected = ((onehot_NK + p_NK - p_NK.detach()) @ quantizer.codebook - z_ND).square().mean()
    actual = quantizer(z_BDHW).losses["double"]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradients, wanted = (
        torch.autograd.grad(loss, (z_BDHW, quantizer.embedding), retain_graph=True) for loss in (actual, expected)
    )
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_euclidean_entropies_equal_a_dense_computation_from_distances() -> None:
    quantizer, z_BDHW = near_codes("vq with entropy", entropy_temperature=0.02)
    quantizer, z_BDHW = quantizer.double(), z_BDHW.detach().double().requires_grad_()
    z_ND = z_BDHW.permute(0, 2, 3, 1).reshape(-1, D)
    distance_NK = (z_ND[:, None] - quantizer.codebook[None]).square().sum(-1)
    p_NK = (-distance_NK / 0.02).softmax(1)
    mean_K = p_NK.mean(0)
    expected = {
        "sample_entropy": -(p_NK * p_NK.log()).sum(1).mean(),
        "codebook_entropy": -(mean_K * (mean_K + 1e-5).log()).sum(),
    }
    losses = quantizer(z_BDHW).losses
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-10, atol=1e-10)
        gradients, wanted = (
            torch.autograd.grad(loss, (z_BDHW, quantizer.embedding), retain_graph=True)
            for loss in (losses[name], value)
        )
        for mine, theirs in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


# --- Initialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vq", "ibq"])
@pytest.mark.parametrize(("init", "std"), [("uniform", 1 / 512 / math.sqrt(3)), ("normal", 1.0), ("features", 1.0)])
def test_initial_codebooks_have_the_named_distribution(method: str, init: str, std: float) -> None:
    quantizer = build_quantizer({"method": method, "codebook_size": 512, "code_dim": 64, "codebook_init": init})
    codebook = quantizer.codebook.detach()
    assert codebook.std().item() == pytest.approx(std, rel=0.02)
    assert abs(codebook.mean().item()) < 0.02 * std
    if init == "uniform":
        assert codebook.abs().max().item() <= 1 / 512
    assert quantizer.awaits_features == (init == "features")


def test_feature_initialisation_takes_distinct_rows_and_is_remembered() -> None:
    quantizer, features_MD = make("vq", codebook_init="features"), torch.randn(3 * K, D)
    quantizer.initialize_from(features_MD, torch.Generator().manual_seed(3))
    row_of = {tuple(row): i for i, row in enumerate(features_MD.tolist())}
    rows = [row_of[tuple(code)] for code in quantizer.codebook.tolist()]
    assert len(set(rows)) == K
    assert rows != sorted(rows), "drawn at random, not the first K"
    assert not quantizer.awaits_features

    again, other, restored = (make("vq", codebook_init="features") for _ in range(3))
    again.initialize_from(features_MD, torch.Generator().manual_seed(3))
    other.initialize_from(features_MD, torch.Generator().manual_seed(4))
    assert torch.equal(again.codebook, quantizer.codebook)
    assert not torch.equal(other.codebook, quantizer.codebook)
    restored.load_state_dict(quantizer.state_dict())
    assert not restored.awaits_features
    assert torch.equal(restored.train()(torch.ones(GRID)).z_q, quantizer(torch.ones(GRID)).z_q)


def test_feature_initialisation_with_exactly_k_features_uses_them_all() -> None:
    quantizer, features_KD = make("ibq", codebook_init="features"), torch.randn(K, D)
    quantizer.initialize_from(features_KD, torch.Generator())
    assert sorted(quantizer.codebook.tolist()) == sorted(features_KD.tolist())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((K - 1, D), r"\(39, 5\) cannot initialise 40 codes"),
        ((K, D + 1), r"\(40, 6\).*\(40, 5\)"),
        ((K, D, 1), r"\(40, 5, 1\)"),
    ],
)
def test_unfit_features_are_refused_and_change_nothing(shape: tuple[int, ...], message: str) -> None:
    quantizer = make("vq", codebook_init="features")
    before = quantizer.codebook.clone()
    with pytest.raises(ValueError, match=message):
        quantizer.initialize_from(torch.randn(shape), torch.Generator())
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.awaits_features


@pytest.mark.parametrize("method", ["vq", "ibq"])
def test_training_before_feature_initialisation_is_an_error_and_evaluation_is_not(method: str) -> None:
    quantizer = make(method, codebook_init="features")
    with pytest.raises(ValueError, match="initialize_from with 40 encoder outputs"):
        quantizer(torch.randn(GRID))
    assert quantizer.eval()(torch.randn(GRID)).z_q.isfinite().all()


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, D + 1, 3, 4), (2, D, 12), (D,)])
@every_arm
def test_features_of_another_shape_are_refused(arm: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\({shape[0]},.*code_dim={D}"):
        make(arm)(torch.randn(shape))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(1, 2, 2), r"torch.float32 are not integers; .*\[0, 40\)"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "torch.bool are not integers"),
        (torch.tensor([[[0, K]]]), r"from 0 to 40; .*\[0, 40\)"),
        (torch.tensor([[[-1, 3]]]), r"from -1 to 3; .*\[0, 40\)"),
    ],
)
def test_indices_that_name_no_code_are_refused(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("ibq").indices_to_codes(indices)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrower_integer_indices_are_accepted(dtype: torch.dtype) -> None:
    quantizer, indices_BHW = make("vq"), torch.randint(K, (2, 3, 4))
    assert torch.equal(quantizer.indices_to_codes(indices_BHW.to(dtype)), quantizer.indices_to_codes(indices_BHW))


@pytest.mark.parametrize(
    ("config", "mentions"),
    [
        ({"method": "vqq"}, ("'vqq'", METHODS)),
        ({}, ("None", METHODS)),
        ({"method": ["vq"]}, (METHODS,)),
        ({"method": "vq", "codebok_size": 3}, ("codebok_size",)),
        ({"method": "vq", "double": True}, ("double",)),
        ({"method": "ibq", "codebook_size": "many"}, ("codebook_size", "integer", "'many'")),
        ({"method": "ibq", "codebook_size": 0}, ("codebook_size", "0")),
        ({"method": "ibq", "beta": -1}, ("beta", "-1")),
        ({"method": "ibq", "beta": math.inf}, ("beta", "inf")),
        ({"method": "ibq", "entropy_temperature": 0}, ("entropy_temperature", "0")),
        ({"method": "vq", "beta_on": "neither"}, ("beta_on", "'neither'", "commitment")),
        ({"method": "vq", "codebook_init": "zeros"}, ("codebook_init", "'zeros'", "uniform")),
        (7, ("int",)),
    ],
    ids=str,
)
def test_a_quantizer_that_cannot_be_built_is_one_sentence(config: Any, mentions: tuple[str, ...]) -> None:
    assert_refused(config, *mentions)


def test_a_wrong_field_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        build_quantizer({"method": "vq", "codebok_size": 3})


def test_the_exported_classes_are_what_the_methods_build() -> None:
    assert type(build_quantizer(VQConfig())) is VectorQuantizer
    assert type(build_quantizer(IBQConfig())) is IndexBackpropQuantizer


@pytest.mark.parametrize("method", METHODS.split(", "))
def test_the_docs_name_every_method_and_its_paper(method: str) -> None:
    text = DOCS.read_text()
    assert f"| `{method}`" in text
    assert all(number in text for number in re.findall(r"\d{4}\.\d{5}", Quantizer.registry[method].paper))
