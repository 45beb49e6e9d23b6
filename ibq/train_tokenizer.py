"""Train one tokenizer: a generator that yields an event per log step, so that a script, a sweep and a live notebook drive the same loop.

Suffixes: B images, C channels, H W pixels or token grid, D code dimension, N tokens, K codes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ibq.checkpoint import Checkpoint, flatten_optimizer, load_checkpoint, remove_checkpoint, restore_optimizer, save_checkpoint
from ibq.config import RESULTS_VERSION, TrainConfig, flatten, parse_train_config
from ibq.data import Images, data_hash, load_images
from ibq.errors import ConfigError, NonFiniteInputError
from ibq.evaluation import evaluate
from ibq.losses import loss_weights, pixel_loss, weighted_sum
from ibq.metrics import usage_metrics
from ibq.models.tokenizer import Tokenizer
from ibq.observation import GAP_PROTOCOL, GAPS, LossWindow, TokenWindow, geometry, take_snapshot
from ibq.quantizers.base import CodebookQuantizer
from ibq.run_directory import RunDirectory, append_line, source_commit, write_json, write_tensors


@dataclass(frozen=True)
class Runtime:
    """Where and how a run is watched; nothing here changes its weights, so nothing here enters its id."""

    device: str = "auto"
    log_every: int = 10
    snapshots: int = 8
    checkpoint_every_s: float = 60.0
    eval_images: int = 2000
    eval_batch_size: int = 100


@dataclass(frozen=True)
class LogEvent:
    """One log step: `step` updates of `steps` are done; `record` is the line that went into history.jsonl."""

    step: int
    steps: int
    record: dict[str, Any]


class NonFiniteError(FloatingPointError):
    """A loss term or the gradient left the finite numbers; the message names step and term."""


class StopRequested(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop; its checkpoint is on disk."""


