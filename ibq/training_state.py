"""Everything that training changes: the two players, the averaged weights, the windows of the log; saved, restored and shared as one.

Suffixes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ibq.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer, save_checkpoint
from ibq.config import RESULTS_VERSION, TrainConfig
from ibq.distributed import any_rank, gather_objects, initialized, is_writer, mean_over_ranks, rank, world_size
from ibq.errors import ConfigError, NonFiniteError
from ibq.losses import Weight, weighted, weighted_sum
from ibq.metrics import usage_metrics
from ibq.models.autoencoder import Level
from ibq.models.discriminator import PatchDiscriminator
from ibq.models.tokenizer import Tokenizer
from ibq.observation import LossWindow, TokenWindow
from ibq.run_directory import source_commit

OPTIMIZERS = {"model": "optimizer", "discriminator": "discriminator_optimizer"}
"""Names of the players in a checkpoint, and of their optimizers."""


class Player:
    """One side of the game: a network, the model that is called (the network, or its DDP wrapper), its optimizer and its loss scaler.

    A step is begin, backward once a micro-batch, require_finite, update; report says what it was.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.network = self.model = network
        self.clip_norm = config.optim.clip_norm
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.optim.lr, betas=config.optim.betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def distribute(self) -> None:
        """Average gradients over all processes from now on; the network becomes rank 0's."""
        with warnings.catch_warnings():  # torch 2.13 and later would have the argument renamed, which the versions before do not know
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
            NonFiniteError: a term or the gradient is not finite, on this or another process; all of them raise the same. In fp16 a gradient
                that overflows is no error while the loss scale can still be lowered: the update is then left out.
        """
        self.scaler.unscale_(self.optimizer)
        trained = {name: parameter for name, parameter in self.network.named_parameters() if parameter.grad is not None}
        self.norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained.values() if parameter.grad is not None])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained.values(), self.clip_norm, self.norm)
        assert isinstance(self._total, torch.Tensor)
        finite, gradient_finite = torch.stack([self._total, self.norm.to(self._total.dtype)]).isfinite().tolist()
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        lost = not finite or not (gradient_finite or may_skip)
        if any_rank(lost)[0]:
            bad = [f"loss term {name!r} is {value.item()}" for name, value in self._raw.items() if not value.isfinite()]
            infinite = [name for name, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
            of_all = gather_objects((bad, [f"the gradient of {name!r} is not finite" for name in infinite]))
            reasons = [reason for which in (0, 1) for of_one in of_all for reason in of_one[which]]  # a term comes before what it led to
            raise NonFiniteError(reasons[0] if reasons else "the gradient norm overflowed")

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def report(self, prefix: str = "") -> dict[str, float]:
        """The last step: norm of the gradient before clipping, loss, and each term raw (`loss_*`) and weighted (`weighted_*`), means over
        micro-batches and processes."""
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
        self.network.load_state_dict(part_of(checkpoint.tensors, f"{name}."))
        if updated:
            restore_optimizer(self.network, self.optimizer, checkpoint.tensors, OPTIMIZERS[name])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint.meta["scalers"][name])


class TrainingState:
    """The tokenizer (`generator`), its averaged weights, the `discriminator` where the config has one, LeCam's averages, windows, step."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.tokenizer = Tokenizer(config).to(device).to(memory_format=torch.channels_last)
        self.players = {"model": Player(self.tokenizer, config, device)}
        if config.loss.adversarial.weight:
            network = PatchDiscriminator(config.loss.adversarial, config.data.channels)
            self.players["discriminator"] = Player(network.to(device).to(memory_format=torch.channels_last), config, device)
        self.logit_averages_2 = torch.zeros(2, device=device)
        K = config.quantizer.codebook_size
        self.log_window, self.snapshot_window, self.pixel_window = TokenWindow(K, device), TokenWindow(K, device), LossWindow(device)
        self.step, self.seconds = 0, 0.0

    @property
    def generator(self) -> Player:
        return self.players["model"]

    @property
    def discriminator(self) -> Player | None:
        """None where there is none, or before it starts."""
        return self.players.get("discriminator") if self.step >= self.config.adversarial_start else None

    def start_average(self) -> None:
        """Begin the averaged weights; after the codebook is initialised, since they start as a copy."""
        self.average = AveragedModel(self.tokenizer, multi_avg_fn=get_ema_multi_avg_fn(self.config.optim.ema_decay))
        self.average.n_averaged.fill_(1)  # the initial weights count: no warm-up, as released

    def update_average(self) -> None:
        self.average.update_parameters(self.tokenizer)
        self.tokenizer.quantize.mend_average(self.averaged_tokenizer.quantize)

    @property
    def averaged_tokenizer(self) -> Tokenizer:
        averaged = self.average.module
        assert isinstance(averaged, Tokenizer)
        return averaged

    def update_logit_averages(self, means_2: torch.Tensor) -> torch.Tensor:
        """LeCam's averages take in a step's mean real and fake logit, which are returned: once a step, after its loss, so that they hang
        neither on micro-batches nor, unless the config wants it, on the number of processes. (VQGANs of this line take the batch in before
        its own loss, which at a decay of 0.999 moves an average by a thousandth of the way.)"""
        means_2 = mean_over_ranks(means_2) if self.config.averages == "global" else means_2
        self.logit_averages_2.lerp_(means_2, 1 - self.config.loss.adversarial.lecam_decay)
        return means_2

    @property
    def windows(self) -> dict[str, TokenWindow | LossWindow]:
        """By their names in a checkpoint."""
        return {"log": self.log_window, "snapshot": self.snapshot_window, "pixel": self.pixel_window}

    def see(self, indices_BHW: torch.Tensor, pixel: torch.Tensor) -> None:
        """Count a micro-batch's codes and its pixel loss in the windows."""
        self.log_window.add(indices_BHW)
        self.snapshot_window.add(indices_BHW)
        self.pixel_window.add(pixel)

    def report(self) -> dict[str, float]:
        """Usage and mean pixel loss of all batches since the last report, where loss_pixel is of one; a collective."""
        report = {"pixel_mean": self.pixel_window.mean()} | usage_metrics(self.log_window.total())
        self.log_window.reset()
        self.pixel_window.reset()
        return report

    def speed_up(self, *, compiled: bool, checkpoint_activations: bool) -> None:
        """What makes a step faster or smaller and changes its numbers by rounding at most. The quantizer has kernels of its own."""
        for level in self.tokenizer.modules():
            if isinstance(level, Level):
                level.checkpointed = checkpoint_activations
        if compiled:
            self.tokenizer.encoder.compile()
            self.tokenizer.decoder.compile()
            if "discriminator" in self.players:
                self.players["discriminator"].network.compile()

    def distribute(self) -> None:
        """Share the work with the other processes, if there are any; to be called once all is as it shall begin or go on.

        All hold the same weights and, from here on, random numbers of their own, so that noise differs between their images.
        """
        if not initialized():
            return
        for player in self.players.values():
            player.distribute()
        self.tokenizer.quantize.peers = dist.group.WORLD
        if self.config.averages == "global":
            self.tokenizer.quantize.group = dist.group.WORLD
        if rank():
            torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 4096 + rank())

    def not_finite(self) -> str | None:
        """The name of a weight that is not finite, if a process has one: a checkpoint of such a state would be of no use. A collective."""
        named = (item for player in self.players.values() for item in player.network.named_parameters())
        own = next((name for name, parameter in named if not parameter.isfinite().all()), None)
        return next((name for name in gather_objects(own) if name is not None), None)

    def save(self, folder: Path, data_hash: str) -> None:
        """Write the checkpoint, which is rank 0's state but for the windows, which are everyone's; a collective."""
        tensors = {name: value for key, player in self.players.items() for name, value in player.tensors(key).items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        tensors |= {f"window.{name}": window.total() for name, window in self.windows.items()}
        if "discriminator" in self.players:
            tensors["lecam.averages"] = self.logit_averages_2
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        meta = {"step": self.step, "seconds": self.seconds, "data_hash": data_hash}
        meta |= {"scalers": {name: player.scaler.state_dict() for name, player in self.players.items()}}
        meta |= {"processes": world_size(), "commit": source_commit(), "results_version": RESULTS_VERSION}
        if is_writer():
            save_checkpoint(folder, tensors, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        """ConfigError: the checkpoint is of another version of the code, or lacks something."""
        tensors, meta = checkpoint.tensors, checkpoint.meta
        if meta["results_version"] != RESULTS_VERSION:
            found = f"results_version={meta['results_version']}, this code has {RESULTS_VERSION}"
            raise ConfigError(f"the checkpoint was written with {found}; forget the run and train it again")
        begins_at = {"model": 0, "discriminator": self.config.adversarial_start}
        for name, player in self.players.items():
            player.restore(name, checkpoint, updated=meta["step"] > begins_at[name])
        self.average.load_state_dict(part_of(tensors, "average."))
        for name, window in self.windows.items():
            window.restore(tensors[f"window.{name}"])
        if "discriminator" in self.players:
            self.logit_averages_2 = tensors["lecam.averages"].to(self.device)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:  # a run begun on a CPU may go on on a GPU
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step, self.seconds = meta["step"], meta["seconds"]


class Pace:
    """How fast a run goes since the last report."""

    def __init__(self, state: TrainingState, batch_size: int) -> None:
        self.state, self.batch_size = state, batch_size
        self.step, self.seconds, self.waited_s = state.step, state.seconds, 0.0

    def report(self, waited_s: float) -> dict[str, float]:
        """images_per_s, over all processes, and data_wait_pct, the share of that time in which this process waited for pixels.

        Args:
            waited_s: seconds of waiting since the start.
        """
        images, seconds = (self.state.step - self.step) * self.batch_size, self.state.seconds - self.seconds
        waited, self.waited_s = waited_s - self.waited_s, waited_s
        self.step, self.seconds = self.state.step, self.state.seconds
        return {"images_per_s": images / seconds, "data_wait_pct": 100 * waited / seconds}


def part_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What stands under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
