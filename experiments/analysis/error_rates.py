"""Error rates of the rule of verdicts, by simulation: how often each word is said, given the true effect."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.analysis.verdicts import INCONCLUSIVE, SMALLER, WORDS, holm, p_value, words

EFFECTS = {"none": 0.0, "the threshold": 1.0, "twice the threshold": 2.0}
"""True effects, in thresholds."""
NOISES = (1.0, 4.0)
"""Standard deviations of a paired difference, in thresholds. Medians over the published claims at quick with three
seeds: bits 0.7, FID[fashion-cnn] 1.1, L1 4.1."""
SEEDS = (3, 5, 10)
FAMILY = 10
"""Claims of the family whose errors are counted."""
DRAWS = 4000


def rates() -> pd.DataFrame:
    """Share of experiments in which a single claim, uncorrected, gets each word."""
    random, lines = np.random.default_rng(0), []
    for noise in NOISES:
        for name, effect in EFFECTS.items():
            for seeds in SEEDS:
                said = _words(effect + noise * random.standard_normal((DRAWS, 1, seeds)), corrected=False)
                line = {"noise": f"{noise:g}", "true effect": name, "seeds": str(seeds)}
                lines.append(line | {word: _percent(said == word) for word in WORDS})
    return pd.DataFrame(lines)


def family_errors() -> pd.DataFrame:
    """Share of families in which at least one claim gets a wrong word: any but inconclusive where the true effect is
    the threshold, supported or contradicted where there is none."""
    random, lines = np.random.default_rng(0), []
    for name, right in (("the threshold", [INCONCLUSIVE]), ("none", [INCONCLUSIVE, SMALLER])):
        for seeds in SEEDS:
            drawn = EFFECTS[name] + random.standard_normal((DRAWS, FAMILY, seeds))
            wrong = {
                f"{'' if corrected else 'un'}corrected": _percent(
                    np.isin(_words(drawn, corrected), right, invert=True).any(axis=-1)
                )
                for corrected in (False, True)
            }
            lines.append({"true effect": name, "seeds": str(seeds)} | wrong)
    return pd.DataFrame(lines)


def _words(differences_EFS: NDArray[np.float64], corrected: bool) -> NDArray[np.str_]:
    """Words of E families of F claims with a threshold of 1."""
    p, zero = (p_value(differences_EFS, value) for value in (1.0, 0.0))
    if corrected:
        p, zero = holm(p), holm(zero)
    return words(differences_EFS.mean(axis=-1), 1.0, p, zero)


def _percent(said: NDArray[np.bool_] | np.bool_) -> str:
    return f"{100 * np.mean(said):.1f}%"
