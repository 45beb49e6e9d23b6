"""Training of a tokenizer: a generator that yields an event per log step, so that a script, a sweep and a live notebook
drive the same loop.

Suffixes: B images, C channels, H W pixels or token grid, D code dimension, N tokens, K codes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ibq.config import TrainConfig
from ibq.data import ImageSource, data_hash, load_images
from ibq.data.loader import TrainingBatches
from ibq.distributed import any_rank, barrier, is_writer, rank, resolve_device, shared_errors, world_size
from ibq.errors import ConfigError, DataError, NonFiniteError, NonFiniteInputError, require_packages
from ibq.evaluation.diagnosis import diagnose, summary
from ibq.evaluation.tokenizer import evaluate, evaluating
from ibq.losses import (
    PerceptualLoss,
    adaptive_weight,
    discriminator_terms,
    discriminator_weights,
    frozen,
    generator_loss,
    loss_weights,
    perceptual_loss,
    pixel_loss,
    weighted_sum,
)
from ibq.models.tokenizer import Reconstruction, Tokenizer
from ibq.run_directory import RunDirectory, append_line, save_source, write_json, write_tensors
from ibq.training.claim import agreed, already_finished, newest_checkpoint, tidy
from ibq.training.control import Control
from ibq.training.interventions import Asked, Journal
from ibq.training.logging import (
    GAP_PROTOCOL,
    GAPS,
    EntropyPull,
    Throughput,
    feature_dimensions,
    geometry,
    take_snapshot,
)
from ibq.training.optimizer import AUTOCAST
from ibq.training.row import cause, peak_memory_gib, row_of, write_lost
from ibq.training.runtime import LogEvent, Runtime, StopRequested
from ibq.training.tokenizer_state import TrainingState


def train_tokenizer(
    config: TrainConfig,
    run_directory: str | Path,
    runtime: Runtime = Runtime(),
    should_stop: Callable[[], bool] = lambda: False,
    intervene: Asked | None = None,
    perceptual: PerceptualLoss | None = None,
) -> Iterator[LogEvent]:
    """Train, evaluate and write the row; a directory with a checkpoint is resumed, one with a row yields nothing.

    Several processes, as torchrun starts them, train one run together, each a share of every batch. Rank 0 writes all
    files; which errors there are, and when to stop, they agree on. A run may go on with another number of processes.

        with process_group():
            for event in train_tokenizer(config, run_directory):
                ...

    Args:
        config: what to train.
        run_directory: its directory, made if absent; must not hold another config. All processes see the same one.
        runtime: device and cadences.
        should_stop: asked before every step; once true on any process, or stopped by control.jsonl, a checkpoint is
            written and all raise StopRequested.
        intervene: asked before every step what to change, given the number of finished updates; in one process alone.
            What it returns takes effect at once and is recorded in the directory, so that a resume repeats it.
        perceptual: the perceptual term; None: the one that the config names, with its pretrained network.

    Yields:
        a LogEvent every `runtime.log_every` steps and at the last one.

    Raises:
        StopRequested: see should_stop.  NonFiniteError: after a row with status "nan" was written.
        ConfigError: the directory belongs to another config, the data has too few images, processes see different
            files, or an intervention does not fit.
        DataError: the data, or the perceptual term's network, cannot be had.
    """
    # ---------------------------------------------------------------- data, device, directory
    run, writer = RunDirectory(run_directory), is_writer()
    if already_finished(run, config):
        return
    with shared_errors(ConfigError, DataError):
        require_packages("torchmetrics", "torch_fidelity")  # the evaluation at the end needs them
        device = resolve_device(runtime.device)
        train_images, test_images = load_images(config.data, "train"), load_images(config.data, "test")
        if (n_images := len(train_images)) < config.batch_size:
            raise ConfigError(
                f"batch_size={config.batch_size} exceeds the {n_images} training images of {config.data.kind}; lower it"
            )
        state = TrainingState(config, device)
    perceptual = perceptual.to(device) if perceptual else perceptual_loss(config, device)
    data = agreed(run, "data", data_hash(train_images, test_images))
    if writer:
        write_json(run.config, config.to_json_dict())
        save_source(config.quantizer.method, run.path)

    # ---------------------------------------------------------------- state: fresh, or as the checkpoint
    tokenizer, generator = state.tokenizer, state.generator
    checkpoint, damaged = newest_checkpoint(run, {"data_hash": data})
    if checkpoint is None and state.quantized_since == 0:
        initialize_codebook(tokenizer, config, train_images, device)
    state.start_average()
    if checkpoint is not None:
        state.restore(checkpoint)
        if writer and (note := _other_means(config, checkpoint.meta.get("processes", 1))):
            append_line(run.attempts, {"event": "other processes", "reason": f"{note} from step {state.step}"})
    del checkpoint  # as large as the whole state, and in memory of the CPU
    state.distribute()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the row's peak is of this run
    state.speed_up(
        compiled=runtime.compile, checkpoint_activations=runtime.checkpoint_activations, backend=runtime.backend
    )
    snapshot_steps = {round(config.steps * i / max(1, runtime.snapshots - 1)) for i in range(runtime.snapshots)}
    if writer:
        for damage in damaged:
            append_line(run.attempts, {"event": "damaged", "reason": f"{damage}; going on from step {state.step}"})
        run.rewind(state.step)
    with shared_errors(ConfigError):
        control = Control(run, should_stop)
        journal = Journal(run, config, state.step, intervene, control)
    state.reconfigure(config := journal.config)
    if state.step == 0 and 0 in snapshot_steps:
        snapshot = take_snapshot(tokenizer, test_images, state.snapshot_window.total(), device)
        if writer:
            run.write_snapshot(0, snapshot)

    # ---------------------------------------------------------------- the loop
    autocast = torch.autocast(device.type, AUTOCAST[config.precision], enabled=config.precision != "fp32")
    last_checkpoint, saved_step = time.perf_counter(), state.step
    throughput = Throughput(state, config.batch_size)
    share = {"rank": rank(), "world": world_size()}
    with TrainingBatches(
        train_images, config, device, first_step=state.step, workers=runtime.workers, **share
    ) as batches:
        while state.step < config.steps:
            # ---------------------------- before a step, all processes agreeing: stop, checkpoint; none of it counts as
            due = (
                writer
                and state.step != saved_step
                and time.perf_counter() - last_checkpoint > runtime.checkpoint_every_s
            )
            stop, save = any_rank(control.should_stop(), due)
            if stop or save:
                if name := state.first_non_finite():
                    raise _lost(run, state, f"step {state.step}: {name!r} is not finite after the update", data)
                state.save(run.checkpoint, data)
                last_checkpoint, saved_step = time.perf_counter(), state.step
            if stop:
                barrier()  # whoever ends before the checkpoint is whole could have all processes ended
                control.stopped(state.step)
                raise StopRequested(f"stopped at step {state.step} of {config.steps}; the next run goes on from there")

            # ---------------------------- one training step, after what an intervention changes
            started = time.perf_counter()
            with shared_errors(DataError):
                batch_BCHW = batches.next()
            micro_batches, last = batch_BCHW.chunk(config.accumulate), config.accumulate - 1
            for intervention in journal.due(state.step):
                state.reconfigure(config := journal.config)
                if intervention.restart_dead:
                    state.restart_dead(features_of(tokenizer, micro_batches[0]))
            logged = (state.step + 1) % runtime.log_every == 0 or state.step + 1 == config.steps
            lr = config.lr_at(state.step)
            discriminator = state.discriminator
            y_BCHW = torch.empty(0)  # no reconstruction yet
            if state.quantized_since is None and state.step >= config.quantize_start:
                wanted = tokenizer.quantize.features_to_cluster
                state.begin_quantizing(features_from(state.step, wanted, tokenizer, config, train_images, device))
            if quantizing := state.quantized_since is not None:
                tokenizer.quantize.set_step(state.step - state.quantized_since)
            forward = partial(generator.model, quantize=quantizing)
            reconstruct = partial(_reconstruct, tokenizer, autocast, quantizing)
            try:
                # One forward pass serves both steps. With micro-batches each step takes its own: the graphs of all of
                # them would not fit.
                outputs: list[Reconstruction] = []
                if config.accumulate == 1:
                    with autocast:
                        outputs = [forward(batch_BCHW)]

                # ------------------------ discriminator step, first
                if discriminator is not None:
                    discriminator.set_lr(lr)
                    discriminator.zero_grad()
                    logit_means = []
                    for i, x_BCHW in enumerate(micro_batches):
                        with discriminator.no_sync(enabled=i < last):
                            y_BCHW = outputs[i].images.detach() if outputs else reconstruct(x_BCHW)
                            with autocast:
                                real_BHW = discriminator.model(x_BCHW)[:, 0]
                                fake_BHW = discriminator.model(y_BCHW)[:, 0]
                            real_BHW, fake_BHW = real_BHW.float(), fake_BHW.float()
                            terms = discriminator_terms(config, real_BHW, fake_BHW, state.logit_averages_2)
                            discriminator.backward(terms, discriminator_weights(config))
                        logit_means.append(torch.stack([real_BHW.detach().mean(), fake_BHW.detach().mean()]))
                    discriminator.unscale_and_clip()
                    discriminator.step()
                    logit_means_2 = state.update_logit_averages(torch.stack(logit_means).mean(0))

                # ------------------------ generator step: encoder, quantizer, decoder
                generator.set_lr(lr)
                generator.zero_grad()
                for i, x_BCHW in enumerate(micro_batches):
                    with generator.no_sync(enabled=i < last):
                        with autocast:
                            y_BCHW, z_BDHW, quantized = outputs[i] if outputs else forward(x_BCHW)
                        y_BCHW = y_BCHW.float()
                        weights = loss_weights(config, adversarial=discriminator is not None, quantize=quantizing)
                        terms = {"pixel": pixel_loss(x_BCHW, y_BCHW, config.loss.pixel)}
                        if perceptual is not None:
                            with autocast:
                                terms[perceptual.term] = perceptual(x_BCHW, y_BCHW)
                        if discriminator is not None:
                            with autocast, frozen(discriminator.network):
                                fake_BHW = discriminator.network(y_BCHW)[:, 0]
                            adversarial = generator_loss(fake_BHW.float())
                            if config.loss.adversarial.adaptive:
                                reconstruction = weighted_sum(terms, {name: weights[name] for name in terms})
                                scale = generator.scaler.get_scale()
                                weights["adversarial"] *= adaptive_weight(
                                    reconstruction, adversarial, tokenizer.last_layer, scale
                                )
                            terms["adversarial"] = adversarial
                        if logged and i == last:
                            pull = EntropyPull(z_BDHW, quantized.losses, weights)
                        generator.backward(terms | quantized.losses, weights)
                    state.count(quantized.indices, terms["pixel"])
                generator.unscale_and_clip()
                generator.step()
            except (NonFiniteError, NonFiniteInputError) as error:
                # NonFiniteInputError: the quantizer refuses what encoder or codebook has come to
                reason = cause(_non_finite_images(batch_BCHW, y_BCHW), error)
                raise _lost(run, state, f"step {state.step}: {reason}", data) from None
            state.update_average()
            state.step += 1
            state.seconds += time.perf_counter() - started

            # ---------------------------- once in a while: log, snapshot
            if logged:
                record = (
                    {"step": state.step, "seconds": state.seconds, "lr": lr}
                    | generator.report()
                    | throughput.report(batches.waited_s)
                )
                if discriminator is not None:
                    real, fake = logit_means_2.tolist()
                    record |= discriminator.report("discriminator_") | {"logit_real": real, "logit_fake": fake}
                report, counts_K = state.report()
                record |= report
                if quantizing:
                    record |= geometry(tokenizer, z_BDHW.detach(), quantized.z_q.detach(), counts_K)
                else:
                    record |= feature_dimensions(tokenizer, z_BDHW.detach())
                record |= pull.report(generator.scaler.get_scale() / config.accumulate)
                # fp16 skips infinite gradients
                record = {name: value for name, value in record.items() if math.isfinite(value)}
                if writer:
                    append_line(run.history, record)
                yield LogEvent(state.step, config.steps, record, tokenizer, counts_K)
            if state.step in snapshot_steps:
                snapshot = take_snapshot(tokenizer, test_images, state.snapshot_window.total(), device)
                state.snapshot_window.reset()
                if writer:
                    run.write_snapshot(state.step, snapshot)

    # ---------------------------------------------------------------- evaluate the averaged weights; the row comes last
    averaged = state.averaged_tokenizer
    peak = {"peak_memory_gib": peak_memory_gib(device)}  # of training: not of what an evaluation imports
    try:
        metrics, protocol, tensors = evaluate(
            averaged, test_images, runtime.eval_images, runtime.eval_batch_size, weights="ema"
        )
    except NonFiniteInputError as error:  # the last update was one too many
        raise _lost(run, state, f"step {state.step}: in the evaluation {error}", data) from None
    if writer:
        write_tensors(run.evaluation, tensors)
        write_tensors(run.model, averaged.state_dict())
    if unusable := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise _lost(run, state, f"step {state.step}: evaluation gave {', '.join(unusable)} that are not finite", data)
    if writer:
        if config.steps in snapshot_steps:
            last_snapshot = run.read_snapshot(config.steps)
            gaps = {
                name: last_snapshot[name].item()
                for name in GAPS
                if name in last_snapshot and last_snapshot[name].isfinite()
            }
            metrics |= gaps
            protocol |= {"gap": GAP_PROTOCOL} if gaps else {}
        metrics |= {"interventions": journal.number} if journal.number else {}
        write_json(run.row, _row(run, state, "ok", peak | metrics, protocol, data))
        tidy(run)
    barrier()  # the run is finished for every process


def _reconstruct(
    tokenizer: Tokenizer, autocast: AbstractContextManager[Any], quantize: bool, x_BCHW: torch.Tensor
) -> torch.Tensor:
    """Reconstructions of images, without a graph and without what a training pass changes in the quantizer; a
    collective, so that processes refuse together what is not finite (NonFiniteInputError)."""
    with shared_errors(NonFiniteInputError), autocast, evaluating(tokenizer):
        y_BCHW: torch.Tensor = tokenizer(x_BCHW, quantize=quantize).images
    return y_BCHW


@torch.no_grad()
def features_of(tokenizer: Tokenizer, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Features of images before they are quantized, (N, D) in float32, without a trace in what training moves."""
    return tokenizer.features(x_BCHW).permute(0, 2, 3, 1).flatten(0, 2).float()


