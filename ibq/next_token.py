"""The loss of stage two: the cross-entropy of the next token, without the logits of all tokens over all codes ever being in memory.

At 2^18 codes the logits of one image of 256 tokens take 256 MiB in float32, and a batch has hundreds of images. So the codes are gone
through in chunks, twice: once for the normalizer of every token, and once more in the backward pass, where the logits are computed again.
Cut over the codes, not over the tokens, so that the gradient of the large matrix is written once and added to never. Where all logits are
few enough there is one chunk, and nothing is computed twice.

Suffixes: B images, T tokens of an image, S = T positions, N predictions, W width, K codes or values of a symbol, k those of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ibq.models.transformer import Transformer

LARGEST_LOGITS, MOST_CODES = 2**26, 2**14
"""Logits and codes of a chunk at most: 256 MiB in float32, and up to three such matrices are alive at a time. Of many codes no chunk
has all of them, however few the tokens are."""
MULTIPLE = 128
"""Codes of a chunk are a multiple of it, as matrix units like them."""


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the tokens of images, in nats a token; a module, so that it can be wrapped for several processes.

    Args:
        transformer: whose parameters these are.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        """A scalar, in float32 at least; under autocast the logits are computed in its type, and what follows in float32.

        Args:
            tokens_BT: int64 in [0, K), all grid**2 tokens of every image, row-major.
            classes_B: int64 in [0, classes].

        Raises:
            ValueError: shapes or values do not fit; one sentence.
        """
        hidden_BSW = self.transformer.hidden(tokens_BT[:, :-1], classes_B)
        return torch.stack([cross_entropy(*prediction) for prediction in self.transformer.predictions(hidden_BSW, tokens_BT)]).sum()


def cross_entropy(hidden_NW: torch.Tensor, weight_KW: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """`F.cross_entropy(hidden_NW @ weight_KW.T, targets_N)`, a mean over N; never are more than LARGEST_LOGITS logits computed at once."""
    kind = hidden_NW.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NW.dtype
    hidden_NW, weight_KW = hidden_NW.to(dtype), weight_KW.to(dtype)
    k = min(MOST_CODES, max(1, LARGEST_LOGITS // len(hidden_NW) // MULTIPLE) * MULTIPLE)
    with torch.autocast(kind, enabled=False):
        if len(weight_KW) <= k:
            return F.cross_entropy(_logits(hidden_NW, weight_KW), targets_N)
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden_NW, weight_KW, targets_N, k)
        return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NW: torch.Tensor, weight_KW: torch.Tensor, targets_N: torch.Tensor, k: int) -> torch.Tensor:
        log_total_N = hidden_NW.new_full((len(hidden_NW),), -torch.inf, dtype=_wide(hidden_NW))
        logit_N = torch.zeros_like(log_total_N)
        for weight_kW, column_N, inside_N in _chunks(weight_KW, targets_N, k):
            logits_Nk = _logits(hidden_NW, weight_kW)
            logit_N += torch.where(inside_N, logits_Nk.gather(1, column_N[:, None])[:, 0], 0)
            log_total_N = torch.logaddexp(log_total_N, logits_Nk.logsumexp(1))
        ctx.save_for_backward(hidden_NW, weight_KW, targets_N, log_total_N)
        ctx.k = k
        return (log_total_N - logit_N).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_NW, weight_KW, targets_N, log_total_N = ctx.saved_tensors
        of_hidden_NW = torch.zeros_like(hidden_NW, dtype=_wide(hidden_NW))
        of_weight_KW = torch.empty_like(weight_KW)
        chunks = _chunks(weight_KW, targets_N, ctx.k)
        for of_weight_kW, (weight_kW, column_N, inside_N) in zip(of_weight_KW.split(ctx.k), chunks, strict=True):
            p_Nk = _logits(hidden_NW, weight_kW).sub_(log_total_N[:, None]).exp_()
            p_Nk.scatter_add_(1, column_N[:, None], -inside_N[:, None].to(p_Nk.dtype))
            of_logits_Nk = p_Nk.mul_(gradient / len(hidden_NW)).to(hidden_NW.dtype)
            of_hidden_NW += of_logits_Nk @ weight_kW
            torch.mm(of_logits_Nk.T, hidden_NW, out=of_weight_kW)
        return of_hidden_NW.to(hidden_NW.dtype), of_weight_KW, None, None


def _chunks(weight_KW: torch.Tensor, targets_N: torch.Tensor, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Chunks of k codes; with each the columns of the targets in it, and whether they are in it at all."""
    for i, weight_kW in enumerate(weight_KW.split(k)):
        column_N = targets_N - i * k
        inside_N = (column_N >= 0) & (column_N < len(weight_kW))
        yield weight_kW, column_N.clamp(0, len(weight_kW) - 1), inside_N


def _logits(hidden_NW: torch.Tensor, weight_KW: torch.Tensor) -> torch.Tensor:
    return (hidden_NW @ weight_KW.T).to(_wide(hidden_NW))


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
