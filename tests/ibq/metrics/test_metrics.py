"""Usage and quality against brute force, Monte Carlo and scikit-image."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ibq.metrics.quality import ImageQuality
from ibq.metrics.usage import expected_uniform, part_counts_of, part_usage_metrics, usage_metrics

counts = st.lists(st.integers(0, 50), min_size=1, max_size=250).filter(any)


# --- Usage ------------------------------------------------------------------------------------------------------------


@given(counts)
def test_usage_is_what_counting_token_by_token_gives(values: list[int]) -> None:
    tokens = [code for code, count in enumerate(values) for _ in range(count)]
    histogram = collections.Counter(tokens)
    bits = -sum(count / len(tokens) * math.log2(count / len(tokens)) for count in histogram.values())
    top = sum(count for _, count in histogram.most_common(-(-len(values) // 100)))
    metrics = usage_metrics(torch.tensor(values))
    assert metrics["tokens"] == len(tokens)
    assert metrics["usage"] == len(histogram) / len(values)
    assert metrics["dead_codes"] == len(values) - len(histogram)
    assert metrics["bits"] == pytest.approx(bits, abs=1e-12)
    assert metrics["perplexity"] == pytest.approx(2**bits)
    assert metrics["perplexity_share"] == pytest.approx(2**bits / len(values))
    assert metrics["top1pct_mass"] == pytest.approx(top / len(tokens))


@given(counts, st.randoms(use_true_random=False))
def test_usage_does_not_depend_on_the_names_of_the_codes(values: list[int], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    assert usage_metrics(torch.tensor(shuffled)) == pytest.approx(
        usage_metrics(torch.tensor(values)), rel=1e-12, abs=1e-12
    )


def test_limits_of_usage() -> None:
    collapsed, uniform = usage_metrics(torch.tensor([0, 700, 0, 0])), usage_metrics(torch.tensor([5, 5, 5, 5]))
    assert (collapsed["usage"], collapsed["bits"], collapsed["perplexity"], collapsed["dead_codes"]) == (0.25, 0, 1, 3)
    assert (uniform["usage"], uniform["bits"], uniform["perplexity"], uniform["dead_codes"]) == (1, 2, 4, 0)
    only = usage_metrics(torch.tensor([3]))
    assert (
        only["usage"],
        only["perplexity"],
        only["top1pct_mass"],
        only["uniform_usage"],
        only["uniform_perplexity"],
    ) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("codebook_size", "tokens"), [(1, 5), (2, 1), (2, 3), (16, 16), (50, 2000), (1024, 2048), (3, 100_000)]
)
def test_uniform_expectations_against_monte_carlo(codebook_size: int, tokens: int) -> None:
    draws = np.random.default_rng(0).multinomial(tokens, np.full(codebook_size, 1 / codebook_size), size=400)
    shares = draws / tokens
    entropies = -(shares * np.log(np.where(draws, shares, 1))).sum(1)
    usage, perplexity = expected_uniform(codebook_size, tokens)
    for value, sample in ((usage, (draws > 0).mean(1)), (math.log(perplexity), entropies)):
        assert value == pytest.approx(sample.mean(), abs=4.5 * sample.std() / math.sqrt(len(sample)) + 1e-9)


def test_2048_uniform_tokens_touch_86_percent_of_1024_codes() -> None:
    usage, perplexity = expected_uniform(1024, 2048)
    assert usage == pytest.approx(1 - (1 - 1 / 1024) ** 2048)
    assert round(100 * usage) == 86
    assert perplexity < 1024
    metrics = usage_metrics(torch.full((1024,), 2))
    assert (metrics["uniform_usage"], metrics["uniform_perplexity"]) == (usage, perplexity)


@given(st.integers(1, 2**18), st.integers(1, 10**7))
def test_uniform_expectations_stay_within_their_bounds(codebook_size: int, tokens: int) -> None:
    usage, perplexity = expected_uniform(codebook_size, tokens)
    assert 0 < usage <= 1
    assert 1 - 1e-6 <= perplexity <= min(codebook_size, tokens) * (1 + 1e-6)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.tensor([3, -1]), torch.ones(2, 2), torch.zeros(0)])
def test_what_is_no_count_vector_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not a count vector") as caught:
        usage_metrics(bad)
    assert str(tuple(bad.shape)) in str(caught.value)
    assert str(float(bad.sum())) in str(caught.value)


@pytest.mark.parametrize("sizes", [(2,) * 36, (8, 5, 3), (4096, 64)])
def test_usage_of_parts_is_what_counting_their_digits_gives(sizes: tuple[int, ...]) -> None:
    indices = [int(index) for index in torch.randint(math.prod(sizes), (500,))]
    counts_S = part_counts_of(torch.tensor(indices).view(5, 10, 10), sizes)
    usage, perplexity, first = [], [], 0
    for p, size in enumerate(sizes):
        counts = collections.Counter(index // math.prod(sizes[:p]) % size for index in indices)
        assert counts_S[first : first + size].tolist() == [counts[k] for k in range(size)]
        usage.append(len(counts) / size)
        perplexity.append(math.exp(-sum(n / 500 * math.log(n / 500) for n in counts.values())))
        first += size
    assert len(counts_S) == first
    assert part_usage_metrics(counts_S, sizes) == pytest.approx(
        {"part_usage": np.mean(usage), "part_perplexity": np.mean(perplexity)}
    )


def test_codes_without_parts_have_no_usage_of_parts() -> None:
    assert part_counts_of(torch.arange(5), ()).shape == (0,)
    assert part_usage_metrics(torch.zeros(0, dtype=torch.int64), ()) == {}


# --- Quality ----------------------------------------------------------------------------------------------------------


def pictures(n: int = 7, channels: int = 3, side: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images in [-1, 1] and noisy copies that leave it."""
    coarse = torch.rand(n, channels, 6, 6) * 2 - 1
    x_BCHW = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)
    noise = torch.linspace(0.05, 0.6, n).view(n, 1, 1, 1) * torch.randn_like(x_BCHW)
    return x_BCHW, x_BCHW + noise