@torch.no_grad()
def initialize_codebook(tokenizer: Tokenizer, config: TrainConfig, images: ImageSource, device: torch.device) -> None:
    """Codes begin as features of the run's first batches, where the config wants that."""
    quantizer = tokenizer.quantize
    if not quantizer.awaits_features:
        return
    features_MD = features_from(0, quantizer.features_wanted, tokenizer, config, images, device)
    quantizer.initialize_from(features_MD, torch.Generator().manual_seed(config.seed))


@torch.no_grad()
def features_from(
    step: int, wanted: int, tokenizer: Tokenizer, config: TrainConfig, images: ImageSource, device: torch.device
) -> torch.Tensor:
    """Features (M, D) of the batches that follow `step` finished updates, M at least `wanted`."""
    features = [torch.empty(0, config.quantizer.code_dim, device=device)]
    with TrainingBatches(images, config, device, first_step=step, workers=0) as batches:
        for _ in range(math.ceil(wanted / (config.batch_size * config.tokens_per_image))):
            for x_BCHW in batches.next().split(_images_at_once(config)):
                features.append(features_of(tokenizer, x_BCHW))
    return torch.cat(features)


def _non_finite_images(x_BCHW: torch.Tensor, y_BCHW: torch.Tensor) -> str:
    """Opening words of the reason why a step is refused; empty where images and reconstructions are finite."""
    images = {"the images are not finite: ": x_BCHW, "the reconstructions are not finite: ": y_BCHW}
    return next((words for words, images_BCHW in images.items() if not images_BCHW.isfinite().all()), "")


