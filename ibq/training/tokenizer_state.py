"""State of a tokenizer's training: generator and discriminator, the averaged weights, the windows of the log; saved,
restored and shared as one.

Suffixes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ibq.config import RESULTS_VERSION, TrainConfig
from ibq.distributed import initialized, is_writer, mean_over_ranks, world_size
from ibq.metrics.usage import part_usage_metrics, uncountable, usage_metrics
from ibq.models.autoencoder import Level
from ibq.models.discriminator import PatchDiscriminator
from ibq.models.tokenizer import Tokenizer
from ibq.quantizers import IndexBackpropQuantizer
from ibq.run_directory import source_commit
from ibq.schema import Backend
from ibq.training.checkpoint import (
    Checkpoint,
    part_of,
    random_states,
    require_version,
    restore_random_states,
    save_checkpoint,
)
from ibq.training.logging import CODEBOOK_PARAMETER, LossWindow, PartWindow, TokenWindow
from ibq.training.optimizer import TrainedNetwork, first_non_finite, seed_other_ranks


class TrainingState:
    """The tokenizer (`generator`), its averaged weights, the `discriminator` where the config has one, LeCam's
    averages, windows, step."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.tokenizer = Tokenizer(config).to(device).to(memory_format=torch.channels_last)
        self.trained = {"model": self._with_adam(self.tokenizer)}
        if config.loss.adversarial.weight:
            network = PatchDiscriminator(config.loss.adversarial, config.data.channels)
            self.trained["discriminator"] = self._with_adam(network.to(device).to(memory_format=torch.channels_last))
        self.logit_averages_2 = torch.zeros(2, device=device)
        K = config.quantizer.codebook_size
        self.log_window, self.snapshot_window, self.pixel_window = (
            TokenWindow(K, device),
            TokenWindow(K, device),
            LossWindow(device),
        )
        self.recent_window, self.run_window = TokenWindow(K, device), TokenWindow(K, device)
        self.part_window = PartWindow(config.quantizer.part_sizes, device)
        self.step, self.seconds = 0, 0.0
        self.quantized_since = 0 if config.quantize_start == 0 else None
        """Finished updates when the quantizer began; None before that."""
        self._idle: list[nn.Parameter] = []

    def _with_adam(self, network: nn.Module) -> TrainedNetwork:
        config, optim = self.config, self.config.optim
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return TrainedNetwork(
            network,
            torch.optim.Adam(parameters, lr=optim.lr, betas=optim.betas, fused=True),
            accumulate=config.accumulate,
            clip_norm=optim.clip_norm,
            precision=config.precision,
            device=self.device,
        )

    @property
    def generator(self) -> TrainedNetwork:
        return self.trained["model"]

    @property
    def discriminator(self) -> TrainedNetwork | None:
        """None where there is none, or before it starts."""
        return self.trained.get("discriminator") if self.step >= self.config.adversarial_start else None

    def start_average(self) -> None:
        """Begin the averaged weights; after the codebook is initialised, since they start as a copy."""
        self.average = AveragedModel(self.tokenizer, multi_avg_fn=get_ema_multi_avg_fn(self.config.optim.ema_decay))
        self.average.n_averaged.fill_(1)  # the initial weights count: no warm-up, as released

    def update_average(self) -> None:
        self.average.update_parameters(self.tokenizer)
        self.tokenizer.quantize.sync_average(self.averaged_tokenizer.quantize)

    @property
    def averaged_tokenizer(self) -> Tokenizer:
        averaged = self.average.module
        assert isinstance(averaged, Tokenizer)
        return averaged

    def update_logit_averages(self, means_2: torch.Tensor) -> torch.Tensor:
        """Moving averages of LeCam, moved by a step's mean real and fake logit, which are returned.

        Once a step, after its loss, so that they depend neither on micro-batches nor, unless the config wants it, on
        the number of processes. (VQGANs of this line take the batch in before its own loss, which at a decay of 0.999
        moves an average by a thousandth of the way.)
        """
        means_2 = mean_over_ranks(means_2) if self.config.averages == "global" else means_2
        self.logit_averages_2.lerp_(means_2, 1 - self.config.loss.adversarial.lecam_decay)
        return means_2

    def begin_quantizing(self, features_MD: torch.Tensor) -> None:
        """Codes become the k-means of features (M, D), and the averaged ones with them; schedules begin now."""
        quantizer = self.tokenizer.quantize
        if quantizer.features_to_cluster:
            generator = torch.Generator().manual_seed(self.config.seed)
            quantizer.cluster(features_MD, generator)
            self.averaged_tokenizer.quantize.load_state_dict(quantizer.state_dict())
        self.quantized_since = self.step
        for parameter in self._idle:
            parameter.requires_grad_(True)
        if initialized():  # DDP takes in the parameters that require a gradient as it is made
            self.generator.wrap_in_ddp()

    @property
    def windows(self) -> dict[str, TokenWindow | LossWindow]:
        """By their names in a checkpoint: what is counted since the last log step, snapshot and log step; what the log
        step before that has counted; all until then; and the parts of codes, where they have any, since the last log
        step."""
        windows: dict[str, TokenWindow | LossWindow] = {
            "log": self.log_window,
            "snapshot": self.snapshot_window,
            "pixel": self.pixel_window,
            "recent": self.recent_window,
            "run": self.run_window,
        }
        return windows | ({"parts": self.part_window} if self.part_window.part_sizes else {})

    def count(self, indices_BHW: torch.Tensor, pixel: torch.Tensor) -> None:
        """Count a micro-batch's codes and its pixel loss in the windows."""
        self.log_window.add(indices_BHW)
        self.snapshot_window.add(indices_BHW)
        self.part_window.add(indices_BHW)
        self.pixel_window.add(pixel)

    def report(self) -> tuple[dict[str, float], torch.Tensor]:
        """Usage of codes and of parts, and mean pixel loss of all batches since the last report, where loss_pixel is of
        one, and codes without a token since the start; besides it the counts (K,) since the last report. A collective.
        """
        counts_K = self.log_window.total()
        self.recent_window.restore(counts_K)
        self.run_window.restore(self.run_window.total() + counts_K)
        report = {"pixel_mean": self.pixel_window.mean()}
        if self.quantized_since is not None and not uncountable(self.config.quantizer.codebook_size):
            never_used = float((self.run_window.total() == 0).sum())
            report |= usage_metrics(counts_K) | {"never_used": never_used}
        if self.quantized_since is not None:
            report |= part_usage_metrics(self.part_window.total(), self.part_window.part_sizes)
        self.log_window.reset()
        self.part_window.reset()
        self.pixel_window.reset()
        return report, counts_K

    def reconfigure(self, config: TrainConfig) -> None:
        """Go on with other weights and rates. What the run began with remains the tokenizers' own config, and so the
        row's."""
        self.config = config
        for tokenizer in (self.tokenizer, self.averaged_tokenizer):
            tokenizer.quantize.reconfigure(config.quantizer)

    def restart_dead(self, features_MD: torch.Tensor) -> None:
        """Put codes without a token since the last log step but one on features, and forget what averages and Adam know
        of them.

        Raises:
            ConfigError: the quantizer places no single codes.
        """
        dead_K = self.log_window.total() + self.recent_window.total() == 0
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        moved_K = self.tokenizer.quantize.restart_codes(dead_K, features_MD, generator)
        embedding = self.tokenizer.get_parameter(CODEBOOK_PARAMETER)
        self.averaged_tokenizer.get_parameter(CODEBOOK_PARAMETER).data[moved_K] = embedding.data[moved_K]
        for slot in self.generator.optimizer.state.get(embedding, {}).values():
            if slot.shape == embedding.shape:
                slot[moved_K] = 0

    def speed_up(self, *, compiled: bool, checkpoint_activations: bool, backend: Backend) -> None:
        """Options that make a step faster or smaller and change its numbers by rounding at most. The quantizer has
        kernels of its own, which `backend` names."""
        for module in self.tokenizer.modules():
            if isinstance(module, IndexBackpropQuantizer):
                module.backend = backend
            if isinstance(module, Level):
                module.checkpointed = checkpoint_activations
        if compiled:
            self.tokenizer.encoder.compile()
            self.tokenizer.decoder.compile()
            if "discriminator" in self.trained:
                self.trained["discriminator"].network.compile()

    def distribute(self) -> None:
        """Share the work with the other processes, if there are any; to be called once all is as it shall begin or go
        on.

        All hold the same weights and, from here on, random numbers of their own, so that noise differs between their
        images.
        """
        if not initialized():
            return
        if self.quantized_since is None:  # DDP waits for the gradient of every parameter that requires one
            self._idle = [p for p in self.tokenizer.quantize.parameters() if p.requires_grad]
        for parameter in self._idle:
            parameter.requires_grad_(False)
        for trained in self.trained.values():
            trained.wrap_in_ddp()
        self.tokenizer.quantize.peers = dist.group.WORLD
        if self.config.averages == "global":
            self.tokenizer.quantize.group = dist.group.WORLD
        seed_other_ranks(self.config.seed, self.step)

    def first_non_finite(self) -> str | None:
        """Name of a weight that is not finite, if a process has one; a collective."""
        return first_non_finite(self.trained.values())

    def save(self, folder: Path, data_hash: str) -> None:
        """Write the checkpoint, which is rank 0's state but for the windows, which are everyone's; a collective."""
        tensors: dict[str, torch.Tensor] = {}
        for name, trained in self.trained.items():
            tensors |= trained.state_tensors(name)
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        tensors |= {f"window.{name}": window.total() for name, window in self.windows.items()}
        if "discriminator" in self.trained:
            tensors["lecam.averages"] = self.logit_averages_2
        tensors |= random_states(self.device)
        meta = {"step": self.step, "seconds": self.seconds, "data_hash": data_hash}
        meta |= {"quantized_since": self.quantized_since}
        meta |= {"scalers": {name: trained.scaler.state_dict() for name, trained in self.trained.items()}}
        meta |= {"processes": world_size(), "commit": source_commit(), "results_version": RESULTS_VERSION}
        if is_writer():
            save_checkpoint(folder, tensors, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        """ConfigError: the checkpoint is of another version of the code, or lacks something."""
        tensors, meta = checkpoint.tensors, checkpoint.meta
        require_version(meta, "results_version", RESULTS_VERSION)
        since = meta["quantized_since"]
        begins_at = {"model": 0, "discriminator": self.config.adversarial_start}
        idle = "quantize." if since is None or since == meta["step"] else None
        for name, trained in self.trained.items():
            trained.restore(name, checkpoint, updated=meta["step"] > begins_at[name], idle=idle)
        self.average.load_state_dict(part_of(tensors, "average."))
        for name, window in self.windows.items():
            window.restore(tensors[f"window.{name}"])
        if "discriminator" in self.trained:
            self.logit_averages_2 = tensors["lecam.averages"].to(self.device)
        restore_random_states(tensors, self.device)
        self.step, self.seconds, self.quantized_since = meta["step"], meta["seconds"], since
