"""One contract for every quantizer and every option: shapes, round trip, precision, state, and what each term
reaches."""

from __future__ import annotations

import pytest
import torch
from quantizer_variants import VARIANTS, K, every_variant, features_for, make

from ibq import build_quantizer
from ibq.losses import weighted_sum
from ibq.quantizers import Quantizer
from ibq.quantizers.contract import RULES, broken

QUANTIZATION, ENTROPY = {"commitment", "codebook"}, {"sample_entropy", "codebook_entropy"}
TERMS = {
    "vq": QUANTIZATION,
    "vq with entropy": QUANTIZATION | ENTROPY,
    "vq cosine": QUANTIZATION | ENTROPY,
    "vq ema": {"commitment"} | ENTROPY,
    "vq ema cosine": {"commitment"},
    "vq restart": QUANTIZATION,
    "vq ema restart": {"commitment"},
    "vq online": QUANTIZATION,
    "vq features": QUANTIZATION,
    "vq kmeans": QUANTIZATION,
    "vq rotation": QUANTIZATION,
    "vq linear": QUANTIZATION | ENTROPY,
    "vq cosine ema restart": {"commitment"},
    "vq kmeans rotation": QUANTIZATION | ENTROPY,
    "vq online cosine": QUANTIZATION,
    "diveq": set(),
    "diveq detach": set(),
    "diveq curve": set(),
    "wasserstein": QUANTIZATION | {"wasserstein"},
    "ibq without entropy and double": QUANTIZATION,
    "lfq": {"commitment"} | ENTROPY,
    "lfq boosted": {"commitment", "entropy_boost"} | ENTROPY,
    "bsq": {"commitment"} | ENTROPY,
    "bsq entropy of bits": {"commitment"} | ENTROPY,
    "fsq": set(),
    "simvq": QUANTIZATION | ENTROPY,
    "vqbridge": QUANTIZATION | ENTROPY,
    "vqbridge kmeans": QUANTIZATION,
    "optvq": QUANTIZATION | ENTROPY,
    "optvq without map": QUANTIZATION,
    "nsvq": QUANTIZATION,
    "nsvq codes": QUANTIZATION | ENTROPY,
    "gumbel": {"kl"},
    "gumbel annealed": {"kl"},
    "gumbel without noise": set(),
}  # where a variant of ibq is not named, it has them all
IBQ_TERMS = QUANTIZATION | ENTROPY | {"double"}


@pytest.mark.parametrize("rule", RULES)
@every_variant
def test_every_variant_keeps_every_rule(variant: str, rule: str) -> None:
    assert broken(rule, make(variant).config) == []


@every_variant
def test_every_variant_has_its_terms(variant: str) -> None:
    assert make(variant).config.loss_weights.keys() == TERMS.get(variant, IBQ_TERMS)


def test_logits_keep_what_tells_the_codes_of_a_large_codebook_apart() -> None:
    """Codes of U(-1/K, 1/K) beside features of N(0, 1): in -|z - c|^2 itself float32 has lost the differences."""
    quantizer = build_quantizer({"method": "vq", "codebook_size": 2**14, "code_dim": 64})
    z_ND, codebook_KD = torch.randn(40, 64), quantizer.codebook.detach()
    actual_NK = quantizer.logits(z_ND).detach().double()
    expected_NK = -torch.cdist(z_ND.double(), codebook_KD.double()).square()
    below_mean = [logits_NK - logits_NK.mean(1, keepdim=True) for logits_NK in (actual_NK, expected_NK)]
    assert (below_mean[0] - below_mean[1]).abs().max() < 1e-4 * below_mean[1].std()


@every_variant
def test_the_loss_is_the_weighted_sum_even_without_terms(variant: str) -> None:
    quantizer = make(variant)
    losses, weights = quantizer(features_for(quantizer)).losses, quantizer.config.loss_weights
    expected = sum((weights[name] * term for name, term in losses.items()), torch.zeros(()))
    torch.testing.assert_close(weighted_sum(losses, weights), expected)


# --- What each term reaches -------------------------------------------------------------------------------------------