def _images_at_once(config: TrainConfig) -> int:
    """Images of a micro-batch in one process: what fits its memory, and what local means and batch norm see."""
    return config.batch_size // (world_size() * config.accumulate)


def _other_means(config: TrainConfig, processes: int) -> str | None:
    """Words for the change that a resume on another number of processes makes, if it is more than rounding."""
    adversarial = config.loss.adversarial
    local = config.averages == "local" or (adversarial.weight and adversarial.norm == "batch")
    if processes == world_size() or not local:
        return None
    return (
        f"{world_size()} processes in place of {processes}: means of a process are over {_images_at_once(config)} "
        f"images"
    )


def _lost(run: RunDirectory, state: TrainingState, reason: str, data: str) -> NonFiniteError:
    """Write the row of a run that did not stay finite; returns what to raise. A collective, as all processes raise
    it."""
    return write_lost(
        run, _row(run, state, "nan", {"peak_memory_gib": peak_memory_gib(state.device), "reason": reason}, {}, data)
    )


def _row(
    run: RunDirectory, state: TrainingState, status: str, metrics: dict[str, Any], protocol: dict[str, Any], data: str
) -> dict[str, Any]:
    """Run facts, flat; what is diagnosed is the whole history, whichever attempts wrote it."""
    config = state.tokenizer.config
    tokens_per_mean = (
        _images_at_once(config) * config.tokens_per_image * (world_size() if config.averages == "global" else 1)
    )
    facts = {
        "data_hash": data,
        "parameters": sum(p.numel() for p in state.tokenizer.parameters()),
        "train_seconds": state.seconds,
        "tokens_per_mean": tokens_per_mean,
        "diagnosis": summary(diagnose(run.read_history())),
    }
    return row_of(config, status, facts | metrics, protocol, state.device)
