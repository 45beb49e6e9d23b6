"""Images of tokens, sampled from a transformer one token after the other, each sample from a stream of random numbers
of its own.

A symbol (a token, or a sub-token of it) is drawn in this order:
1. guidance: uncond + s * (cond - uncond) of the logits, s by schedule;
2. temperature: the logits divided by it; 0 takes the symbol with the largest, the first of equals;
3. top-k: the k most probable symbols stay; of equals at the border the first ones;
4. top-p: of these, scaled to a sum of 1, the fewest that together have at least the probability p, counted from the
    most probable;
5. min-p: of these, the ones that are at least min_p times as probable as the most probable;
6. the inverse of the cumulative distribution, over the symbols in their own order, at the stream's next number.
All of it in float64, whatever the precision of the transformer.

Suffixes: B samples, R sequences (B, or 2 * B under guidance: the conditional ones, then the unconditional), N tokens of
an image, J symbols of a token, K values of a symbol, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ibq.errors import ConfigError, NonFiniteError, nearest
from ibq.evaluation.tokenizer import evaluating
from ibq.models.transformer import Transformer
from ibq.models.transformer.subtokens import join

Schedule = Literal["constant", "linear", "cosine", "interval"]


@dataclass(frozen=True)
class Guidance:
    """Scale of classifier-free guidance by step: logits of no class + scale * (of the class - of no class).

    Attributes:
        scale: 1 is no guidance, 0 is no class.
        schedule: "constant": `scale` at every step. "linear" and "cosine" go from 1 at the first step to `scale` at the
            last, while r goes from 0 to 1: by r, or by (1 - cos(pi * r**power)) / 2. "interval": `scale` where start <=
            step / steps < end, else 1.
        power: of the cosine; the larger, the later it rises.
        start, end: of the interval, in [0, 1].

    Raises:
        ConfigError: a number out of range, an unknown schedule, or a number that the schedule has no use for.
    """

    scale: float = 1.0
    schedule: Schedule = "constant"
    power: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ConfigError(
                f"schedule={self.schedule!r} of guidance is not known; "
                f"{nearest(str(self.schedule), get_args(Schedule))}"
            )
        _require(
            "guidance scale", self.scale, 0 <= self.scale < math.inf, "a finite number of at least 0; 1 is no guidance"
        )
        _require("guidance power", self.power, 0 < self.power < math.inf, "a finite number above 0")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"guidance from start={self.start} to end={self.end} is no interval; choose 0 <= start < end <= 1"
            )
        if self.power != 1 and self.schedule != "cosine":
            raise ConfigError(
                f"guidance power={self.power} is of schedule 'cosine', and schedule is {self.schedule!r}; leave it at 1"
            )
        if (self.start, self.end) != (0, 1) and self.schedule != "interval":
            raise ConfigError(
                f"guidance from start={self.start} to end={self.end} is of schedule 'interval', and schedule is "
                f"{self.schedule!r}; "
                "leave them at 0 and 1"
            )

    def at(self, step: int, steps: int) -> float:
        """The scale at step 0 to steps - 1."""
        if self.schedule == "interval":
            return self.scale if self.start <= step / steps < self.end else 1.0
        progress = step / (steps - 1) if steps > 1 else 1.0
        risen = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress**self.power)) / 2}[
            self.schedule
        ]
        return 1 + (self.scale - 1) * risen


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k, top-p, min-p and guidance; the module says in which order they apply.

    Attributes:
        temperature: 0 is greedy.
        top_k: None: all symbols.
        top_p: in (0, 1]; 1: all symbols.
        min_p: in [0, 1); 0: all symbols.

    Raises:
        ConfigError: a number out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        _require(
            "temperature",
            self.temperature,
            0 <= self.temperature < math.inf,
            "a finite number of at least 0; 0 is greedy",
        )
        _require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or None for all")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]; 1 is all")
        _require("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1); 0 is all")

    @property
    def guided(self) -> bool:
        """True if the logits of no class are needed."""
        return self.guidance.scale != 1


class Sampler:
    """Samples batches of a fixed size with a cache of keys and values; the transformer computes each position once.

    Args:
        transformer: whole (not sharded), on the device and in the precision to sample in. It is looked at again at each
            call, so its weights may change in between. Sampling is in eval mode without gradients; the mode before is
            restored.
        sampling: how symbols are drawn.
        seed: in [0, 2**64).
        batch_size: samples that are computed at once; fewer are filled up. Memory grows with it.
        compile: by torch.compile, as one graph for all steps, on a GPU recorded once and replayed (CUDA graphs).

    Raises:
        ConfigError: a seed or batch size out of range.
    """

    def __init__(
        self, transformer: Transformer, sampling: Sampling, *, seed: int, batch_size: int, compile: bool = False
    ) -> None:
        _require("batch_size", batch_size, batch_size >= 1, "at least 1")
        _require_seed(seed)
        self.transformer, self.sampling, self.seed, self.batch_size = transformer, sampling, seed, batch_size
        self._batch = _Batch(transformer, sampling, batch_size)
        self._step: nn.Module = self._batch
        if compile:
            self._step = torch.compile(self._batch, mode="reduce-overhead", fullgraph=True, dynamic=False)  # type: ignore[assignment]

    def __call__(self, numbers_B: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N) of samples, int64, row-major, on the transformer's device.

        Args:
            numbers_B: int64, the samples' own numbers, at least 0: with the seed they alone decide the random numbers
                of a sample, whatever batch, process or device it is in.
            classes_B: int64 in [0, classes). B is at most `batch_size`.

        Raises:
            ConfigError: a class or number out of range, or too many of them.
            NonFiniteError: the transformer's logits are not finite; names the sample and the step.
        """
        _require_fitting(self.transformer, numbers_B, classes_B)
        if (B := len(numbers_B)) > self.batch_size:
            raise ConfigError(f"{B} samples do not fit into batch_size={self.batch_size}; pass fewer at a time")
        N, J = self.transformer.config.tokens, len(self.transformer.symbols)
        uniforms_BNJ = random_numbers(self.seed, numbers_B.tolist(), N * J).view(B, N, J)
        with evaluating(self.transformer):
            self._batch.begin(classes_B, uniforms_BNJ)
            for position in range(N):
                self._batch.position.fill_(position)
                self._step()
        _require_finite(self._batch.finite_BN[:B], numbers_B)
        return self._batch.tokens_BN[:B].clone()


