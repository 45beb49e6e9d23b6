"""Optimizer step of a network: gradient accumulation, gradient scaling, clipping, DDP or FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ibq.distributed import any_rank, gather_objects, mean_over_ranks, rank
from ibq.errors import NonFiniteError
from ibq.losses import Weight, weighted, weighted_sum
from ibq.training.checkpoint import Checkpoint, flatten_optimizer, part_of, restore_optimizer
from ibq.training.sharding import local, part_like, whole

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {"model": "optimizer", "discriminator": "discriminator_optimizer"}
"""Names in a checkpoint: of the networks, and of their optimizers."""


class TrainedNetwork:
    """Network with its optimizer and gradient scaler; `model` is what is called: the network, or its DDP wrapper.

    One optimizer step over several micro-batches:

        trained.set_lr(lr)
        trained.zero_grad()
        for i, x in enumerate(micro_batches):
            with trained.no_sync(enabled=i < last):
                trained.backward(terms_of(trained.model(x)), weights)
        trained.unscale_and_clip()
        trained.step()

    Args:
        network: on the device.
        optimizer: of its parameters.
        accumulate: micro-batches of a step, each an equal share of its batch.
        clip_norm: largest norm of the gradient; None: as it is.
        precision: "fp16" scales losses, so that gradients do not vanish.
        device: where the network computes.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int,
        clip_norm: float | None,
        precision: str,
        device: torch.device,
    ) -> None:
        self.network = self.model = network
        self.optimizer, self.accumulate, self.clip_norm = optimizer, accumulate, clip_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def wrap_in_ddp(self) -> None:
        """Average gradients over all processes from now on; the network becomes rank 0's."""
        with warnings.catch_warnings():
            # torch 2.13 and later would have the argument renamed, which the versions before do not know
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model = DistributedDataParallel(self.network, broadcast_buffers=False)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self._loss: torch.Tensor | float = 0.0
        self._raw: dict[str, torch.Tensor] = {}
        self._weighted: dict[str, torch.Tensor] = {}

    def no_sync(self, *, enabled: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of every micro-batch but the last: no exchange of gradients by DDP."""
        return self.model.no_sync() if enabled and isinstance(self.model, DistributedDataParallel) else nullcontext()

    def backward(self, terms: dict[str, torch.Tensor], weights: dict[str, Weight]) -> None:
        """Add a micro-batch's share of the gradient: that of the weighted sum of its terms."""
        share = 1 / self.accumulate
        loss = share * weighted_sum(terms, weights)
        self.scaler.scale(loss).backward()
        self._loss = self._loss + loss.detach()
        for sums, values in ((self._raw, terms), (self._weighted, weighted(terms, weights))):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + share * value.detach()

    def unscale_and_clip(self) -> None:
        """Unscale and clip the gradient; a collective, before every step.

        Raises:
            NonFiniteError: a term or the gradient is not finite, on this or another process; all of them raise the
                same. In fp16 a gradient that overflows is no error while the loss scale can still be lowered: the
                update is then left out.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        self.norm = whole(torch.nn.utils.get_total_norm([*gradients.values()]))
        if self.clip_norm is not None:
            trained = [p for p in self.network.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(trained, self.clip_norm, self.norm)
        assert isinstance(self._loss, torch.Tensor)
        finite, gradient_finite = torch.stack([self._loss, self.norm.to(self._loss.dtype)]).isfinite().tolist()
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if any_rank(not finite or not (gradient_finite or may_skip))[0]:
            raise NonFiniteError(self._first_non_finite(gradients))

    def _first_non_finite(self, gradients: dict[str, torch.Tensor]) -> str:
        """The same sentence on all processes: a loss term comes before the gradient that it led to."""
        bad = [f"loss term {name!r} is {value.item()}" for name, value in self._raw.items() if not value.isfinite()]
        infinite = [name for name, gradient in gradients.items() if not local(gradient).isfinite().all()]
        of_all = gather_objects((bad, [f"the gradient of {name!r} is not finite" for name in infinite]))
        reasons = [reason for which in (0, 1) for of_one in of_all for reason in of_one[which]]
        return reasons[0] if reasons else "the gradient norm overflowed"

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def report(self, prefix: str = "") -> dict[str, float]:
        """The last step: norm of the gradient before clipping, loss, and each term raw (`loss_*`) and weighted
        (`weighted_*`), means over micro-batches and processes."""
        names, raw, share = list(self._raw), torch.stack([*self._raw.values()]), torch.stack([*self._weighted.values()])
        raw, share = mean_over_ranks(raw), mean_over_ranks(share)
        assert isinstance(self._loss, torch.Tensor)
        total = mean_over_ranks(self._loss).item()
        report: dict[str, float] = {f"{prefix}gradient_norm": self.norm.item(), f"{prefix}loss": total}
        report |= {f"loss_{name}": value for name, value in zip(names, raw.tolist(), strict=True)}
        report |= {f"weighted_{name}": value for name, value in zip(names, share.tolist(), strict=True)}
        return report | ({f"{prefix}fp16_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})

    def state_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Weights and optimizer state, by their names in a checkpoint."""
        weights = {f"{name}.{key}": value for key, value in self.network.state_dict().items()}
        return weights | flatten_optimizer(self.network, self.optimizer, OPTIMIZERS[name])

    def restore(self, name: str, checkpoint: Checkpoint, *, updated: bool, idle: str | None = None) -> None:
        """Weights, optimizer state if there was an update, and the scaler's state of a checkpoint.

        Args:
            name: of the network in the checkpoint.
            checkpoint: where they are.
            updated: False where no parameter has had an update.
            idle: beginning of the names of parameters that have had none.
        """
        own = self.network.state_dict()
        weights = part_of(checkpoint.tensors, f"{name}.")
        self.network.load_state_dict({key: part_like(value, own.get(key, value)) for key, value in weights.items()})
        if updated:
            restore_optimizer(self.network, self.optimizer, checkpoint.tensors, OPTIMIZERS[name], idle)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint.meta["scalers"][name])


def first_non_finite(trained: Iterable[TrainedNetwork]) -> str | None:
    """Name of a weight that is not finite, if a process has one: a checkpoint of such a state would be of no use. A
    collective."""
    named = (item for each in trained for item in each.network.named_parameters())
    own = next((name for name, parameter in named if not local(parameter).isfinite().all()), None)
    return next((name for name in gather_objects(own) if name is not None), None)


def seed_other_ranks(seed: int, step: int) -> None:
    """Random numbers of their own from this step on for every process but rank 0, which goes on with its own."""
    if rank():
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank())
