"""What takes training steps: a network with its optimizer, alone or shared by processes, whole on each of them or in
parts (FSDP2)."""

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
"""Names of the players in a checkpoint, and of their optimizers."""


class Player:
    """A network that is trained, the model that is called (the network, or its DDP wrapper), its optimizer and its loss
    scaler.

    A step is begin, backward once a micro-batch, require_finite, update; report says what it was.

    Args:
        network: on the device.
        optimizer: of its parameters.
        clip_norm: largest norm of the gradient; None: as it is.
        precision: "fp16" scales losses, so that gradients do not vanish.
        device: where the network computes.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None,
        precision: str,
        device: torch.device,
    ) -> None:
        self.network = self.model = network
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def distribute(self) -> None:
        """Average gradients over all processes from now on; the network becomes rank 0's."""
        with (
            warnings.catch_warnings()
        ):  # torch 2.13 and later would have the argument renamed, which the versions before do not know
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model = DistributedDataParallel(self.network, broadcast_buffers=False)

    def begin(self, lr: float, micro_batches: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        self._share = 1 / micro_batches
        self._total: torch.Tensor | float = 0.0
        self._raw: dict[str, torch.Tensor] = {}
        self._weighted: dict[str, torch.Tensor] = {}

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a micro-batch: processes exchange gradients in the last one alone."""
        return nullcontext() if last or not isinstance(self.model, DistributedDataParallel) else self.model.no_sync()

    def backward(self, terms: dict[str, torch.Tensor], weights: dict[str, Weight]) -> None:
        """Add a micro-batch's share of the step's gradient: that of the weighted sum of its terms."""
        loss = self._share * weighted_sum(terms, weights)
        self.scaler.scale(loss).backward()
        self._total = self._total + loss.detach()
        for sums, values in ((self._raw, terms), (self._weighted, weighted(terms, weights))):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + self._share * value.detach()

    def require_finite(self) -> None:
        """Unscale and clip the gradient; to be called before every update.

        Raises:
            NonFiniteError: a term or the gradient is not finite, on this or another process; all of them raise the
                same. In fp16 a gradient that overflows is no error while the loss scale can still be lowered: the
                update is then left out.
        """
        self.scaler.unscale_(self.optimizer)
        trained = {name: parameter for name, parameter in self.network.named_parameters() if parameter.grad is not None}
        self.norm = whole(
            torch.nn.utils.get_total_norm(
                [parameter.grad for parameter in trained.values() if parameter.grad is not None]
            )
        )
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained.values(), self.clip_norm, self.norm)
        assert isinstance(self._total, torch.Tensor)
        finite, gradient_finite = torch.stack([self._total, self.norm.to(self._total.dtype)]).isfinite().tolist()
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        lost = not finite or not (gradient_finite or may_skip)
        if any_rank(lost)[0]:
            bad = [f"loss term {name!r} is {value.item()}" for name, value in self._raw.items() if not value.isfinite()]
            infinite = [
                name for name, p in trained.items() if p.grad is not None and not local(p.grad).isfinite().all()
            ]
            of_all = gather_objects((bad, [f"the gradient of {name!r} is not finite" for name in infinite]))
            reasons = [
                reason for which in (0, 1) for of_one in of_all for reason in of_one[which]
            ]  # a term comes before what it led to
            raise NonFiniteError(reasons[0] if reasons else "the gradient norm overflowed")

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def report(self, prefix: str = "") -> dict[str, float]:
        """The last step: norm of the gradient before clipping, loss, and each term raw (`loss_*`) and weighted
        (`weighted_*`), means over micro-batches and processes."""
        names, raw, share = list(self._raw), torch.stack([*self._raw.values()]), torch.stack([*self._weighted.values()])
        raw, share = mean_over_ranks(raw), mean_over_ranks(share)
        assert isinstance(self._total, torch.Tensor)
        total = mean_over_ranks(self._total).item()
        report: dict[str, float] = {f"{prefix}gradient_norm": self.norm.item(), f"{prefix}loss": total}
        report |= {f"loss_{name}": value for name, value in zip(names, raw.tolist(), strict=True)}
        report |= {f"weighted_{name}": value for name, value in zip(names, share.tolist(), strict=True)}
        return report | ({f"{prefix}fp16_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        weights = {f"{name}.{key}": value for key, value in self.network.state_dict().items()}
        return weights | flatten_optimizer(self.network, self.optimizer, OPTIMIZERS[name])

    def restore(self, name: str, checkpoint: Checkpoint, *, updated: bool) -> None:
        own = self.network.state_dict()
        weights = part_of(checkpoint.tensors, f"{name}.")
        self.network.load_state_dict({key: part_like(value, own.get(key, value)) for key, value in weights.items()})
        if updated:
            restore_optimizer(self.network, self.optimizer, checkpoint.tensors, OPTIMIZERS[name])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint.meta["scalers"][name])


def not_finite(players: Iterable[Player]) -> str | None:
    """The name of a weight that is not finite, if a process has one: a checkpoint of such a state would be of no use. A
    collective."""
    named = (item for player in players for item in player.network.named_parameters())
    own = next((name for name, parameter in named if not local(parameter).isfinite().all()), None)
    return next((name for name in gather_objects(own) if name is not None), None)


def draw_apart(seed: int, step: int) -> None:
    """Give every process but rank 0, which goes on with its own, random numbers that no other has from this step on."""
    if rank():
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank())
