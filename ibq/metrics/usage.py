"""Codebook usage from code counts, next to what uniform sampling of the same number of tokens would give.

Usage alone depends on the tokens counted: 2,048 uniform tokens touch only 86% of 1,024 codes. Every number here is
therefore a function of a count vector whose sum stands beside it. Where codes have parts, those of each part can be
counted whatever their number makes. Sums are float64. Suffixes: K codes, k codes of a part, S those of all parts, one
part after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ibq.quantizers.parts import place_values
from ibq.schema import COUNTABLE_CODES


def uncountable(codebook_size: int) -> str | None:
    """Reason why a codebook has no counts and so no usage, None where it has."""
    if codebook_size <= COUNTABLE_CODES:
        return None
    return f"{codebook_size:,} codes are too many to be counted one by one, {COUNTABLE_CODES:,} are the most"


def counts_of(indices: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Counts (K,) of indices of any shape; (0,) where K is too large to count."""
    if uncountable(codebook_size):
        return torch.zeros(0, dtype=torch.int64, device=indices.device)
    return torch.bincount(indices.flatten(), minlength=codebook_size)


def part_counts_of(indices: torch.Tensor, part_sizes: Sequence[int]) -> torch.Tensor:
    """Counts (S,) of the parts' codes in indices of any shape (`QuantizerConfig.part_sizes`); (0,) without parts."""
    if not part_sizes:
        return torch.zeros(0, dtype=torch.int64, device=indices.device)
    sizes_P, places_P = (torch.tensor(each, device=indices.device) for each in (part_sizes, place_values(part_sizes)))
    digits_NP = indices.flatten()[:, None] // places_P % sizes_P
    first_P = sizes_P.cumsum(0) - sizes_P
    return torch.bincount((first_P + digits_NP).flatten(), minlength=sum(part_sizes))


def part_usage_metrics(counts_S: torch.Tensor, part_sizes: Sequence[int]) -> dict[str, float]:
    """Usage of the parts' codebooks: `part_usage`, the share of a part's codes with a token, and `part_perplexity`, in
    codes of a part; means over parts. Nothing without parts.

    Args:
        counts_S: as `part_counts_of`, of at least one token.
        part_sizes: number of codes of each part.
    """
    if not part_sizes:
        return {}
    of_parts = [usage_metrics(counts_k) for counts_k in counts_S.split(list(part_sizes))]
    return {
        f"part_{name}": sum(of_part[name] for of_part in of_parts) / len(of_parts) for name in ("usage", "perplexity")
    }


def usage_metrics(counts_K: torch.Tensor) -> dict[str, float]:
    """Usage, entropy and perplexity of a set of tokens.

    Args:
        counts_K: tokens assigned to each code (K,), non-negative integers, at least one token.

    Returns:
        tokens: sum of the counts; usage: share of codes with a token; dead_codes: number without one; bits: entropy of
        the empirical distribution in bits per token; perplexity: 2 ** bits, in codes; perplexity_share: perplexity over
        K; top1pct_mass: share of the tokens on the ceil(K / 100) most frequent codes; uniform_usage,
        uniform_perplexity: what as many uniform tokens would give.

    Raises:
        ValueError: the counts are empty, negative or sum to zero.
    """
    counts_K = counts_K.detach().cpu().to(torch.float64)
    tokens = float(counts_K.sum())
    if counts_K.dim() != 1 or tokens <= 0 or float(counts_K.min()) < 0:
        raise ValueError(
            f"counts of shape {tuple(counts_K.shape)} summing to {tokens} are not a count vector with at least one "
            f"token"
        )
    K = len(counts_K)
    share_K = counts_K / tokens
    bits = max(
        0.0, float(-torch.special.xlogy(share_K, share_K).sum()) / math.log(2)
    )  # not -0.0 where one code has every token
    used = int((counts_K > 0).sum())
    uniform_usage, uniform_perplexity = expected_uniform(K, int(tokens))
    return {
        "tokens": tokens,
        "usage": used / K,
        "dead_codes": float(K - used),
        "bits": bits,
        "perplexity": 2**bits,
        "perplexity_share": 2**bits / K,
        "top1pct_mass": float(share_K.sort(descending=True).values[: math.ceil(K / 100)].sum()),
        "uniform_usage": uniform_usage,
        "uniform_perplexity": uniform_perplexity,
    }


def expected_uniform(codebook_size: int, tokens: int) -> tuple[float, float]:
    """Expected usage, and the exponential of the expected entropy, of `tokens` uniform draws from `codebook_size`
    codes.

    The count of one code is binomial(n, 1/K); the sum over its values runs within 12 standard deviations of the mean,
    where all of the mass lies in float64.
    """
    n, p = tokens, 1 / codebook_size
    usage = 1.0 if p == 1 else -math.expm1(n * math.log1p(-p))
    if p == 1:
        return usage, 1.0
    spread = 12 * math.sqrt(n * p) + 30
    j = torch.arange(max(1, int(n * p - spread)), min(n, int(n * p + spread)) + 1, dtype=torch.float64)
    log_pmf = (
        math.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1) + j * math.log(p) + (n - j) * math.log1p(-p)
    )
    share = j / n
    return usage, math.exp(codebook_size * float((log_pmf.exp() * -share * share.log()).sum()))
