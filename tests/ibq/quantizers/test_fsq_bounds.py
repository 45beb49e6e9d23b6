"""FSQ bounded by a sigmoid (iFSQ) and by a CDF with noise in place of rounding (FSP)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from quantizer_variants import assert_refused
from scipy.stats import norm
from vector_quantize_pytorch import FSP

from ibq import build_quantizer
from ibq.quantizers import Quantizer

N = 4000


def make(levels: tuple[int, ...], bound: str, **fields: Any) -> Quantizer:
    sizes = {"levels": levels, "codebook_size": math.prod(levels), "code_dim": len(levels)}
    return build_quantizer({"method": "fsq", "bound": bound} | sizes | fields)


def features(D: int) -> torch.Tensor:
    return (1.5 * torch.randn(N, D, dtype=torch.float64)).requires_grad_()


# --- Sigmoid ----------------------------------------------------------------------------------------------------------


def test_a_sigmoid_bounds_and_rounds_as_ifsq_does() -> None:
    """Their formula is for odd levels: round((2 sigmoid(1.6 z) - 1) (L - 1) / 2) over (L - 1) / 2."""
    levels, quantizer = (17, 5, 3), make((17, 5, 3), "sigmoid")
    z_ND = features(3)
    half_D = torch.tensor([(level - 1) / 2 for level in levels], dtype=torch.float64)
    bounded_ND = (2 / (1 + (-1.6 * z_ND).exp()) - 1) * half_D
    digits_ND = bounded_ND.detach().round() + half_D
    z_q_ND, indices_N, losses = quantizer.quantize(z_ND)
    assert losses == {}
    torch.testing.assert_close(z_q_ND.detach(), (digits_ND - half_D) / half_D, rtol=0, atol=1e-7)
    assert torch.equal(indices_N, (digits_ND @ torch.tensor([1.0, 17, 85], dtype=torch.float64)).long())
    g_ND = torch.randn_like(z_ND)
    gradients = [torch.autograd.grad(output, [z_ND], g_ND)[0] for output in (z_q_ND, bounded_ND / half_D)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bound", ["sigmoid", "cdf"])
@pytest.mark.parametrize("level", [3, 4, 5, 8, 256])
def test_every_level_is_reached_and_none_beyond_and_both_sides_are_alike(bound: str, level: int) -> None:
    quantizer = make((level, 3), bound).eval()
    line_N = torch.linspace(-20, 20, 40_001)
    z_q_ND, indices_N, _ = quantizer.quantize(torch.stack([line_N, torch.zeros(40_001)], 1))
    digits_N = indices_N % level
    assert digits_N.unique().tolist() == list(range(level))
    assert (z_q_ND[1:, 0] >= z_q_ND[:-1, 0]).all()
    mirrored_N = level - 1 - digits_N.flip(0)
    assert (digits_N != mirrored_N).sum() <= 2 * level, "but where a border lies on a point"


def test_normal_features_use_levels_more_evenly_than_under_a_tanh_and_all_bins_of_a_cdf_alike() -> None:
    z_ND = torch.randn(200_000, 1, dtype=torch.float64)
    share = {}
    for bound in ("tanh", "sigmoid", "cdf"):
        counts_L = torch.bincount(make((8,), bound).eval().quantize(z_ND)[1], minlength=8)
        share[bound] = counts_L / len(z_ND)
    inner = {bound: share_L[1:-1] for bound, share_L in share.items()}  # outer levels of a sigmoid are half as wide
    assert inner["sigmoid"].std() < inner["tanh"].std() / 4
    torch.testing.assert_close(share["cdf"], torch.full((8,), 1 / 8), rtol=0, atol=0.004)


# --- CDF and noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_a_cdf_with_noise_is_the_librarys_fsp(training: bool) -> None:
    """Codes, indices and gradients; the noise is the same draw of the same generator. They divide by L in float32."""
    levels = (8, 5, 5, 3)
    mine = make(levels, "cdf").train(training)
    theirs = FSP(levels, act_name="normal", vector_norm="none").train(training)
    z_ND = features(4)
    torch.manual_seed(3)
    codes_ND, theirs_N, _, _ = theirs(z_ND)
    torch.manual_seed(3)
    z_q_ND, indices_N, losses = mine.quantize(z_ND)
    assert losses == {}
    assert torch.equal(indices_N, theirs_N.long())
    torch.testing.assert_close(z_q_ND, codes_ND, rtol=0, atol=2e-7)
    g_ND = torch.randn_like(z_ND)
    gradients = [torch.autograd.grad(output, [z_ND], g_ND)[0] for output in (z_q_ND, codes_ND)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mine.indices_to_codes(indices_N[None])[0], theirs.indices_to_codes(indices_N))


def test_noise_spans_a_bin_in_training_alone_and_the_index_does_without() -> None:
    levels, z_ND = (8, 4), features(2)
    quantizer = make(levels, "cdf")
    share_ND = norm.cdf(z_ND.detach().numpy())
    noisy_ND = (quantizer.quantize(z_ND)[0].detach() * 12**-0.5 + 0.5).numpy()
    distance_ND = (noisy_ND - share_ND) * np.array(levels)
    assert np.abs(distance_ND).max() <= 0.5
    assert ((noisy_ND > 0) & (noisy_ND < 1)).all()
    untouched_ND = distance_ND == pytest.approx(0, abs=1e-12)
    near_the_end_ND = (share_ND < 0.5 / np.array(levels)) | (share_ND > 1 - 0.5 / np.array(levels))
    assert near_the_end_ND[untouched_ND].all()
    inside = distance_ND[~near_the_end_ND]
    assert inside.std() == pytest.approx(12**-0.5, rel=0.03)
    indices = [each.quantize(z_ND)[1] for each in (quantizer, quantizer, quantizer.eval())]
    assert torch.equal(indices[0], indices[1])
    assert torch.equal(indices[0], indices[2])
    assert torch.equal(*(quantizer.quantize(z_ND)[0] for _ in range(2)))


def test_noise_is_what_takes_training_off_the_codes_and_micro_batches_away() -> None:
    for bound, noise, between in (("tanh", True, False), ("cdf", False, False), ("cdf", True, True)):
        quantizer = make((4, 4), bound, noise=noise)
        assert quantizer.trains_between_codes == quantizer.config.changes_in_forward == between


def test_noise_without_a_cdf_is_one_sentence() -> None:
    assert_refused(
        {"method": "fsq", "bound": "sigmoid", "noise": False}, "noise=False", "bound='sigmoid'", "leave it out"
    )