class _Batch(nn.Module):
    """All that the steps of a batch read and write, at addresses that stay; `forward` is one step, at `position`."""

    def __init__(self, transformer: Transformer, sampling: Sampling, batch: int) -> None:
        super().__init__()
        self.transformer, self.sampling, self.copies = transformer, sampling, 1 + sampling.guided
        self.cache = transformer.cache(self.copies * batch)
        N, J = transformer.config.tokens, len(transformer.symbols)
        scales = [sampling.guidance.at(step, N) for step in range(N)]
        with self.cache.positions_S.device:
            self.position = nn.Buffer(torch.zeros((), dtype=torch.int64), persistent=False)
            self.tokens_BN = nn.Buffer(torch.zeros(batch, N, dtype=torch.int64), persistent=False)
            self.finite_BN = nn.Buffer(torch.zeros(batch, N, dtype=torch.bool), persistent=False)
            self.uniforms_BNJ = nn.Buffer(torch.zeros(batch, N, J, dtype=torch.float64), persistent=False)
            self.scales_N = nn.Buffer(torch.tensor(scales, dtype=torch.float64), persistent=False)

    def begin(self, classes_B: torch.Tensor, uniforms_BNJ: torch.Tensor) -> None:
        B, batch = len(classes_B), len(self.tokens_BN)
        self.uniforms_BNJ[:B] = uniforms_BNJ.to(self.uniforms_BNJ.device)
        classes_R = F.pad(classes_B.to(self.position.device), (0, batch - B))
        if self.sampling.guided:
            classes_R = torch.cat([classes_R, torch.full_like(classes_R, self.transformer.config.classes)])
        self.transformer.begin(classes_R, self.cache)

    def forward(self) -> None:
        position_1 = self.position.view(1)
        before_B = self.tokens_BN.index_select(1, (position_1 - 1).clamp(min=0))[:, 0]
        hidden_RW = self.transformer.step(before_B.repeat(self.copies), self.position, self.cache)
        uniforms_BJ = self.uniforms_BNJ.index_select(1, position_1)[:, 0]
        tokens_B, finite_B = draw_tokens(
            self.transformer, hidden_RW, uniforms_BJ, self.sampling, self.scales_N.index_select(0, position_1)
        )
        self.tokens_BN.index_copy_(1, position_1, tokens_B[:, None])
        self.finite_BN.index_copy_(1, position_1, finite_B[:, None])