ALL, SELECTED, ENDS, BEST, NONE, MAP = (
    "all codes",
    "selected codes",
    "both ends of selected segments",
    "codes among some token's best",
    "no code",
    "all codes, through the map",
)
NOTHING_LEARNT = ("vq ema", "lfq", "lfq boosted", "bsq", "bsq entropy of bits", "fsq")  # by gradient
MAPPED = ("vq linear", "simvq", "vqbridge", "vqbridge kmeans", "optvq")
SPECIAL: dict[tuple[str, str], str] = {
    **{(variant, "z_q"): NONE for variant in VARIANTS if variant.startswith(("vq", "optvq", "nsvq"))},
    **{(variant, term): NONE for variant in NOTHING_LEARNT for term in ("z_q", *ENTROPY, "entropy_boost")},
    **{(variant, "z_q"): SELECTED for variant in VARIANTS if variant.startswith("diveq")},
    ("diveq curve", "z_q"): ENDS,
    ("wasserstein", "z_q"): NONE,
    **{(variant, term): MAP for variant in MAPPED for term in ("codebook", *ENTROPY)},
    ("simvq", "z_q"): NONE,
    ("nsvq", "codebook"): ALL,
    ("nsvq codes", "codebook"): ALL,
    ("ibq soft path to features", "z_q"): SELECTED,
    ("ibq soft path to features", "double"): SELECTED,
    ("ibq top 3", "z_q"): BEST,
    ("ibq top 3", "double"): BEST,
    ("ibq top 3 to features", "z_q"): SELECTED,
    ("ibq top 3 to features", "double"): SELECTED,
}
ORDINARY = {"commitment": NONE, "codebook": SELECTED}
REACH = [
    (variant, term, SPECIAL.get((variant, term), ORDINARY.get(term, ALL)))
    for variant in VARIANTS
    for term in ["z_q", *sorted(TERMS.get(variant, IBQ_TERMS))]
]


def near_codes(variant: str) -> tuple[Quantizer, torch.Tensor]:
    """Features and codes so near, and entropies so soft, that no probability underflows; some codes stay unselected."""
    softer = {"entropy_temperature": 1.0} if TERMS.get(variant, IBQ_TERMS) >= ENTROPY else {}
    quantizer = make(variant, **softer)
    if hasattr(quantizer, "embedding"):
        with torch.no_grad():
            quantizer.embedding.normal_(std=0.05)
    return quantizer, (0.05 * features_for(quantizer).detach()).requires_grad_()


def codes_reached(quantizer: Quantizer) -> set[int] | str:
    """The codes that the gradients at hand move, or MAP where they turn the map that makes all codes."""
    gradients = {name: parameter.grad for name, parameter in quantizer.named_parameters() if parameter.grad is not None}
    for layer in ("projection.weight", "bridge.up.weight"):
        if layer in gradients and gradients[layer].any():
            return MAP
    return rows_reached(gradients["embedding"]) if "embedding" in gradients else set()


def rows_reached(gradient_KD: torch.Tensor) -> set[int]:
    return set(gradient_KD.abs().sum(1).nonzero().flatten().tolist())


@pytest.mark.parametrize(("variant", "term", "reach"), REACH)
def test_each_term_reaches_what_it_should(variant: str, term: str, reach: str) -> None:
    quantizer, z_BDHW = near_codes(variant)
    z_q, indices, losses = quantizer(z_BDHW)
    loss = (z_q * torch.randn_like(z_q)).sum() if term == "z_q" else losses[term]
    loss.backward()

    dz = torch.zeros_like(z_BDHW) if z_BDHW.grad is None else z_BDHW.grad
    if term in ("codebook", "wasserstein") or (variant, term) == ("ibq soft path to codes", "double"):
        assert dz.abs().max() < 1e-6, (
            "no gradient for features"
        )  # the copy's gradient of z_q and that of z cancel in the double term
    else:
        assert (dz.abs().sum(1) > 0).all(), "a gradient for every feature"

    selected = set(indices.flatten().tolist())
    logits_NK = z_BDHW.detach().permute(0, 2, 3, 1).flatten(0, 2) @ quantizer.codebook.detach().T
    best = set(logits_NK.topk(3).indices.flatten().tolist())
    assert len(selected) < len(best) < K or variant in ("lfq", "lfq boosted", "bsq", "fsq")
    reached = codes_reached(quantizer)
    if reach == ENDS:  # the indices name one of them
        assert selected < reached
        assert all(reached & {code - 1, code + 1} for code in selected)
        assert len(reached) <= 2 * 24
        return
    assert reached == {ALL: set(range(K)), SELECTED: selected, BEST: best, NONE: set(), MAP: MAP}[reach]
    if variant != "simvq" and reach == MAP:  # beside the map the embedding learns too
        assert rows_reached(quantizer.embedding.grad) == (selected if term == "codebook" else set(range(K)))