def quality(x_BCHW: torch.Tensor, y_BCHW: torch.Tensor, batch_size: int = 100) -> dict[str, float]:
    streaming = ImageQuality()
    for x, y in zip(x_BCHW.split(batch_size), y_BCHW.split(batch_size), strict=True):
        streaming.update(x, y)
    assert streaming.images == len(x_BCHW)
    return streaming.compute()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    x_BCHW, y_BCHW = pictures()
    assert quality(x_BCHW, y_BCHW, batch_size) == pytest.approx(quality(x_BCHW, y_BCHW), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_quality_of_pictures_is_the_same_bit_for_bit_in_any_order(batch_size: int) -> None:
    x_BCHW, y_BCHW = pictures()
    found = []
    for order_B in (torch.arange(7), torch.tensor([3, 6, 0, 2, 5, 1, 4])):
        streaming = ImageQuality()
        for indices_B in order_B.split(batch_size):
            streaming.update(x_BCHW[indices_B], y_BCHW[indices_B])
        found.append(streaming.compute())
    assert found[0] == pytest.approx(quality(x_BCHW, y_BCHW), rel=1e-6)
    assert [found[0][name] for name in ("l1", "mse", "psnr_db")] == [
        found[1][name] for name in ("l1", "mse", "psnr_db")
    ]
    assert (streaming.images, streaming.without_ssim) == (7, 0)


def test_a_picture_below_the_window_leaves_out_ssim_alone() -> None:
    streaming = ImageQuality()
    for side in (24, 8):
        streaming.update(*pictures(2, side=side))
    assert streaming.compute().keys() == {"l1", "mse", "psnr_db"}
    assert (streaming.images, streaming.without_ssim) == (4, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_quality_equals_scikit_image_per_picture(channels: int) -> None:
    """SSIM on [0, 1]: a Gaussian window of 11 with sigma 1.5, the mean over all pixels, beyond the border mirrored
    ones.

    scikit-image leaves out the 5 pixels at the border, so here it is given pictures with 5 mirrored ones around them.
    Tolerance 2e-5 since the windows are summed in float32.
    """

    def mirrored(picture_CHW: np.ndarray) -> np.ndarray:
        return np.pad((picture_CHW + 1) / 2, ((0, 0), (5, 5), (5, 5)), mode="reflect")

    x_BCHW, y_BCHW = pictures(channels=channels)
    arguments = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 1.0,
        "channel_axis": 0,
    }
    pairs = [(x.double().numpy(), y.clamp(-1, 1).double().numpy()) for x, y in zip(x_BCHW, y_BCHW, strict=True)]
    expected = {
        "ssim": np.mean([structural_similarity(mirrored(x), mirrored(y), **arguments) for x, y in pairs]),
        "psnr_db": np.mean([peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in pairs]),
        "l1": np.mean([np.abs(x - y).mean() for x, y in pairs]),
        "mse": np.mean([np.square(x - y).mean() for x, y in pairs]),
    }
    actual = quality(x_BCHW, y_BCHW)
    assert actual["ssim"] == pytest.approx(expected.pop("ssim"), abs=2e-5)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-9), name


def test_psnr_is_a_mean_over_pictures_not_of_the_mean_error() -> None:
    x_BCHW = torch.zeros(2, 1, 16, 16)
    y_BCHW = torch.stack([torch.full((1, 16, 16), 0.02), torch.full((1, 16, 16), 0.2)])
    assert quality(x_BCHW, y_BCHW)["psnr_db"] == pytest.approx((40 + 20) / 2, abs=1e-4)


def test_identical_pictures() -> None:
    x_BCHW, _ = pictures()
    same = quality(x_BCHW, x_BCHW)
    assert (same["l1"], same["mse"]) == (0, 0)
    assert same["ssim"] == pytest.approx(1, abs=1e-6)
    assert same["psnr_db"] == pytest.approx(106.02, abs=0.01)


def test_more_noise_is_worse_by_every_measure() -> None:
    x_BCHW, _ = pictures()
    noise = torch.randn_like(x_BCHW)
    low, high = (quality(x_BCHW, x_BCHW + scale * noise) for scale in (0.05, 0.3))
    assert low["l1"] < high["l1"]
    assert low["mse"] < high["mse"]
    assert low["psnr_db"] > high["psnr_db"]
    assert low["ssim"] > high["ssim"]


def test_reconstructions_are_clamped_and_inputs_untouched() -> None:
    x_BCHW, y_BCHW = pictures()
    before = y_BCHW.clone()
    assert y_BCHW.abs().max() > 1
    assert quality(x_BCHW, y_BCHW) == quality(x_BCHW, y_BCHW.clamp(-1, 1))
    assert torch.equal(y_BCHW, before)


def test_unfit_pictures_are_refused_with_both_values() -> None:
    x_BCHW, _ = pictures()
    with pytest.raises(ValueError, match=r"\(7, 3, 24, 24\) and \(6, 3, 24, 24\)"):
        ImageQuality().update(x_BCHW, x_BCHW[1:])
    with pytest.raises(ValueError, match=r"reach 2\.000 .*\[-1, 1\]"):
        ImageQuality().update(torch.full((1, 1, 16, 16), 2.0), torch.zeros(1, 1, 16, 16))