def sample_uncached(
    transformer: Transformer, sampling: Sampling, *, seed: int, numbers_B: torch.Tensor, classes_B: torch.Tensor
) -> torch.Tensor:
    """Reference for `Sampler`: the same samples by a full forward pass for every token; same arguments and errors."""
    _require_seed(seed)
    _require_fitting(transformer, numbers_B, classes_B)
    device, N, J = transformer.head_nm.rmsnorm.weight.device, transformer.config.tokens, len(transformer.symbols)
    uniforms_BNJ = random_numbers(seed, numbers_B.tolist(), N * J).view(len(numbers_B), N, J).to(device)
    tokens_BT = torch.zeros(len(numbers_B), 0, dtype=torch.int64, device=device)
    conditions = [classes_B.to(device)]
    if sampling.guided:
        conditions.append(torch.full_like(conditions[0], transformer.config.classes))
    with evaluating(transformer):
        for step in range(N):
            hidden_RW = torch.cat([transformer.hidden(tokens_BT, classes_B)[:, -1] for classes_B in conditions])
            scale_1 = torch.tensor([sampling.guidance.at(step, N)], dtype=torch.float64, device=device)
            tokens_B, finite_B = draw_tokens(transformer, hidden_RW, uniforms_BNJ[:, step], sampling, scale_1)
            _require_finite(finite_B[:, None], numbers_B, step)
            tokens_BT = torch.cat([tokens_BT, tokens_B[:, None]], dim=1)
    return tokens_BT


# --- One token --------------------------------------------------------------------------------------------------------


