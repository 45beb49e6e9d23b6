"""The search for near-duplicates finds another view of one place and nothing in what has no features."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from experiments.benchmarks.near_duplicates import Pair, nearest_pairs


def test_another_view_is_found_shifted_darker_and_mirrored() -> None:
    noise = np.random.default_rng(0)
    places = [gaussian_filter(noise.random((100, 160)), 3).astype(np.float32) for _ in range(4)]
    places = [(place - place.min()) / np.ptp(place) for place in places]
    greys = {f"train{i}": place[:, :130] for i, place in enumerate(places[:3])}
    greys |= {"same": 0.2 + 0.6 * places[1][5:, 30:][:, ::-1], "other": places[3], "flat": np.full((90, 130), 0.5)}
    pairs = nearest_pairs(greys, {"same", "other", "flat"})
    assert [(pair.test, pair.train) for pair in pairs[:1]] == [("same", "train1")]
    assert pairs[0].matches > 30 > 3 * pairs[1].matches
    assert pairs[-1] == Pair(0, "flat", "train0")
