"""IBQ's parts, taken away one by one: each control equals its formula in float64, and leaves z_q exactly the gathered
code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantizer_variants import assert_refused

from ibq import IndexBackpropQuantizer, build_quantizer

K, D, N = 20, 6, 30
Pair = tuple[torch.Tensor, torch.Tensor]


def make(**fields: Any) -> IndexBackpropQuantizer:
    quantizer = build_quantizer(
        {"method": "ibq", "codebook_size": K, "code_dim": D, "entropy_temperature": 0.5} | fields
    )
    assert isinstance(quantizer, IndexBackpropQuantizer)
    return quantizer.double()


def gradients(quantizer: IndexBackpropQuantizer, z_ND: torch.Tensor, g_ND: torch.Tensor) -> Pair:
    """Of (z_q * g).sum(), for z and the codebook; the value of z_q is checked on the way."""
    z_q_ND, indices_N, _ = quantizer.quantize(z_ND)
    assert torch.equal(z_q_ND, quantizer.codebook[indices_N])
    dz_ND, dC_KD = torch.autograd.grad(
        z_q_ND, (z_ND, quantizer.embedding), g_ND, allow_unused=True, materialize_grads=True
    )
    return dz_ND, dC_KD


def soft_paths(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, g_ND: torch.Tensor, scale: float = 1.0, m: int = K
) -> tuple[Pair, Pair]:
    """The gradient of z_q by docs/method.md section 3, in its parts: soft path to z and to C; nothing and the one-hot
    path."""
    logits_NK = scale * z_ND @ codebook_KD.T
    kept_NK = torch.zeros_like(logits_NK, dtype=torch.bool).scatter_(1, logits_NK.topk(m).indices, True)
    p_NK = logits_NK.masked_fill(~kept_NK, -torch.inf).softmax(1)
    ds_NK = g_ND @ codebook_KD.T
    dlogits_NK = p_NK * (ds_NK - (p_NK * ds_NK).sum(1, keepdim=True))
    onehot_NK = F.one_hot(logits_NK.argmax(1), K).double()
    return (scale * dlogits_NK @ codebook_KD, scale * dlogits_NK.T @ z_ND), (torch.zeros_like(z_ND), onehot_NK.T @ g_ND)


def near() -> tuple[torch.Tensor, torch.Tensor]:
    """Features and an output gradient."""
    return (0.7 * torch.randn(N, D, dtype=torch.float64)).requires_grad_(), torch.randn(N, D, dtype=torch.float64)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "scale", "m"),
    [
        ({}, 1.0, K),
        ({"top_m": 4}, 1.0, 4),
        ({"top_m": 1}, 1.0, 1),
        ({"top_m": K}, 1.0, K),
        ({"logit_scale": "inverse_sqrt_dim"}, D**-0.5, K),
        ({"logit_scale": 3.0}, 3.0, K),
        ({"logit_scale": 0.5, "top_m": 5}, 0.5, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("soft_path", ["both", "features", "codes"])
def test_each_control_has_the_gradient_of_its_formula(
    fields: dict[str, Any], scale: float, m: int, soft_path: str
) -> None:
    quantizer, (z_ND, g_ND) = make(**fields, soft_path=soft_path), near()
    (soft_dz, soft_dC), (_, hard_dC) = soft_paths(z_ND.detach(), quantizer.embedding.detach(), g_ND, scale, m)
    dz_ND, dC_KD = gradients(quantizer, z_ND, g_ND)
    close(dz_ND, g_ND if soft_path == "codes" else soft_dz)
    close(dC_KD, hard_dC if soft_path == "features" else hard_dC + soft_dC)
    assert (m == 1) == (soft_dz.abs().max() < 1e-12)


@pytest.mark.parametrize("fields", [{"top_m": 4}, {"soft_path": "features"}, {"soft_path": "codes"}], ids=str)
def test_controls_of_the_index_leave_the_other_terms_alone(fields: dict[str, Any]) -> None:
    released, controlled, (z_ND, _) = make(), make(**fields), near()
    controlled.load_state_dict(released.state_dict())
    results = []
    for quantizer in (released, controlled):
        _, indices_N, losses = quantizer.quantize(z_ND)
        terms = [losses[name] for name in ("commitment", "codebook", "sample_entropy", "codebook_entropy")]
        close(losses["double"], losses["commitment"])
        results.append([indices_N, *terms, *torch.autograd.grad(sum(terms), (z_ND, quantizer.embedding))])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("scale", ["inverse_sqrt_dim", 0.2, 7.0])
def test_a_scale_changes_no_index_and_divides_the_temperature_of_the_entropies(scale: Any) -> None:
    scaled, (z_ND, _) = make(logit_scale=scale, entropy_temperature=0.5), near()
    plain = make(entropy_temperature=0.5 / scaled.config.scale)
    plain.load_state_dict(scaled.state_dict())
    (_, indices_N, losses), (_, expected_N, expected) = scaled.quantize(z_ND), plain.quantize(z_ND)
    assert torch.equal(indices_N, expected_N)
    close(losses["sample_entropy"], expected["sample_entropy"])
    close(losses["codebook_entropy"], expected["codebook_entropy"])


def test_cosine_similarity_is_the_same_method_on_unit_vectors() -> None:
    quantizer, (z_ND, g_ND) = make(similarity="cosine", logit_scale=4.0), near()
    with torch.no_grad():
        quantizer.embedding *= torch.rand(K, 1) + 0.1
    u_ND, unit_KD = F.normalize(z_ND, dim=1), F.normalize(quantizer.embedding, dim=1)
    (soft_dz, soft_dC), (_, hard_dC) = soft_paths(u_ND.detach(), unit_KD.detach(), g_ND, 4.0)
    (expected_dz,) = torch.autograd.grad(u_ND, [z_ND], soft_dz)
    (expected_dC,) = torch.autograd.grad(unit_KD, [quantizer.embedding], soft_dC + hard_dC)
    dz_ND, dC_KD = gradients(quantizer, z_ND, g_ND)
    close(dz_ND, expected_dz)
    close(dC_KD, expected_dC)
    _, indices_N, losses = quantizer.quantize(z_ND)
    assert torch.equal(indices_N, F.cosine_similarity(z_ND[:, None], quantizer.embedding, dim=2).argmax(1))
    close(losses["commitment"], (u_ND - unit_KD[indices_N]).square().mean())


def test_scaled_logits_keep_the_softness_that_a_large_code_dimension_takes_away() -> None:
    """docs/method.md section 9: outside its recipe IBQ dies at D = 256, not at 32. With N(0, 1) codes and features p
    becomes one-hot as D grows: a token hears of one code only, and the gradient comes from the few tokens between two.
    Scaled by 1/sqrt(D) p does not depend on D.
    """

    def softness(D: int, scale: Any) -> tuple[float, float]:
        """Median of the greatest p, and a median token's share of the gradient over the mean's (root mean square)."""
        torch.manual_seed(0)
        quantizer = make(code_dim=D, codebook_size=1024, logit_scale=scale)
        z_ND, g_ND = (
            torch.randn(100, D, dtype=torch.float64, requires_grad=True),
            torch.randn(100, D, dtype=torch.float64),
        )
        p_NK = (quantizer.config.scale * z_ND.detach() @ quantizer.codebook.detach().T).softmax(1)
        norms_N = gradients(quantizer, z_ND, g_ND)[0].norm(dim=1)
        return p_NK.amax(1).median().item(), (norms_N.median() / norms_N.square().mean().sqrt()).item()

    released, scaled = ([softness(D, scale) for D in (8, 256)] for scale in (1.0, "inverse_sqrt_dim"))
    assert released[0][0] < 0.3
    assert released[1][0] > 0.9
    assert released[1][1] < 0.3 < 0.8 < released[0][1]
    assert scaled[0][0] == pytest.approx(scaled[1][0], rel=0.3)
    assert scaled[0][0] < 0.02
    assert min(scaled[0][1], scaled[1][1]) > 0.8


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"top_m": K + 1}, ("top_m=21", "codebook_size=20", "lower it")),
        ({"top_m": 0}, ("top_m", "greater than or equal to 1")),
        ({"soft_path": "none"}, ("soft_path", "'none'", "features")),
        ({"logit_scale": -1.0}, ("logit_scale", "greater than 0")),
        ({"logit_scale": "sqrt"}, ("logit_scale", "inverse_sqrt_dim")),
        ({"similarity": "euclidean"}, ("similarity", "'euclidean'", "cosine")),
    ],
    ids=str,
)
def test_controls_out_of_range_are_one_sentence(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    assert_refused({"method": "ibq", "codebook_size": K} | fields, *mentions)