def draw_tokens(
    transformer: Transformer,
    hidden_RW: torch.Tensor,
    uniforms_BJ: torch.Tensor,
    sampling: Sampling,
    scale_1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens (B,), symbol by symbol, and of which samples (B,) all logits were finite; the tokens of the
    others mean nothing.

    Args:
        hidden_RW: at the position before; under guidance of the conditional sequences, then of the unconditional ones.
        uniforms_BJ: float64 in [0, 1), a number for every symbol.
        scale_1: float64, of the guidance at this step.
    """
    B, J = uniforms_BJ.shape
    symbols_BJ, finite_B = uniforms_BJ.new_zeros(B, 0, dtype=torch.int64), uniforms_BJ.new_ones(B, dtype=torch.bool)
    guided = len(hidden_RW) > B  # asked of the sampling's scale, every scale would have a graph of its own
    for j in range(J):
        logits_BK = transformer.symbol_logits(hidden_RW, symbols_BJ.repeat(1 + guided, 1)).double()
        if guided:
            conditional_BK, unconditional_BK = logits_BK.chunk(2)
            logits_BK = unconditional_BK + scale_1 * (conditional_BK - unconditional_BK)
        finite_B = finite_B & logits_BK.isfinite().all(1)
        symbols_BJ = torch.cat([symbols_BJ, draw(logits_BK, uniforms_BJ[:, j], sampling)[:, None]], dim=1)
    return join(symbols_BJ, transformer.symbols), finite_B


def draw(logits_BK: torch.Tensor, uniforms_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """A symbol (B,) each of guided logits, at numbers of [0, 1); both float64."""
    if sampling.temperature == 0:
        return logits_BK.argmax(1)
    cumulative_BK = probabilities(logits_BK, sampling).cumsum(1)
    thresholds_B1 = uniforms_B[:, None] * cumulative_BK[:, -1:]
    return (cumulative_BK <= thresholds_B1).sum(1)


def probabilities(logits_BK: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Unnormalised probabilities of the symbols at a temperature above 0, (B, K) float64; 0 for those that are cut
    off."""
    scaled_BK = (logits_BK - logits_BK.amax(1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled_BK.shape[1]:
        scaled_BK = scaled_BK.masked_fill(~_largest(scaled_BK, sampling.top_k), -math.inf)
    p_BK = scaled_BK.softmax(1)
    if sampling.top_p < 1:
        p_BK = p_BK.where(_nucleus(p_BK, sampling.top_p), 0)
    if sampling.min_p > 0:
        p_BK = p_BK.where(p_BK >= sampling.min_p * p_BK.amax(1, keepdim=True), 0)
    return p_BK


def _largest(scores_BK: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k largest of a row, the first of equals."""
    border_B1 = scores_BK.topk(k).values[:, -1:]
    above_BK, equal_BK = scores_BK > border_B1, scores_BK == border_B1
    return above_BK | (equal_BK & (equal_BK.cumsum(1) <= k - above_BK.sum(1, keepdim=True)))


def _nucleus(p_BK: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the fewest of a row, counted from the largest (the first of equals), that together have at least
    top_p."""
    sorted_BK, order_BK = p_BK.sort(dim=1, descending=True, stable=True)
    before_BK = F.pad(sorted_BK.cumsum(1)[:, :-1], (1, 0))
    kept_BK = before_BK < top_p
    return kept_BK.scatter(1, order_BK, kept_BK)


def random_numbers(seed: int, numbers: Sequence[int], count: int) -> torch.Tensor:
    """The first `count` numbers of each sample's stream: (B, count) float64 in [0, 1), on the CPU.

    The stream is Philox with (seed, number) as its key: no two of them share a stream, as they would in torch's own
    generator, which keeps 32 bits of a seed. Numbers are multiples of 2**-52, so that a sum of probabilities times one
    of them is never rounded up to the sum.
    """
    raw = [np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).random_raw(count) for number in numbers]
    bits_BC = np.array(raw, dtype=np.uint64).reshape(len(numbers), count) >> np.uint64(12)
    return torch.from_numpy(bits_BC.astype(np.float64) * 2.0**-52)


# --- What is refused --------------------------------------------------------------------------------------------------


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value} must be {allowed}")


def _require_seed(seed: int) -> None:
    _require("seed", seed, 0 <= seed < 2**64, "in [0, 2**64)")


def _require_fitting(transformer: Transformer, numbers_B: torch.Tensor, classes_B: torch.Tensor) -> None:
    if numbers_B.dim() != 1 or numbers_B.shape != classes_B.shape:
        raise ConfigError(
            f"numbers of shape {tuple(numbers_B.shape)} and classes of shape {tuple(classes_B.shape)} do not fit; pass "
            f"(B,) and (B,)"
        )
    classes = transformer.config.classes
    for wrong in (label for label in classes_B.tolist() if not 0 <= label < classes):
        raise ConfigError(f"class {wrong} is not one of the transformer's {classes:,}; choose from 0 to {classes - 1}")
    for wrong in (number for number in numbers_B.tolist() if number < 0):
        raise ConfigError(f"{wrong} is no sample's number; they count from 0")


def _require_finite(finite_BN: torch.Tensor, numbers_B: torch.Tensor, first_step: int = 0) -> None:
    """Raises NonFiniteError for the earliest step, and of its samples the first, that is False."""
    if not bool(finite_BN.all()):
        step, sample = (~finite_BN).T.nonzero()[0].tolist()
        raise NonFiniteError(
            f"the transformer's logits of sample {int(numbers_B[sample])} are not finite at step {first_step + step}, "
            f"counted from 0; "
            "its weights are damaged, or its precision is too low"
        )