def resolve_device(name: str) -> torch.device:
    """The torch device for 'auto', 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        ConfigError: the name is not a device's, or a CUDA device is named and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is not known; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r} was asked for but torch sees no CUDA device; use device='auto' or 'cpu'")
    return device


def batch_indices(seed: int, step: int, n_images: int, batch_size: int) -> torch.Tensor:
    """Which images (B,) a step trains on: a fresh permutation each epoch; a function of seed and step, so that resuming needs no state."""
    batches_per_epoch = max(1, n_images // batch_size)
    epoch, batch = divmod(step, batches_per_epoch)
    return _permutation(seed * 1_000_003 + epoch, n_images)[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class _State:
    """Everything that training changes, so that one object is saved, restored and passed on."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.tokenizer = Tokenizer(config).to(device).to(memory_format=torch.channels_last)
        trained = [parameter for parameter in self.tokenizer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.optim.lr, betas=config.optim.betas, fused=True)
        self.log_window, self.snapshot_window = (TokenWindow(config.quantizer.codebook_size, device) for _ in range(2))
        self.pixel_window = LossWindow(device)
        self.step, self.seconds, self.device = 0, 0.0, device

    def start_average(self) -> None:
        """Begin the averaged weights; after the codebook is initialised, since they start as a copy."""
        decay = self.tokenizer.config.optim.ema_decay
        self.average = AveragedModel(self.tokenizer, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.average.n_averaged.fill_(1)  # the initial weights count: no warm-up, as released

    def update_average(self) -> None:
        self.average.update_parameters(self.tokenizer)
        averaged = self.average.module
        assert isinstance(averaged, Tokenizer)
        self.tokenizer.quantize.mend_average(averaged.quantize)

    def save(self, folder: Path, data_hash: str) -> None:
        tensors = {f"model.{name}": value for name, value in self.tokenizer.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        tensors |= flatten_optimizer(self.tokenizer, self.optimizer)
        tensors |= {"window.log": self.log_window.counts_K, "window.snapshot": self.snapshot_window.counts_K}
        tensors["window.pixel"] = self.pixel_window.sum_and_count
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        meta = {"step": self.step, "seconds": self.seconds, "data_hash": data_hash}
        meta |= {"commit": source_commit(), "results_version": RESULTS_VERSION}
        save_checkpoint(folder, tensors, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        tensors, meta = checkpoint.tensors, checkpoint.meta

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.tokenizer.load_state_dict(part("model."))
        self.average.load_state_dict(part("average."))
        if meta["step"]:
            restore_optimizer(self.tokenizer, self.optimizer, tensors)
        self.log_window.counts_K = tensors["window.log"].to(self.device)
        self.snapshot_window.counts_K = tensors["window.snapshot"].to(self.device)
        self.pixel_window.sum_and_count = tensors["window.pixel"].to(self.device)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:  # a run begun on a CPU may go on on a GPU
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step, self.seconds = meta["step"], meta["seconds"]


def train_tokenizer(
    config: TrainConfig, run_directory: str | Path, runtime: Runtime = Runtime(), should_stop: Callable[[], bool] = lambda: False
) -> Iterator[LogEvent]:
    """Train, evaluate and write the row; a directory with a checkpoint is resumed, one with a row yields nothing.

    Args:
        config: what to train.
        run_directory: its directory, made if absent; must not hold another config.
        runtime: device and cadences.
        should_stop: asked before every step; once true, a checkpoint is written and StopRequested raised.

    Yields:
        a LogEvent every `runtime.log_every` steps and at the last one.

    Raises:
        StopRequested: see should_stop.  NonFiniteError: after a row with status "nan" was written.
        ConfigError: the directory belongs to another config, or the data has too few images.
    """
    # ---------------------------------------------------------------- data, device, directory
    run = RunDirectory(run_directory)
    _check_config(run, config)
    if run.finished:
        remove_checkpoint(run.checkpoint)  # a kill may have come between the row and this
        return
    device = resolve_device(runtime.device)
    train_images, test_images = load_images(config.data, "train"), load_images(config.data, "test")
    if len(train_images) < config.batch_size:
        raise ConfigError(f"batch_size={config.batch_size} exceeds the {len(train_images)} training images of {config.data.kind}; lower it")
    data = data_hash(train_images, test_images)
    write_json(run.config, config.to_json_dict())

    # ---------------------------------------------------------------- model, optimizer, average: fresh, or as the checkpoint has them
    weights = loss_weights(config)
    state = _State(config, device)
    tokenizer, optimizer = state.tokenizer, state.optimizer
    checkpoint, damaged = load_checkpoint(run.checkpoint)
    if checkpoint is None:
        initialize_codebook(tokenizer, config, train_images, device)
    state.start_average()
    if checkpoint is not None:
        if checkpoint.meta["data_hash"] != data:
            trained_on, given = checkpoint.meta["data_hash"][:12], data[:12]
            raise ConfigError(f"{run.path} was trained on data {trained_on}, not {given}; give it that data or another directory")
        state.restore(checkpoint)
    for damage in damaged:
        append_line(run.attempts, {"event": "damaged", "reason": f"{damage}; going on from step {state.step}"})
    run.rewind(state.step)
    snapshot_steps = {round(config.steps * i / max(1, runtime.snapshots - 1)) for i in range(runtime.snapshots)}
    if state.step == 0 and 0 in snapshot_steps:
        run.write_snapshot(0, take_snapshot(tokenizer, test_images, state.snapshot_window, device))

    # ---------------------------------------------------------------- the loop
    last_checkpoint = time.perf_counter()
    while state.step < config.steps:
        if should_stop():
            state.save(run.checkpoint, data)
            raise StopRequested(f"stopped at step {state.step} of {config.steps}; the next run goes on from there")

        # one training step
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(state.step)
        x_BCHW = train_images.batch(batch_indices(config.seed, state.step, len(train_images), config.batch_size), device)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                y_BCHW, z_BDHW, quantized = tokenizer(x_BCHW)
        except NonFiniteInputError as error:  # the quantizer refuses what the encoder or the codebook has come to
            raise _lost(run, state, f"step {state.step}: {error}", data) from None
        terms = {"pixel": pixel_loss(x_BCHW, y_BCHW.float(), config.loss.pixel)} | quantized.losses
        loss = weighted_sum(terms, weights)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in tokenizer.parameters() if p.grad is not None])
        if not bool(torch.isfinite(loss) & torch.isfinite(gradient_norm)):
            raise _lost(run, state, _name_non_finite(state.step, terms, tokenizer), data)
        optimizer.step()
        state.update_average()
        state.log_window.add(quantized.indices)
        state.pixel_window.add(terms["pixel"])
        state.snapshot_window.add(quantized.indices)
        state.step += 1
        state.seconds += time.perf_counter() - started

        # once in a while: log, snapshot, checkpoint; none of it counts as training time
        if state.step % runtime.log_every == 0 or state.step == config.steps:
            record = {"step": state.step, "seconds": state.seconds, "lr": optimizer.param_groups[0]["lr"]}
            record |= {"gradient_norm": gradient_norm.item(), "loss": loss.item()}
            record |= {f"loss_{name}": term.item() for name, term in terms.items()}
            record["pixel_mean"] = state.pixel_window.mean()  # of all batches since the last line, where loss_pixel is of this one
            record |= usage_metrics(state.log_window.counts_K) | geometry(tokenizer, z_BDHW.detach(), quantized.z_q.detach())
            state.log_window.reset()
            state.pixel_window.reset()
            append_line(run.history, record)
            yield LogEvent(state.step, config.steps, record)
        if state.step in snapshot_steps:
            run.write_snapshot(state.step, take_snapshot(tokenizer, test_images, state.snapshot_window, device))
            state.snapshot_window.reset()
        if time.perf_counter() - last_checkpoint > runtime.checkpoint_every_s and state.step < config.steps:
            state.save(run.checkpoint, data)
            last_checkpoint = time.perf_counter()

    # ---------------------------------------------------------------- evaluate the averaged weights; the row comes last
    averaged = state.average.module
    assert isinstance(averaged, Tokenizer)
    peak = {"peak_memory_gib": _peak_memory_gib(device)}  # of training: not of what an evaluation imports
    try:
        metrics, protocol, tensors = evaluate(averaged, test_images, runtime.eval_images, runtime.eval_batch_size, weights="ema")
    except NonFiniteInputError as error:  # the last update was one too many
        raise _lost(run, state, f"step {state.step}: in the evaluation {error}", data) from None
    write_tensors(run.evaluation, tensors)
    write_tensors(run.model, averaged.state_dict())
    if unusable := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise _lost(run, state, f"step {state.step}: evaluation gave {', '.join(unusable)} that are not finite", data)
    if config.steps in snapshot_steps:
        last = run.read_snapshot(config.steps)
        gaps = {name: last[name].item() for name in GAPS if name in last and last[name].isfinite()}
        metrics |= gaps
        protocol |= {"gap": GAP_PROTOCOL} if gaps else {}
    write_json(run.row, _row(state, "ok", peak | metrics, protocol, data))
    remove_checkpoint(run.checkpoint)


@torch.no_grad()
def initialize_codebook(tokenizer: Tokenizer, config: TrainConfig, images: Images, device: torch.device) -> None:
    """Where the config wants codes that begin as features: encode the run's first batches until there are enough."""
    quantizer = tokenizer.quantize
    if not (isinstance(quantizer, CodebookQuantizer) and quantizer.awaits_features):
        return
    batches = math.ceil(quantizer.features_wanted / (config.batch_size * config.tokens_per_image))
    features = []
    for step in range(batches):
        z_BDHW = tokenizer.features(images.batch(batch_indices(config.seed, step, len(images), config.batch_size), device))
        features.append(z_BDHW.permute(0, 2, 3, 1).flatten(0, 2))
    quantizer.initialize_from(torch.cat(features).float(), torch.Generator().manual_seed(config.seed))


def _check_config(run: RunDirectory, config: TrainConfig) -> None:
    """Refuse a directory whose config.json is another config."""
    if run.config.is_file():
        try:
            theirs = parse_train_config(json.loads(run.config.read_text())).identity()
        except ValueError as error:
            raise ConfigError(f"{run.config} cannot be read ({' '.join(str(error).split())}); forget the run") from None
        if theirs != config.identity():
            mine, other = flatten(config.identity()), flatten(theirs)
            field = next(name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name))
            raise ConfigError(f"{run.path} holds a run with {field}={other.get(field)!r}, not {mine.get(field)!r}; pass another directory")


