"""Rules on state and repetition: evaluation, resume, schedules, recomputed and repeated forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from ibq.quantizers.base import Quantizer
from ibq.quantizers.build import build_quantizer
from ibq.quantizers.contract.trial import (
    features_for,
    listed,
    make,
    parts,
    state_of,
    total_loss,
    train_step,
    unequal,
)
from ibq.schema import QuantizerConfig


def config_as_json(config: QuantizerConfig) -> Iterator[str]:
    """the config, written as JSON and read again, builds the same quantizer"""
    quantizer = build_quantizer(config)
    rebuilt = build_quantizer(config.model_dump(mode="json"))
    if type(rebuilt) is not type(quantizer) or rebuilt.config != config or quantizer.config != config:
        yield f"from JSON comes {rebuilt.config!r}, not {config!r}; keep to fields that JSON can hold"
    if open_ended := [name for name, field in type(config).model_fields.items() if field.is_required()]:
        yield f"the config's field {listed(open_ended)} has no default; give it one, since tables begin with them"


def evaluation(config: QuantizerConfig) -> Iterator[str]:
    """evaluation draws nothing and changes nothing"""
    quantizer = make(config)
    train_step(quantizer, 1)
    quantizer.eval()
    z_BDHW, before, outputs = features_for(quantizer), state_of(quantizer), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(parts(quantizer(z_BDHW)))
    if differing := unequal(*outputs):
        yield f"in evaluation two forwards of the same features differ in {listed(differing)}; draw in training alone"
    if changed := unequal(state_of(quantizer), before):
        yield f"a forward in evaluation changes the state {listed(changed)}; let it change in training alone"


def resume(config: QuantizerConfig) -> Iterator[str]:
    """training goes on from a state_dict as if never interrupted, bit for bit"""
    original, restored = make(config), make(config)
    for seed in (1, 2, 3):
        train_step(original, seed)
    restored.load_state_dict(state_of(original))
    remedy = "keep what changes in a parameter or in a persistent buffer"
    z_BDHW = features_for(original)
    if differing := unequal(parts(restored.eval()(z_BDHW)), parts(original.eval()(z_BDHW))):
        yield f"in evaluation {listed(differing)} differs after a state_dict was loaded; {remedy}"
    for seed in (4, 5, 6):
        mine, theirs = (parts(train_step(quantizer.train(), seed)) for quantizer in (restored, original))
        state = unequal(restored.state_dict(), original.state_dict())
        if differing := unequal(mine, theirs) + [f"state {name}" for name in state]:
            yield (
                f"{listed(differing)} differs in step {seed} of a run that was resumed from the state_dict of step 3; "
                f"{remedy}"
            )
            return


def changes_in_forward(config: QuantizerConfig) -> Iterator[str]:
    """a training forward draws and moves codes only if the config says so by changes_in_forward"""
    if config.changes_in_forward:
        return
    quantizer = make(config)
    z_BDHW, outputs, codebooks = features_for(quantizer), [], []
    for seed in (1, 2):
        quantizer.set_step(0)  # schedules follow the optimizer's steps, not the forwards
        torch.manual_seed(seed)
        outputs.append(parts(quantizer(z_BDHW)))
        codebooks.append(state_of(quantizer))
    moved = unequal(*codebooks)
    if differing := unequal(*outputs) + [f"state {name}" for name in moved]:
        yield (
            f"two training forwards of the same features within a step differ in {listed(differing)}, and "
            f"changes_in_forward is False; let the config's property return True"
        )


def is_random(config: QuantizerConfig) -> bool:
    """True if training depends on random numbers that are drawn in it."""
    twins = [make(config)]
    twins.append(copy.deepcopy(twins[0]))
    z_BDHW, seen = features_for(twins[0]), []
    for twin, other in zip(twins, (1, 2), strict=True):
        for step in range(3):
            torch.manual_seed(10 * step + other)
            seen.append(parts(twin(z_BDHW)) | state_of(twin))
    return any(unequal(one, other) for one, other in zip(seen[:3], seen[3:], strict=True))


def _loss_of(quantizer: Quantizer) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda z_BDHW: total_loss(quantizer, quantizer(z_BDHW))


def recomputation(config: QuantizerConfig) -> Iterator[str]:
    """gradient checkpointing changes neither gradients nor what a step leaves"""
    for reentrant in (True, False):
        plain = make(config)
        recomputed = copy.deepcopy(plain)
        for seed in range(5):
            found = []
            for quantizer in (plain, recomputed):
                torch.manual_seed(seed)
                z_BDHW = features_for(quantizer)
                quantizer.zero_grad()
                loss = _loss_of(quantizer)
                total = checkpoint(loss, z_BDHW, use_reentrant=reentrant) if quantizer is recomputed else loss(z_BDHW)
                total.backward()
                found.append(_gradients(quantizer, z_BDHW) | state_of(quantizer))
            if differing := unequal(*found):
                yield (
                    f"with gradient checkpointing (use_reentrant={reentrant}) {listed(differing)} differs in step "
                    f"{seed + 1}; change nothing in a forward while ibq.quantizers.updates.recomputing() is True"
                )
                return


def two_forwards(config: QuantizerConfig) -> Iterator[str]:
    """two forwards before one backward pass have the gradients of each"""
    together = make(config)
    together(features_for(together))
    apart = copy.deepcopy(together)
    both = [features_for(together) for _ in range(2)]
    again = [z_BDHW.detach().clone().requires_grad_() for z_BDHW in both]
    torch.manual_seed(1)
    torch.stack([_loss_of(together)(z_BDHW) for z_BDHW in both]).sum().backward()
    torch.manual_seed(1)
    for z_BDHW in again:
        _loss_of(apart)(z_BDHW).backward()
    if any(not torch.equal(_gradient(one), _gradient(other)) for one, other in zip(both, again, strict=True)):
        yield "two forwards before one backward pass give the features other gradients than one after the other"
    for (name, mine), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        if theirs.grad is not None and not torch.allclose(_gradient(mine), theirs.grad, rtol=1.3e-6, atol=1e-5):
            yield f"two forwards before one backward pass give {name} another gradient than one after the other"


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _gradients(quantizer: Quantizer, z_BDHW: torch.Tensor) -> dict[str, torch.Tensor]:
    own = {f"the gradient of {name}": p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    return {"the gradient of the features": _gradient(z_BDHW)} | own


def late_quantization(config: QuantizerConfig) -> Iterator[str]:
    """codes that were set to the k-means of features stay there in the forwards that follow"""
    quantizer = make(config)
    if not quantizer.features_to_cluster:
        return
    train_step(quantizer, 1)
    features_MD = 3 + torch.randn(quantizer.features_to_cluster, config.code_dim)
    errors = [_error(quantizer, features_MD)]
    quantizer.cluster(features_MD, torch.Generator().manual_seed(0))
    for _ in range(3):
        errors.append(_error(quantizer, features_MD))
        quantizer.train()(features_MD[None])
    before, *after = errors
    if max(after) >= before:
        yield (
            f"the quantization error of features was {before:.2g}, and is {', '.join(f'{of:.2g}' for of in after)} in "
            f"the forwards after cluster has set the codes to their k-means; begin with them in `cluster` (or "
            f"place_codes), and set anew what else belongs to the codes"
        )


@torch.no_grad()
def _error(quantizer: Quantizer, features_MD: torch.Tensor) -> float:
    """Mean squared distance of features to their codes in evaluation, in the space of the codes."""
    z_q_1MD = quantizer.eval()(features_MD[None]).z_q
    return float((quantizer.to_code_space(features_MD) - z_q_1MD[0]).square().mean())
