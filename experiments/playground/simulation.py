"""One step of learning after another for several quantizers on the same features, and what is to be seen of each.

Features are data here: there is no encoder that could move them, and the decoder is the identity. So the loss is the
reconstruction error |z_q - z|^2 (mean over elements) and the quantizer's own terms with its config's weights, and Adam
moves the quantizer's parameters alone, with the betas that the study trains with. Suffixes: N features, K codes, D = 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from experiments.playground.drift import Drift
from ibq.errors import ConfigError, nearest
from ibq.metrics.codebook import gradient_reach
from ibq.metrics.usage import usage_metrics
from ibq.quantizers import Quantizer, build_quantizer
from ibq.quantizers.vq import VectorQuantizer
from ibq.training.config import OptimConfig

CODES = 64
FEATURES = 256
"""A step."""
PROBE = 1024
"""Features of the mixture as it stands, on which usage and error are counted: the same draw throughout, moved along
with the centres."""
STEPS_A_ROUND = 500
"""At speed 1."""

METHODS: dict[str, dict[str, Any]] = {
    "VQ": {"method": "vq"},
    "VQ, U(±1/K) init": {"method": "vq", "codebook_init": "uniform"},
    "VQ, restarts": {"method": "vq", "restart": "dead"},
    "VQ, online clustering": {"method": "vq", "restart": "online"},
    "VQ, entropy penalty": {"method": "vq", "entropy_weight": 0.05},
    "VQ, moving averages": {"method": "vq", "ema_decay": 0.99, "beta_on": "commitment"},
    "VQ, linear codes": {"method": "vq", "reparametrization": "linear"},
    "SimVQ": {"method": "simvq"},
    "Gumbel-softmax": {"method": "gumbel"},
    "IBQ as released": {"method": "ibq"},
    "IBQ, no entropy": {"method": "ibq", "entropy_weight": 0.0},
    "IBQ, no double term": {"method": "ibq", "double": False},
    "IBQ, cosine": {"method": "ibq", "similarity": "cosine"},
}
"""Fields of each quantizer's config. Codes begin at N(0, 1), the same draw for all, where a method or its label does
not say otherwise."""
DEFAULT_METHODS = ("VQ", "VQ, restarts", "SimVQ", "IBQ as released")


@dataclass(frozen=True)
class Settings:
    """Settings of a playground: seed, Adam's learning rate, speed of the drift in rounds per 500 steps, and the
    mixture's distance from the origin (`Drift`).

    Raises:
        ConfigError: a value that no playground can have.
    """

    seed: int = 0
    lr: float = 0.01
    speed: float = 1.0
    distance: float = 2.0

    def __post_init__(self) -> None:
        for name, least, strict in (("seed", 0, False), ("lr", 0, True), ("speed", 0, False), ("distance", 0, False)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least or (strict and value == least):
                raise ConfigError(
                    f"{name}={value} must be a finite number {'above' if strict else 'of at least'} {least}"
                )


@dataclass(frozen=True)
class Observation:
    """A learner as it stands: codes and what the last step pulled them with, both (K, 2), and counts on the probe.

    Attributes:
        pull_KD: see `Learner.pull`.
        counts_K: probe features of each code.
        restarted_K: bool, put on a feature since the observation before.
        error: mean squared error of the probe, over elements, against the features themselves.
        pulled, reach: codes whose pull exceeds Adam's eps, and the effective number of codes that the pull reaches
            (`ibq.metrics.codebook.gradient_reach`).
    """

    codes_KD: torch.Tensor
    pull_KD: torch.Tensor
    counts_K: torch.Tensor
    restarted_K: torch.Tensor
    perplexity: float
    error: float
    pulled: int
    reach: float

    @property
    def in_use(self) -> int:
        """Codes that some probe feature is given."""
        return int((self.counts_K > 0).sum())


class Learner:
    """One quantizer of 64 codes in the plane that learns from features by Adam.

    Args:
        label: of `METHODS`.
        seed: of its codes and of whatever the method draws; the global random state is left alone.
        lr: of Adam.
    """

    def __init__(self, label: str, seed: int, lr: float) -> None:
        if label not in METHODS:
            raise ConfigError(f"method {label!r} does not exist; {nearest(label, METHODS)}")
        fields = METHODS[label]
        init = {} if fields["method"] == "simvq" else {"codebook_init": "normal"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.quantizer: Quantizer = build_quantizer({"codebook_size": CODES, "code_dim": 2, **init, **fields})
            self._random_state = torch.get_rng_state()
        self.label = label
        learnt = [parameter for parameter in self.quantizer.parameters() if parameter.requires_grad]
        self.adam = torch.optim.Adam(learnt, lr=lr, betas=OptimConfig().betas) if learnt else None
        self._pull_KD = torch.zeros(CODES, 2)
        self._restarted_K = torch.zeros(CODES, dtype=torch.bool)

    def set_lr(self, lr: float) -> None:
        for group in self.adam.param_groups if self.adam else ():
            group["lr"] = lr

    def loss(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Reconstruction by the identity, and the quantizer's own terms."""
        z_BDHW = as_feature_map(z_ND)
        quantized = self.quantizer(z_BDHW)
        weights = self.quantizer.config.loss_weights
        own = [weights[name] * term for name, term in quantized.losses.items()]
        return torch.stack([(quantized.z_q - z_BDHW).square().mean(), *own]).sum()

    def step(self, z_ND: torch.Tensor, watched: bool = False) -> None:
        """Learn from features (N, 2); where the step is watched, `observe` will tell what it pulled the codes with."""
        with self._own_randomness():
            loss = self.loss(z_ND)
        if self.adam is not None:
            self.adam.zero_grad()
            loss.backward()
        if watched:
            self._pull_KD = self.pull()
        if self.adam is not None:
            self.adam.step()
        restart = self.quantizer.restart if isinstance(self.quantizer, VectorQuantizer) else None
        if restart is not None:
            self._restarted_K |= restart.applied_K > 0.5

    def pull(self) -> torch.Tensor:
        """Pull of the loss (or the moving average) on each code (K, 2), before Adam makes a step of it.

        For codes that are parameters themselves it is minus their gradient. For codes that are a function of parameters
        (a linear map, unit length) it is what a small step of plain gradient descent on these does to the codes, per
        unit of learning rate. For moving averages it is the move itself, beyond rounding.
        """
        average = self.quantizer.moving_average if isinstance(self.quantizer, VectorQuantizer) else None
        if average is not None:
            codes_KD = self.quantizer.codebook.detach()
            moved_KD = codes_KD.clone()
            average.apply_to(moved_KD)
            move_KD = moved_KD - codes_KD
            rounding = 32 * torch.finfo(codes_KD.dtype).eps
            return torch.where(
                move_KD.norm(dim=1, keepdim=True) > rounding * codes_KD.norm(dim=1, keepdim=True), move_KD, 0.0
            )
        codes_KD = self.quantizer.codebook
        learnt = [parameter for parameter in self.quantizer.parameters() if parameter.grad is not None]
        descent = [-parameter.grad for parameter in learnt if parameter.grad is not None]
        probe_KD = torch.zeros_like(
            codes_KD, requires_grad=True
        )  # the derivative of J^T v by v, along the descent, is J times the descent
        pulled_back = torch.autograd.grad(codes_KD, learnt, probe_KD, create_graph=True)
        (pull_KD,) = torch.autograd.grad(pulled_back, probe_KD, descent)
        return pull_KD

    @torch.no_grad()
    def observe(self, probe_ND: torch.Tensor) -> Observation:
        """Count codes and error on the probe (N, 2); restarts are counted anew from here."""
        self.quantizer.eval()
        z_BDHW = as_feature_map(probe_ND)
        quantized = self.quantizer(z_BDHW)
        self.quantizer.train()
        counts_K = torch.bincount(quantized.indices.flatten(), minlength=CODES)
        reach = gradient_reach(self._pull_KD)
        restarted_K, self._restarted_K = self._restarted_K, torch.zeros_like(self._restarted_K)
        return Observation(
            codes_KD=self.quantizer.codebook.detach().clone(),
            pull_KD=self._pull_KD,
            counts_K=counts_K,
            restarted_K=restarted_K,
            perplexity=usage_metrics(counts_K)["perplexity"],
            error=float((quantized.z_q - z_BDHW).square().mean()),
            pulled=round(reach["reach_above_eps"] * CODES),
            reach=reach["reach_effective"],
        )

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Random numbers of the method do not depend on what others draw."""
        if not self.quantizer.config.changes_in_forward:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            yield
            self._random_state = torch.get_rng_state()


class Playground:
    """Learners of several methods on the same drifting features.

    Speed and learning rate may be changed at any time (`change`); the mixture goes on from where it is.

    Args:
        methods: labels of `METHODS`, each once.
        settings: see there.

    Raises:
        ConfigError: no method, the same one twice, or one that does not exist.
    """

    def __init__(self, methods: Sequence[str] = DEFAULT_METHODS, settings: Settings = Settings()) -> None:
        if not methods or len(set(methods)) != len(methods):
            raise ConfigError(f"methods {', '.join(methods) or '(none)'} must be one or more, each named once")
        self.settings, self.drift = settings, Drift(settings.distance)
        self.learners = [Learner(label, settings.seed, settings.lr) for label in methods]
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._probe_seed = settings.seed + 1
        self.steps, self.phase = 0, 0.0

    def change(self, lr: float, speed: float) -> None:
        """From now on."""
        self.settings = Settings(self.settings.seed, lr, speed, self.settings.distance)
        for learner in self.learners:
            learner.set_lr(lr)

    def advance(self, steps: int) -> None:
        """So many steps of every learner; the last one is watched."""
        for left in reversed(range(steps)):
            self.phase += self.settings.speed / STEPS_A_ROUND
            z_ND = self.drift.features(self.phase, FEATURES, self._generator)
            for learner in self.learners:
                learner.step(z_ND, watched=left == 0)
            self.steps += 1

    def probe(self) -> torch.Tensor:
        """(N, 2): the same draw at every moment, where the mixture stands now."""
        return self.drift.features(self.phase, PROBE, torch.Generator().manual_seed(self._probe_seed))

    def observe(self) -> dict[str, Observation]:
        """Of every method, by label."""
        probe_ND = self.probe()
        return {learner.label: learner.observe(probe_ND) for learner in self.learners}


def as_feature_map(z_ND: torch.Tensor) -> torch.Tensor:
    """(1, 2, N, 1)."""
    return z_ND.T[None, :, :, None]
