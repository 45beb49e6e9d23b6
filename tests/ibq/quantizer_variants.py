"""Every method, with each of its options at least once, at one small size; what tests of all quantizers run over."""

from __future__ import annotations

from typing import Any

import pytest

from ibq import build_quantizer
from ibq.quantizers import Quantizer, parse_quantizer_config
from ibq.quantizers.contract import trial
from ibq.quantizers.contract.trial import features_for, total_loss, train_step

__all__ = ["VARIANTS", "K", "assert_refused", "every_variant", "features_for", "make", "total_loss", "train_step"]

K = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "vq": {"method": "vq"},
    "vq with entropy": {"method": "vq", "entropy_weight": 0.05},
    "vq cosine": {"method": "vq", "distance": "cosine", "entropy_weight": 0.05},
    "vq ema": {"method": "vq", "ema_decay": 0.8, "beta_on": "commitment", "entropy_weight": 0.05},
    "vq ema cosine": {"method": "vq", "ema_decay": 0.8, "beta_on": "commitment", "distance": "cosine"},
    "vq restart": {"method": "vq", "restart": "dead", "usage_decay": 0.5, "restart_threshold": 0.3},
    "vq ema restart": {
        "method": "vq",
        "ema_decay": 0.8,
        "beta_on": "commitment",
        "restart": "dead",
        "usage_decay": 0.5,
        "restart_threshold": 0.3,
        "codebook_init": "kmeans",
    },
    "vq online": {"method": "vq", "restart": "online"},
    "vq features": {"method": "vq", "codebook_init": "features"},
    "vq kmeans": {"method": "vq", "codebook_init": "kmeans", "distance": "cosine"},
    "vq rotation": {"method": "vq", "gradient": "rotation"},
    "vq linear": {"method": "vq", "reparametrization": "linear", "entropy_weight": 0.05},
    "vq cosine ema restart": {
        "method": "vq",
        "distance": "cosine",
        "ema_decay": 0.8,
        "beta_on": "commitment",
        "restart": "dead",
        "usage_decay": 0.5,
        "restart_threshold": 0.3,
    },
    "vq kmeans rotation": {"method": "vq", "codebook_init": "kmeans", "gradient": "rotation", "entropy_weight": 0.05},
    "vq online cosine": {"method": "vq", "restart": "online", "distance": "cosine"},
    "diveq": {"method": "diveq", "noise_variance": 1e-2, "replace_every": 2},
    "diveq detach": {"method": "diveq", "noise_variance": 0.0, "replace_every": None},
    "diveq curve": {"method": "diveq", "curve": True, "replace_every": None},
    "wasserstein": {"method": "wasserstein"},
    "ibq": {"method": "ibq"},
    "ibq without entropy and double": {"method": "ibq", "entropy_weight": 0.0, "double": False},
    "ibq soft path to features": {"method": "ibq", "soft_path": "features"},
    "ibq soft path to codes": {"method": "ibq", "soft_path": "codes"},
    "ibq top 3": {"method": "ibq", "top_m": 3},
    "ibq top 3 to features": {"method": "ibq", "top_m": 3, "soft_path": "features"},
    "ibq scaled": {"method": "ibq", "logit_scale": "inverse_sqrt_dim"},
    "ibq cosine": {"method": "ibq", "similarity": "cosine", "logit_scale": 4.0},
    "lfq": {"method": "lfq"},
    "lfq boosted": {"method": "lfq", "entropy_boost": 3.0, "entropy_boost_steps": 4},
    "bsq": {"method": "bsq"},
    "bsq entropy of bits": {"method": "bsq", "codebook_entropy": "bits"},
    "fsq": {"method": "fsq", "levels": (4, 4, 4), "code_dim": 3},
    "simvq": {"method": "simvq", "entropy_weight": 0.05},
    "vqbridge": {"method": "vqbridge", "width": 16, "patch": 8, "entropy_weight": 0.05},
    "vqbridge kmeans": {"method": "vqbridge", "width": 8, "heads": 2, "registers": 0, "codebook_init": "kmeans"},
    "optvq": {"method": "optvq", "entropy_weight": 0.05},
    "optvq without map": {"method": "optvq", "reparametrization": "none", "iterations": 3},
    "nsvq": {"method": "nsvq", "halving_steps": 2},
    "nsvq codes": {"method": "nsvq", "spread": "codes", "width": 4.0, "halving_steps": 2, "entropy_weight": 0.05},
    "gumbel": {"method": "gumbel"},
    "gumbel annealed": {"method": "gumbel", "final_temperature": 0.25, "anneal_steps": 4},
    "gumbel without noise": {"method": "gumbel", "noise": False, "kl_weight": 0.0},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str, **fields: Any) -> Quantizer:
    """A variant in training mode, its codebook initialised."""
    return trial.make(parse_quantizer_config({"codebook_size": K, "code_dim": 6} | VARIANTS[variant] | fields))


def assert_refused(config: Any, *mentions: str) -> None:
    """Building this fails, in one sentence that mentions all of these."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        build_quantizer(config)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    assert all(mention in message for mention in mentions), message