def _name_non_finite(step: int, terms: dict[str, torch.Tensor], tokenizer: Tokenizer) -> str:
    bad = [f"loss term {name!r} is {value.item()}" for name, value in terms.items() if not torch.isfinite(value)]
    gradients = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
    bad += [f"the gradient of {name!r} is not finite" for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return f"step {step}: {bad[0] if bad else 'the gradient norm overflowed'}"


def _lost(run: RunDirectory, state: _State, reason: str, data: str) -> NonFiniteError:
    """Write the row of a run that did not stay finite; returns what to raise."""
    write_json(run.row, _row(state, "nan", {"peak_memory_gib": _peak_memory_gib(state.device), "reason": reason}, {}, data))
    return NonFiniteError(reason)


def _peak_memory_gib(device: torch.device) -> float:
    """What this process has needed so far: of the device's memory or, on a CPU, of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _row(state: _State, status: str, metrics: dict[str, Any], protocol: dict[str, Any], data: str) -> dict[str, Any]:
    """Run facts, flat: config fields, metrics, protocol, cost, provenance."""
    config, device = state.tokenizer.config, state.device
    facts = {
        "run": config.run_id(data),
        "status": status,
        "method": config.quantizer.method,
        "codebook_size": config.quantizer.codebook_size,
        "code_dim": config.quantizer.code_dim,
        "seed": config.seed,
        "data_hash": data,
        "parameters": sum(p.numel() for p in state.tokenizer.parameters()),
        "train_seconds": state.seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": source_commit(),
        "results_version": RESULTS_VERSION,
    }
    fields = {f"config.{name}": value for name, value in flatten(config.identity()).items()}
    return facts | metrics | {f"protocol.{name}": value for name, value in protocol.items()} | fields
