"""Training of a transformer on a tokenizer's tokens: a generator function that yields an event per log step, as
`train_tokenizer` is.

Suffixes: B images, b those of a micro-batch, M those of both splits, T tokens of an image.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ibq.config import TRANSFORMER_VERSION, TransformerTrainConfig
from ibq.data import data_hash, data_hash_of, load_images
from ibq.data.loader import images_seen, require_even_shares
from ibq.data.tokens import TokenBatches, encode_split, labels_of
from ibq.distributed import any_rank, barrier, is_writer, rank, resolve_device, shared_errors, world_size
from ibq.errors import ConfigError, DataError, NonFiniteError, NonFiniteInputError, require_packages
from ibq.evaluation.transformer import evaluate_transformer
from ibq.models.tokenizer import Tokenizer
from ibq.run_directory import RunDirectory, append_line, write_json, write_tensors
from ibq.training.claim import agreed, already_finished, first_difference, newest_checkpoint, tidy
from ibq.training.control import Control
from ibq.training.logging import Throughput
from ibq.training.optimizer import AUTOCAST, seed_other_ranks
from ibq.training.row import row_of, write_lost
from ibq.training.runtime import LogEvent, Runtime, StopRequested
from ibq.training.transformer_state import TransformerState


def train_transformer(
    config: TransformerTrainConfig,
    tokenizer: Tokenizer,
    run_directory: str | Path,
    runtime: Runtime = Runtime(),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[LogEvent]:
    """Encode, train, evaluate and write the row; a directory with a checkpoint is resumed, one with a row yields
    nothing.

    Several processes, as torchrun starts them, train one run together, each a share of every batch and, with
    `runtime.sharding="fsdp"`, a part of every layer. Rank 0 writes all files; which errors there are, and when to stop,
    they agree on. A run may go on with another number of processes and another sharding. A copy of the tokenizer lies
    in the run's directory.

    Args:
        config: what to train.
        tokenizer: the one that the config names; moved to the device.
        run_directory: its directory, made if absent; must not hold another config. All processes see the same one.
        runtime: device, cadences, and what the evaluation samples.
        should_stop: asked before every step, and while images are encoded and sampled; once true on any process, what
            is done is kept and all raise StopRequested.

    Yields:
        a LogEvent every `runtime.log_every` steps and at the last one.

    Raises:
        StopRequested: see should_stop.  NonFiniteError: after a row with status "nan" was written.
        ConfigError: the directory belongs to another config, the tokenizer is another, it cannot encode the data,
            labels do not fit `classes`, the data has too few images, or processes see different files.
        DataError: the data cannot be had.
    """
    # ---------------------------------------------------------------- data, device, tokenizer, directory
    run, writer = RunDirectory(run_directory), is_writer()
    if already_finished(run, config):
        return
    with shared_errors(ConfigError, DataError):
        require_packages("torchmetrics", "torch_fidelity")  # the evaluation at the end needs them
        device = resolve_device(runtime.device)
        require_tokenizer(config, tokenizer)
        require_even_shares(config, world_size())
        train_images, test_images = load_images(config.data, "train"), load_images(config.data, "test")
        if (n_images := len(train_images)) < config.batch_size:
            raise ConfigError(
                f"batch_size={config.batch_size} exceeds the {n_images} training images of {config.data.kind}; lower it"
            )
        labels_M = torch.cat([labels_of(images, config.classes) for images in (train_images, test_images)])
    tokenizer.to(device).eval()
    belongs_to = {
        "data_hash": agreed(run, "data", data_hash(train_images, test_images)),
        "labels_sha256": agreed(run, "labels", hashlib.sha256(labels_M.numpy().data).hexdigest()),
        "tokenizer_sha256": agreed(run, "tokenizer", tokenizer.digest()),
    }
    checkpoint, damaged = newest_checkpoint(run, belongs_to)
    if writer:
        write_json(run.config, config.to_json_dict())
        tokenizer.save(run.tokenizer)
        belongs_to |= _tokenizer_run(
            config, belongs_to["data_hash"]
        )  # for the row, and before the training, as it may read a data set

    # ---------------------------------------------------------------- tokens; those of fresh squares come step by step
    started = time.perf_counter()
    with _encoding(config):
        seen = images_seen(config.seed, config.steps, n_images, config.batch_size)
        judged = torch.arange(min(runtime.eval_images, len(test_images)))
        encode = partial(encode_split, tokenizer, classes=config.classes, beat=should_stop)
        train_tokens = encode(train_images, wanted=seen) if config.tokens == "cached" else None
        test_tokens = encode(test_images, wanted=judged)
    encode_seconds = time.perf_counter() - started

    # ---------------------------------------------------------------- transformer and average: fresh, or as the checkpo
    state = TransformerState(config, device, runtime.sharding)
    if checkpoint is not None:
        state.restore(checkpoint)
    del checkpoint  # as large as the whole state, and in memory of the CPU
    state.encode_seconds += encode_seconds
    state.distribute()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the row's peak is of this run's training
    state.speed_up(compiled=runtime.compile, checkpoint_activations=runtime.checkpoint_activations)
    if writer:
        for damage in damaged:
            append_line(run.attempts, {"event": "damaged", "reason": f"{damage}; going on from step {state.step}"})
        run.rewind(state.step)
    control = Control(run, should_stop, refusal="a transformer's run cannot be changed while it trains")

    # ---------------------------------------------------------------- the loop
    trained = state.trained
    autocast = torch.autocast(device.type, AUTOCAST[config.precision], enabled=config.precision != "fp32")
    last_checkpoint, saved_step = time.perf_counter(), state.step
    throughput = Throughput(state, config.batch_size)
    place = {"first_step": state.step, "rank": rank(), "world": world_size()}
    # where the evaluation alone is left, none shall begin to decode
    workers = runtime.workers if state.step < config.steps else 0
    with TokenBatches(config, tokenizer, train_images, train_tokens, device, **place, workers=workers) as batches:
        while state.step < config.steps:
            # ---------------------------- before a step, all processes agreeing: stop, checkpoint; none of it counts as
            due = (
                writer
                and state.step != saved_step
                and time.perf_counter() - last_checkpoint > runtime.checkpoint_every_s
            )
            stop, save = any_rank(control.should_stop(), due)
            if stop or save:
                _save(run, state, belongs_to)
                last_checkpoint, saved_step = time.perf_counter(), state.step
            if stop:
                barrier()  # whoever ends before the checkpoint is whole could have all processes ended
                control.stopped(state.step)
                raise StopRequested(f"stopped at step {state.step} of {config.steps}; the next run goes on from there")

            # ---------------------------- one training step
            started = time.perf_counter()
            with _encoding(config), shared_errors(DataError, NonFiniteInputError):
                tokens_BT, classes_B = batches.next()
            last = config.accumulate - 1
            # at each step, so that a run that goes on draws what it would have drawn
            seed_other_ranks(config.seed, state.step)
            try:
                lr = state.set_schedules()
                trained.zero_grad()
                micro_batches = zip(tokens_BT.chunk(config.accumulate), classes_B.chunk(config.accumulate), strict=True)
                for i, (tokens_bT, classes_b) in enumerate(micro_batches):
                    with trained.no_sync(enabled=i < last):
                        with autocast:
                            loss = trained.model(tokens_bT, classes_b)
                        trained.backward({"cross_entropy": loss}, {"cross_entropy": 1.0})
                    state.log_window.add(loss)
                trained.unscale_and_clip()
                trained.step()
            except NonFiniteError as error:
                state.record_peak_memory()
                raise _lost(run, state, f"step {state.step}: {error}", belongs_to) from None
            state.update_average()
            state.step += 1
            state.seconds += time.perf_counter() - started

            # ---------------------------- once in a while: log
            if state.step % runtime.log_every == 0 or state.step == config.steps:
                record = (
                    {"step": state.step, "seconds": state.seconds, "lr": lr}
                    | state.report()
                    | throughput.report(batches.waited_s)
                )
                record["tokens_per_s"] = record["images_per_s"] * config.tokens_per_image
                if writer:
                    append_line(run.history, record)
                yield LogEvent(state.step, config.steps, record)

    # ---------------------------------------------------------------- evaluate; a kill from here on costs no step again
    if saved_step != state.step:
        _save(run, state, belongs_to)
    transformer = state.result()
    try:
        metrics, protocol, tensors = evaluate_transformer(
            config, transformer, tokenizer, test_images, test_tokens, runtime, run.samples, should_stop
        )
    except (NonFiniteError, NonFiniteInputError) as error:  # the last update was one too many
        raise _lost(run, state, f"step {state.step}: in the evaluation {error}", belongs_to) from None
    if writer:
        if tensors:
            write_tensors(run.generated, tensors)
        write_tensors(run.model, transformer.state_dict())
    if unusable := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise _lost(
            run, state, f"step {state.step}: evaluation gave {', '.join(unusable)} that are not finite", belongs_to
        )
    if writer:
        write_json(run.row, _row(state, "ok", metrics, protocol, belongs_to))
        tidy(run)
    barrier()  # the run is finished for every process


def require_tokenizer(config: TransformerTrainConfig, tokenizer: Tokenizer) -> None:
    """ConfigError: the tokenizer is not the one that the config names."""
    if differing := first_difference(tokenizer.config.identity(), config.tokenizer.identity()):
        raise ConfigError(f"the tokenizer has {differing}; pass the one that the config names")
    if config.tokenizer_sha256 and (digest := tokenizer.digest()) != config.tokenizer_sha256:
        wanted = config.tokenizer_sha256[:12]
        raise ConfigError(
            f"the tokenizer has the digest {digest[:12]}, not tokenizer_sha256={wanted}; pass the one that the config "
            f"names"
        )


@contextmanager
def _encoding(config: TransformerTrainConfig) -> Iterator[None]:
    """Says in one sentence that a tokenizer is of no use (ConfigError)."""
    try:
        yield
    except NonFiniteInputError as error:
        raise ConfigError(
            f"the tokenizer cannot encode {config.data.kind}, as {error}; pass one whose run did not end as nan"
        ) from None


def _save(run: RunDirectory, state: TransformerState, belongs_to: dict[str, str]) -> None:
    """Write the checkpoint, if it would be of use; a collective. NonFiniteError: it would not."""
    state.record_peak_memory()
    if name := state.first_non_finite():
        raise _lost(run, state, f"step {state.step}: {name!r} is not finite after the update", belongs_to)
    state.save(run.checkpoint, belongs_to)


def _lost(run: RunDirectory, state: TransformerState, reason: str, belongs_to: dict[str, str]) -> NonFiniteError:
    """Write the row of a run that did not stay finite; returns what to raise. A collective, as all processes raise
    it."""
    return write_lost(run, _row(state, "nan", {"reason": reason}, {}, belongs_to))


def _row(
    state: TransformerState, status: str, metrics: dict[str, Any], protocol: dict[str, Any], belongs_to: dict[str, str]
) -> dict[str, Any]:
    """Run facts, flat."""
    config = state.config
    facts = belongs_to | {
        "transformer_version": TRANSFORMER_VERSION,
        "depth": config.model.depth,
        "parameters": sum(parameter.numel() for parameter in state.transformer.parameters()),
        "tokens_per_image": config.tokens_per_image,
        "token_source": config.tokens,
        "train_seconds": state.seconds,
        "encode_seconds": state.encode_seconds,
        "peak_memory_gib": state.peak_memory_gib,
    }
    return row_of(config, status, facts | metrics, protocol, state.device)


def _tokenizer_run(config: TransformerTrainConfig, data: str) -> dict[str, str]:
    """The name of the tokenizer's run, where it has one, and where its data, if they are others, are at hand."""
    if config.tokenizer_sha256:
        return {}
    try:
        trained_on = data if config.tokenizer.data == config.data else data_hash_of(config.tokenizer.data)
    except DataError:
        return {}
    return {"tokenizer_run": config.tokenizer.run_id(trained_on)}
