"""Rules on precision: float32 within autocast, and modules that were cast to bfloat16 or float16."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from ibq.quantizers.contract.trial import (
    features_for,
    flat,
    gap,
    is_code,
    listed,
    make,
    parts,
    total_loss,
    train_step,
    unequal,
)
from ibq.schema import COUNTABLE_CODES, QuantizerConfig

NARROW = (torch.bfloat16, torch.float16)


def autocast(config: QuantizerConfig) -> Iterator[str]:
    """within bfloat16 autocast everything is what it is without, in float32"""
    for inputs in (torch.float32, torch.bfloat16):
        quantizer = make(config)
        twin, z_BDHW = copy.deepcopy(quantizer), features_for(quantizer).to(inputs)
        torch.manual_seed(5)
        outside = quantizer(z_BDHW.float())
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(5)
            inside = twin(z_BDHW)
            codes, kept = twin.indices_to_codes(inside.indices), is_code(twin, inside)
        if not kept:
            yield f"within autocast z_q is not indices_to_codes(indices): they differ in {gap(inside.z_q, codes)}"
        if wrong := [name for name, of in parts(inside).items() if of.dtype != parts(outside)[name].dtype]:
            yield f"within autocast {listed(wrong)} has another type than without; let the base's forward stand"
        elif differing := unequal(parts(inside), parts(outside)):
            yield f"within autocast, of {inputs} features, {listed(differing)} differs; compute in float32"


def casts(config: QuantizerConfig) -> Iterator[str]:
    """after .bfloat16() or .half() z_q has that type and is still its code; losses are finite and float32"""
    for dtype in NARROW:
        for mode in ("training", "evaluation"):
            quantizer = make(config).to(dtype).train(mode == "training")
            for _ in range(3):
                z_BDHW = features_for(quantizer).detach().to(dtype).requires_grad_()
                quantized = quantizer(z_BDHW)
                codes = quantizer.indices_to_codes(quantized.indices)
                broken = []
                if not quantized.z_q.dtype == codes.dtype == quantizer.dtype == dtype:
                    broken.append(
                        f"z_q is {quantized.z_q.dtype}, indices_to_codes {codes.dtype}, quantizer.dtype "
                        f"{quantizer.dtype}"
                    )
                elif not is_code(quantizer, quantized):
                    broken.append(f"z_q is not indices_to_codes(indices): they differ in {gap(quantized.z_q, codes)}")
                for name, term in quantized.losses.items():
                    if term.dtype != torch.float32 or not term.isfinite():
                        broken.append(f"loss {name} is {term.item():g} in {term.dtype}, not finite and float32")
                total_loss(quantizer, quantized).backward()
                if z_BDHW.grad is None or z_BDHW.grad.dtype != dtype or not z_BDHW.grad.isfinite().all():
                    broken.append("the gradient of the features is absent, not finite, or of another type")
                if broken:
                    yield from (f"cast to {dtype}, in {mode}, {sentence}" for sentence in broken)
                    break
            if config.codebook_size <= COUNTABLE_CODES:
                logits_NK = quantizer.logits(flat(z_BDHW.detach()))
                if logits_NK.dtype != torch.float32:
                    yield f"cast to {dtype}, logits are {logits_NK.dtype}; compute them in float32"
                if mode == "evaluation" and not torch.equal(logits_NK.argmax(1), quantized.indices.flatten()):
                    yield f"cast to {dtype}, the largest logit is not that of the index"


def other_types(config: QuantizerConfig) -> Iterator[str]:
    """features of another type than the weights give z_q in the weights' type"""
    for inputs, cast in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        quantizer = make(config).to(cast)
        quantized = quantizer(features_for(quantizer).to(inputs))
        if quantized.z_q.dtype != cast:
            yield f"of {inputs} features, with weights in {cast}, z_q is {quantized.z_q.dtype}"
        elif not is_code(quantizer, quantized):
            yield f"of {inputs} features, with weights in {cast}, z_q is not indices_to_codes(indices)"


def accumulators(config: QuantizerConfig) -> Iterator[str]:
    """buffers that training changes stay float32 in a module that is cast, and are not touched by it"""
    quantizer = make(config)
    first = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    for seed in (1, 2):
        train_step(quantizer, seed)
    trained = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    changing = set(unequal(trained, first))
    for dtype in NARROW:
        cast = dict(copy.deepcopy(quantizer).to(dtype).named_buffers())
        if narrowed := [name for name in sorted(changing) if cast[name].dtype != trained[name].dtype]:
            yield (
                f"cast to {dtype}, the buffer {listed(narrowed)}, which training changes, becomes "
                f"{cast[narrowed[0]].dtype}; keep it in a module of the class ibq.quantizers.updates.Accumulator"
            )
        elif touched := [name for name in sorted(changing) if not torch.equal(cast[name], trained[name])]:
            yield f"cast to {dtype}, the buffer {listed(touched)}, which training changes, loses digits"
