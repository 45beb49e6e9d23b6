"""State of a transformer's training: the transformer, its averaged weights, the window of the log; saved, restored and
shared as one.

Checkpoints hold whole tensors, so that a run may go on on any number of processes that share its weights out or do not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ibq.config import RESULTS_VERSION, TRANSFORMER_VERSION, TransformerTrainConfig
from ibq.distributed import initialized, is_writer, world_size
from ibq.losses import NextTokenLoss
from ibq.models.transformer import Transformer
from ibq.models.transformer.blocks import Block
from ibq.run_directory import source_commit
from ibq.training.checkpoint import Checkpoint, random_states, require_version, restore_random_states, save_checkpoint
from ibq.training.logging import LossWindow
from ibq.training.optimizer import TrainedNetwork, first_non_finite
from ibq.training.row import peak_memory_gib
from ibq.training.sharding import gather_for_writer, part_like, shard, whole

COUNTED = ("step", "seconds", "encode_seconds", "peak_memory_gib")
"""Of a state, by their names in a checkpoint's meta."""


class TransformerState:
    """The trained network, `average` where the config has an average, window, step, and what training has cost.

    Args:
        config: of the run; its seed decides the weights that the transformer begins with.
        device: where it is trained.
        sharding: "fsdp" leaves each of several processes a part of every layer.
    """

    def __init__(self, config: TransformerTrainConfig, device: torch.device, sharding: str) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        network = NextTokenLoss(Transformer(config.transformer_config).to(device))
        self.transformer, self.sharded = network.transformer, sharding == "fsdp" and initialized()
        if self.sharded:
            shard(network, self.transformer.blocks, device)
        self.trained = TrainedNetwork(
            network,
            adamw(config, network),
            accumulate=config.accumulate,
            clip_norm=config.optim.clip_norm,
            precision=config.precision,
            device=device,
        )
        decay = config.optim.ema_decay
        self._average_in = get_ema_multi_avg_fn(decay or 0.0)
        self.average = {} if decay is None else {name: weight.clone() for name, weight in self._weights().items()}
        self.log_window = LossWindow(device)
        self.step, self.seconds, self.encode_seconds, self.peak_memory_gib = 0, 0.0, 0.0, 0.0

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.transformer.named_parameters()}

    def set_schedules(self) -> float:
        """Learning rate, which is returned, and weight decay of the next update."""
        lr = self.config.lr_at(self.step)
        self.trained.set_lr(lr)
        self.trained.optimizer.param_groups[0]["weight_decay"] = self.config.optim.decay(self.step, self.config.steps)
        return lr

    def update_average(self) -> None:
        if self.average:
            self._average_in([*self.average.values()], [*self._weights().values()], self.step)

    def report(self) -> dict[str, float]:
        """Of the last step the loss, in nats a token, the norm of the gradient before clipping, and in fp16 the scale
        of losses; and the mean loss of all batches since the last report. A collective."""
        of_step = self.trained.report()
        mean = self.log_window.mean()
        self.log_window.reset()
        shown = {name: of_step[name] for name in ("loss", "gradient_norm", "fp16_scale") if name in of_step}
        return shown | {"loss_mean": mean}

    def result(self) -> Transformer:
        """The transformer that the run has come to, averaged where the config has an average: whole on every process,
        in eval mode.

        A collective. Where nothing is sharded it shares its weights with the state.
        """
        with torch.device("meta"):
            transformer = Transformer(self.config.transformer_config)
        weights = {name: whole(weight) for name, weight in (self.average or self._weights()).items()}
        transformer.load_state_dict(weights, assign=True)
        return transformer.eval().requires_grad_(False)

    def speed_up(self, *, compiled: bool, checkpoint_activations: bool) -> None:
        """Options that make a step faster or smaller and change its numbers by rounding at most. Blocks are alike, so
        that one is compiled."""
        for block in self.transformer.modules():
            if isinstance(block, Block):
                block.checkpointed = checkpoint_activations
                if compiled:
                    block.compile(options={"fallback_random": True})  # dropout draws what it draws uncompiled

    def distribute(self) -> None:
        """Share the work with the other processes, if there are any; to be called once all is as it shall begin or go
        on."""
        if initialized() and not self.sharded:
            self.trained.wrap_in_ddp()

    def first_non_finite(self) -> str | None:
        """Name of a weight that is not finite, if a process has one; a collective."""
        return first_non_finite([self.trained])

    def record_peak_memory(self) -> None:
        """Note how much memory this process has needed; once an evaluation has begun it is no longer training's."""
        self.peak_memory_gib = max(self.peak_memory_gib, peak_memory_gib(self.device))

    def save(self, folder: Path, belongs_to: dict[str, str]) -> None:
        """Write the checkpoint, which is rank 0's state but for the window, which is everyone's; a collective.

        Args:
            folder: of the checkpoint.
            belongs_to: hashes of what the run learns from, for the meta file.
        """
        tensors = self.trained.state_tensors("model")
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        tensors = gather_for_writer(tensors | {"window.log": self.log_window.total()} | random_states(self.device))
        meta = {name: getattr(self, name) for name in COUNTED} | belongs_to
        meta |= {"scalers": {"model": self.trained.scaler.state_dict()}}
        meta |= {"processes": world_size(), "sharded": self.sharded, "commit": source_commit()}
        meta |= {"results_version": RESULTS_VERSION, "transformer_version": TRANSFORMER_VERSION}
        if is_writer():
            save_checkpoint(folder, tensors, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        """ConfigError: the checkpoint is of another version of the code."""
        tensors, meta = checkpoint.tensors, checkpoint.meta
        require_version(meta, "results_version", RESULTS_VERSION)
        require_version(meta, "transformer_version", TRANSFORMER_VERSION)
        self.trained.restore("model", checkpoint, updated=meta["step"] > 0)
        for name, weight in self.average.items():
            weight.copy_(part_like(tensors[f"average.{name}"], weight))
        self.log_window.restore(tensors["window.log"])
        restore_random_states(tensors, self.device)
        for name in COUNTED:
            setattr(self, name, meta[name])


def adamw(config: TransformerTrainConfig, network: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW whose first group of parameters has weight decay; `optim.decayed` says which these are."""
    optim, parameters = config.optim, list(network.parameters())
    least = {"all": 0, "matrices": 2}[optim.decayed]  # dimensions; embeddings are matrices
    groups = [[p for p in parameters if p.ndim >= least], [p for p in parameters if p.ndim < least]]
    decays = (optim.decay(0, config.steps), 0.0)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True) if group],
        lr=optim.lr,
        betas=optim.betas,
        fused=True,
    )
