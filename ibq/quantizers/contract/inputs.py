"""Rules on what goes in: masks, sequences and videos, empty batches, values that are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch

from ibq.errors import NonFiniteInputError
from ibq.quantizers.base import Quantized, Quantizer
from ibq.quantizers.contract.trial import (
    GRID,
    TOKENS,
    features_for,
    is_code,
    listed,
    make,
    parts,
    state_of,
    total_loss,
    unequal,
)
from ibq.schema import QuantizerConfig

STEPS = 3
EMPTY = ((0, 12), (2, 0), (0, 3, 4), (2, 0, 4), (0, 3, 2, 2))
"""Grids without a token."""


def masks(config: QuantizerConfig) -> Iterator[str]:
    """masked tokens have no part in outputs, losses, gradients and state, whatever they hold"""
    for padding in (1e3, math.nan):
        masked = make(config)
        alone = copy.deepcopy(masked)
        for seed in range(STEPS):
            try:
                broken = _differs_from_a_step_without_them(masked, alone, padding, seed)
            except NonFiniteInputError:
                yield "masked tokens that hold NaN are refused; let the base's forward stand, which passes them by"
                return
            if broken:
                yield (
                    f"masked tokens have a part in step {seed + 1}: from a step of the other tokens alone differs "
                    f"{listed(broken)}; let the base's forward stand, which passes only the others to quantize"
                )
                return


def _differs_from_a_step_without_them(masked: Quantizer, alone: Quantizer, padding: float, seed: int) -> list[str]:
    torch.manual_seed(seed)
    mask_BHW, z_BDHW = torch.rand(GRID) > 0.4, features_for(masked).detach()
    g_BDHW = torch.randn(z_BDHW.shape)
    padded = z_BDHW.masked_fill(~mask_BHW[:, None], padding).requires_grad_()
    kept_1TD = z_BDHW.movedim(1, -1)[mask_BHW][None].clone().requires_grad_()
    torch.manual_seed(seed)
    actual: Quantized = masked(padded, mask=mask_BHW)
    torch.manual_seed(seed)
    expected: Quantized = alone(kept_1TD)
    mine, theirs = parts(actual), parts(expected)
    if actual.indices.shape == GRID:
        mine |= {"indices": actual.indices[mask_BHW], "z_q": actual.z_q.movedim(1, -1)[mask_BHW]}
        theirs |= {"indices": expected.indices[0], "z_q": expected.z_q[0]}
    for quantizer, quantized, g in (
        (masked, actual, g_BDHW),
        (alone, expected, g_BDHW.movedim(1, -1)[mask_BHW][None]),
    ):
        quantizer.zero_grad()
        terms = total_loss(quantizer, quantized._replace(z_q=torch.zeros(())))
        ((quantized.z_q * g).sum() + terms).backward()
    assert padded.grad is not None
    assert kept_1TD.grad is not None
    of_padded = padded.grad.movedim(1, -1)
    mine["gradient of the features"], theirs["gradient of the features"] = of_padded[mask_BHW], kept_1TD.grad[0]
    mine |= {"gradient of masked tokens": of_padded[~mask_BHW]} | _left(masked)
    theirs |= {"gradient of masked tokens": torch.zeros_like(of_padded[~mask_BHW])} | _left(alone)
    if actual.indices.shape == GRID:
        mine["indices of masked tokens"] = actual.indices[~mask_BHW]
        theirs["indices of masked tokens"] = torch.zeros_like(actual.indices[~mask_BHW])
    return unequal(mine, theirs) + ([] if is_code(masked, actual) else ["z_q of all"])


def _left(quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """Gradients and state after a step."""
    gradients = {f"gradient of {name}": p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    return gradients | {f"state {name}": tensor for name, tensor in quantizer.state_dict().items()}


def mask_of_all(config: QuantizerConfig) -> Iterator[str]:
    """a mask that keeps every token changes nothing"""
    quantizer = make(config).eval()
    z_BDHW = features_for(quantizer)
    found = unequal(parts(quantizer(z_BDHW, torch.ones(GRID, dtype=torch.bool))), parts(quantizer(z_BDHW)))
    if found:
        yield f"with a mask of all tokens {listed(found)} differs from a forward without one"


def sequences_and_videos(config: QuantizerConfig) -> Iterator[str]:
    """a sequence (B, N, D) and a video (B, D, T, H, W) of the same tokens give the same"""
    for name, grid in (("sequence", (2, 12)), ("video", (2, 3, 2, 2))):
        quantizer = make(config)
        twin, z_BDHW = copy.deepcopy(quantizer), features_for(quantizer)
        tokens = z_BDHW.movedim(1, -1).reshape(*grid, -1)
        z = tokens if len(grid) == 2 else tokens.movedim(-1, 1)
        for seed in (0, 1):
            torch.manual_seed(seed)
            expected = quantizer(z_BDHW)
            torch.manual_seed(seed)
            actual = twin(z)
            if actual.z_q.shape != z.shape or actual.indices.shape != grid:
                yield (
                    f"a {name} {tuple(z.shape)} gives z_q {tuple(actual.z_q.shape)} and indices "
                    f"{tuple(actual.indices.shape)}; they must be of that shape and {grid}"
                )
                break
            mine, theirs = parts(actual), parts(expected)
            mine["z_q"] = mine["z_q"] if len(grid) == 2 else mine["z_q"].movedim(1, -1)
            mine |= {"z_q": mine["z_q"].reshape(TOKENS, -1), "indices": mine["indices"].flatten()}
            theirs |= {"z_q": theirs["z_q"].movedim(1, -1).reshape(TOKENS, -1), "indices": theirs["indices"].flatten()}
            found = unequal(mine, theirs)
            if not is_code(twin, actual):
                found.append("indices_to_codes(indices)")
            if found:
                yield f"{listed(found)} of a {name} differs from that of a map of the same tokens"
                break


def empty_batches(config: QuantizerConfig) -> Iterator[str]:
    """a batch without a token is a ValueError of one sentence"""
    quantizer = make(config)
    for grid in EMPTY:
        z = torch.zeros(*grid, config.code_dim) if len(grid) == 2 else torch.zeros(grid[0], config.code_dim, *grid[1:])
        try:
            quantizer(z)
        except ValueError as error:
            if "\n" not in str(error):
                continue
            problem = "raises a ValueError of several lines"
        except Exception as error:
            problem = f"raises {type(error).__name__}"
        else:
            problem = "is taken"
        yield f"an empty batch {tuple(z.shape)} {problem}; let the base's forward stand, which refuses it"
        return


def values_that_are_not_finite(config: QuantizerConfig) -> Iterator[str]:
    """features with NaN or infinity are refused, and change nothing"""
    for value in (math.nan, math.inf):
        quantizer = make(config)
        quantizer(features_for(quantizer))
        before, z_BDHW = state_of(quantizer), features_for(quantizer).detach()
        z_BDHW[1, 0, 0, 3] = value
        try:
            quantizer(z_BDHW)
        except NonFiniteInputError as error:
            if not str(error).startswith(f"1 of {z_BDHW.numel()} values of features"):
                yield f"features with {value} are refused without a word on which: {error}"
        else:
            yield f"features with {value} are quantized; let the base's forward stand, which refuses them"
        if changed := unequal(state_of(quantizer), before):
            yield f"features with {value} have changed the state {listed(changed)}"
