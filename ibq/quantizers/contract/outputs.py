"""Rules on what a forward returns: z_q, indices, losses, their gradients, and the logits that name the code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ibq.quantizers.base import CodebookQuantizer, Quantized, Quantizer
from ibq.quantizers.contract.trial import GRID, TOKENS, features_for, flat, gap, is_code, listed, make, total_loss
from ibq.schema import COUNTABLE_CODES, QuantizerConfig

FORWARDS = 3
"""Since what a forward leaves for the next one must not break a rule."""


def _forwards(config: QuantizerConfig) -> Iterator[tuple[str, Quantizer, Quantized]]:
    for mode in ("training", "evaluation"):
        quantizer = make(config).train(mode == "training")
        for _ in range(FORWARDS):
            yield mode, quantizer, quantizer(features_for(quantizer))


def shapes_and_types(config: QuantizerConfig) -> Iterator[str]:
    """z_q, indices and codebook have the shapes and types of the contract"""
    B, H, W = GRID
    wanted = (B, config.code_dim, H, W)
    for mode, quantizer, quantized in _forwards(config):
        if not isinstance(quantized, Quantized):
            yield f"forward returns a {type(quantized).__name__}, not Quantized(z_q, indices, losses); write quantize"
            return
        z_q, indices, _ = quantized
        broken = []
        if (z_q.shape, z_q.dtype) != (wanted, torch.float32):
            broken.append(f"z_q is {z_q.dtype} of shape {tuple(z_q.shape)}; it must be float32 of shape {wanted}")
        if (indices.shape, indices.dtype) != (GRID, torch.int64):
            broken.append(
                f"indices are {indices.dtype} of shape {tuple(indices.shape)}; they must be int64 of shape {GRID}, as "
                f"argmax and argmin give them"
            )
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= config.codebook_size:
            broken.append(f"indices reach from {low} to {high}; they must lie in [0, {config.codebook_size})")
        if config.codebook_size <= COUNTABLE_CODES:
            K_D = (config.codebook_size, config.code_dim)
            if quantizer.codebook.shape != K_D:
                broken.append(f"codebook has the shape {tuple(quantizer.codebook.shape)}; it must be (K, D) = {K_D}")
        if broken:
            yield from (f"in {mode} {sentence}" for sentence in broken)
            return


def round_trip(config: QuantizerConfig) -> Iterator[str]:
    """z_q is the code of its index, bit for bit"""
    for mode, quantizer, quantized in _forwards(config):
        z_q, indices, _ = quantized
        codes = quantizer.indices_to_codes(indices)
        if not is_code(quantizer, quantized):
            yield (
                f"in {mode} z_q is not indices_to_codes(indices) bit for bit: they differ in {gap(z_q, codes)}; return "
                f"straight_through(z_ND, codes_ND), or codes_ND.detach() + (x_ND - x_ND.detach()) for another gradient"
            )
            return
        if config.codebook_size <= COUNTABLE_CODES and not torch.equal(
            codes, gathered := quantizer.codebook[indices].movedim(-1, 1)
        ):
            yield (
                f"in {mode} indices_to_codes(indices) is not codebook[indices]: they differ in {gap(codes, gathered)}; "
                f"let codes_of and codebook agree"
            )
            return


def losses(config: QuantizerConfig) -> Iterator[str]:
    """losses and config.loss_weights have the same names; each loss is a finite scalar with a gradient"""
    for mode, _, (_, _, terms) in _forwards(config):
        broken = []
        if extra := sorted(terms.keys() - config.loss_weights.keys()):
            broken.append(f"loss {listed(extra)} has no weight; add it to the config's loss_weights")
        if absent := sorted(config.loss_weights.keys() - terms.keys()):
            broken.append(f"loss_weights has {listed(absent)}, which is no loss that quantize returns; leave it out")
        for name, term in terms.items():
            if term.shape != ():
                broken.append(f"loss {name} has the shape {tuple(term.shape)}; take its mean")
            elif not term.isfinite():
                broken.append(f"loss {name} is {term.item()}; it must be finite")
            elif not term.requires_grad:
                broken.append(f"loss {name} has no gradient; leave out detach(), or leave out the loss")
        if broken:
            yield from (f"in {mode} {sentence}" for sentence in broken)
            return


def gradients(config: QuantizerConfig) -> Iterator[str]:
    """a training step has finite gradients, which reach the features and every parameter that wants one"""
    quantizer = make(config)
    for step in (1, 2):
        quantizer.zero_grad()
        z_BDHW = features_for(quantizer)
        total_loss(quantizer, quantizer(z_BDHW)).backward()
        if z_BDHW.grad is None or not z_BDHW.grad.any():
            yield f"in step {step} no gradient reaches the features; the encoder would learn nothing from z_q"
        elif not z_BDHW.grad.isfinite().all():
            yield f"in step {step} the gradient of the features is not finite"
        for name, parameter in quantizer.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                yield (
                    f"in step {step} no gradient reaches the parameter {name}, for which DistributedDataParallel would "
                    f"wait; use it in every forward, or set requires_grad=False"
                )
            elif parameter.grad is not None and not parameter.requires_grad:
                yield f"in step {step} the parameter {name} has a gradient and requires_grad=False"
            elif parameter.grad is not None and not parameter.grad.isfinite().all():
                yield f"in step {step} the gradient of the parameter {name} is not finite"


def reach(config: QuantizerConfig) -> str:
    """The parameters that the gradient of a training step reaches, and those that it does not, in words."""
    quantizer = make(config)
    total_loss(quantizer, quantizer(features_for(quantizer))).backward()
    reached: list[str] = []
    silent: list[str] = []
    for name, parameter in quantizer.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.any())
        (reached if touched else silent).append(name)
    if "embedding" in reached and config.codebook_size <= COUNTABLE_CODES:
        gradient_KD = quantizer.get_parameter("embedding").grad
        rows = 0 if gradient_KD is None else int((gradient_KD != 0).any(1).sum())
        reached[reached.index("embedding")] = f"embedding ({rows} of {config.codebook_size} codes)"
    phrase = f"a step's gradient reaches {listed(['the features', *reached])}"
    return phrase + (f", and none of {listed(silent)}" if silent else "")


def logits(config: QuantizerConfig) -> Iterator[str]:
    """the largest of a token's logits is that of its index, in evaluation"""
    if config.codebook_size > COUNTABLE_CODES:
        return
    quantizer = make(config).eval()
    if isinstance(quantizer, CodebookQuantizer):  # of codes as short as some begin, any rule finds the same
        nn.init.normal_(quantizer.embedding)
    z_BDHW = features_for(quantizer)
    logits_NK = quantizer.logits(flat(z_BDHW))
    if logits_NK.shape != (TOKENS, config.codebook_size):
        yield f"logits of {TOKENS} tokens have the shape {tuple(logits_NK.shape)}; it must be (N, K)"
        return
    other = int((logits_NK.argmax(1) != quantizer(z_BDHW).indices.flatten()).sum())
    if other:
        yield (
            f"the largest logit is not that of the index for {other} of {TOKENS} tokens; write `logits` if the code "
            f"that is chosen is not the nearest, and `to_code_space` if z is changed before it is compared"
        )


def each_token_alone(config: QuantizerConfig) -> Iterator[str]:
    """in evaluation a token's index does not depend on the tokens beside it"""
    quantizer = make(config).eval()
    z_BDHW = features_for(quantizer).detach()
    B, H, W = GRID
    whole = quantizer(z_BDHW).indices.flatten().tolist()
    alone = [
        int(quantizer(z_BDHW[b : b + 1, :, h : h + 1, w : w + 1]).indices)
        for b in range(B)
        for h in range(H)
        for w in range(W)
    ]
    if other := sum(a != b for a, b in zip(alone, whole, strict=True)):
        yield (
            f"{other} of {TOKENS} tokens have another index by themselves than together; let nothing of a batch "
            f"decide in evaluation"
        )
