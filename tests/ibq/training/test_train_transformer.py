"""Stage two's trainer at a tiny size: repeatable, resumable bit for bit at every point, honest about what it logs and
refuses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from picture_files import draw
from safetensors.torch import load_file
from transformer_runs import (  # noqa: F401
    EVERY_STEP,
    RUNTIME,
    WITHOUT_DROPOUT,
    assert_same_transformer,
    few_images,
    few_images_and_states_seen,
    state_of_last_run,
    stop_at,
    train,
    transformer_config,
    untrained_tokenizer,
    watch_images,
)

import ibq.evaluation.transformer
import ibq.training.runtime
import ibq.training.transformer as trainer
from ibq import load_tokenizer
from ibq.config import RESULTS_VERSION, TRANSFORMER_VERSION, TransformerTrainConfig
from ibq.data import load_images
from ibq.losses import NextTokenLoss
from ibq.models.transformer import Transformer
from ibq.run_directory import RunDirectory
from ibq.training.checkpoint import load_checkpoint
from ibq.training.optimizer import TrainedNetwork
from ibq.training.runtime import LogEvent, Runtime, StopRequested
from ibq.training.transformer import train_transformer
from ibq.training.transformer_state import adamw

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged, two micro-batches": {"optim.ema_decay": 0.7, "accumulate": 2},
    "sub-tokens in bf16": {"model.subtoken_bits": (2, 3), "precision": "bf16"},
    "fp16, decay that rises": {"precision": "fp16", "optim.decayed": "matrices", "optim.final_weight_decay": 0.08},
}
every_arm = pytest.mark.parametrize("arm", ARMS)
GOLDEN = Path(__file__).with_name("golden_transformer_curve.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunDirectory, list[LogEvent]]]:
    """An uninterrupted run of each arm, trained once."""

    @functools.cache
    def train_once(arm: str) -> tuple[RunDirectory, list[LogEvent]]:
        folder = tmp_path_factory.mktemp("finished")
        return RunDirectory(folder), train(transformer_config(**ARMS[arm]), folder)

    return train_once


# --- A whole run ------------------------------------------------------------------------------------------------------


@every_arm
def test_one_seed_gives_one_run(finished: Any, tmp_path: Path, arm: str) -> None:
    train(transformer_config(**ARMS[arm]), tmp_path)
    assert_same_transformer(RunDirectory(tmp_path), finished(arm)[0])


def test_another_seed_gives_another_run(finished: Any, tmp_path: Path) -> None:
    run, _ = finished("plain")
    train(transformer_config(seed=1), tmp_path)
    other = RunDirectory(tmp_path)
    assert other.read_history()[0]["gradient_norm"] != run.read_history()[0]["gradient_norm"]
    assert other.read_row()["run"] != run.read_row()["run"]


@every_arm
def test_the_directory_of_a_finished_run(finished: Any, arm: str) -> None:
    run, events = finished(arm)
    config, row = transformer_config(**ARMS[arm]), run.read_row()
    names = {"config.json", "tokenizer", "history.jsonl", "model.safetensors", "eval", "row.json"}
    assert {path.name for path in run.path.iterdir()} == names
    assert json.loads(run.config.read_text()) == config.to_json_dict()
    assert [event.record for event in events] == run.read_history()
    assert [(event.step, event.steps) for event in events] == [(2, 8), (4, 8), (6, 8), (8, 8)]
    content_hash, tokenizer = few_images(config.data, "train").content_hash, load_tokenizer(run.tokenizer)
    assert tokenizer.digest() == untrained_tokenizer(config).digest()
    assert run.generated.is_file()
    facts = {
        "run": config.run_id(content_hash),
        "status": "ok",
        "data_hash": content_hash,
        "tokenizer_run": config.tokenizer.run_id(content_hash),
        "tokenizer_sha256": tokenizer.digest(),
        "transformer_version": TRANSFORMER_VERSION,
        "depth": 1,
        "tokens_per_image": 16,
        "token_source": "cached",
        "train_seconds": events[-1].record["seconds"],
        "config.model.depth": 1,
        "protocol.weights": "ema" if config.optim.ema_decay else "raw",
    }
    assert {name: row[name] for name in facts} == facts
    assert row["encode_seconds"] > 0
    assert row["peak_memory_gib"] > 0


@every_arm
def test_the_files_of_a_finished_run_are_the_transformer_that_its_row_measures(finished: Any, arm: str) -> None:
    run, _ = finished(arm)
    config, row = transformer_config(**ARMS[arm]), run.read_row()
    transformer = Transformer(config.transformer_config)
    transformer.load_state_dict(load_file(run.model))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == row["parameters"]
    tokenizer, images = load_tokenizer(run.tokenizer), few_images(config.data, "test")
    with torch.no_grad():
        tokens_BT = tokenizer.encode(images.batch(torch.arange(10), "cpu")).flatten(1)
        loss = NextTokenLoss(transformer.eval())(tokens_BT, images.labels_N[:10])
    assert loss.item() == pytest.approx(row["cross_entropy"], rel=1e-5)


def test_the_history_says_what_was_trained_and_how_fast(finished: Any, tmp_path: Path) -> None:
    config = transformer_config()
    each = [event.record for event in train(config, tmp_path, dataclasses.replace(RUNTIME, log_every=1))]
    lines = finished("plain")[0].read_history()
    assert lines[0].keys() == {
        "step", "seconds", "lr", "loss", "loss_mean", "gradient_norm", "images_per_s", "data_wait_pct", "tokens_per_s",
    }  # fmt: skip
    assert each[0]["loss"] == pytest.approx(math.log(32)), "a new transformer knows nothing"
    assert [line["lr"] for line in each] == [config.lr_at(step) for step in range(8)]
    for line in lines:
        assert line["loss"] == each[line["step"] - 1]["loss"]
        assert line["loss_mean"] == pytest.approx((each[line["step"] - 2]["loss"] + line["loss"]) / 2, rel=1e-6)
        assert line["tokens_per_s"] == pytest.approx(16 * line["images_per_s"])


def test_log_cadence_and_checkpoints_do_not_change_the_numbers(finished: Any, tmp_path: Path) -> None:
    train(transformer_config(), tmp_path, dataclasses.replace(RUNTIME, log_every=3, checkpoint_every_s=0))
    assert [line["step"] for line in RunDirectory(tmp_path).read_history()] == [3, 6, 8]
    expected = load_file(finished("plain")[0].model)
    assert all(
        torch.equal(weight, expected[name]) for name, weight in load_file(tmp_path / "model.safetensors").items()
    )


def test_training_learns_the_tokens_and_their_classes(tmp_path: Path) -> None:
    config = transformer_config(**WITHOUT_DROPOUT | {"steps": 80, "batch_size": 20})
    train(config, tmp_path, dataclasses.replace(RUNTIME, samples=0))
    run = RunDirectory(tmp_path)
    assert run.read_history()[-1]["loss_mean"] < 0.7 * math.log(32)
    assert run.read_row()["cross_entropy"] < 0.9 * math.log(32)
    state = state_of_last_run()
    tokens_BT = torch.randint(32, (10, 16))
    assert not torch.allclose(
        *(state.transformer.hidden(tokens_BT[:, :-1], torch.full((10,), label)) for label in (0, 1))
    )


def test_micro_batches_train_what_a_whole_batch_does(tmp_path: Path) -> None:
    fields = WITHOUT_DROPOUT | {"optim.lr": 1e-5, "steps": 4}
    for accumulate in (1, 4):
        train(transformer_config(**fields, accumulate=accumulate), tmp_path / str(accumulate))
    runs = [RunDirectory(tmp_path / str(accumulate)) for accumulate in (1, 4)]
    torch.testing.assert_close(load_file(runs[0].model), load_file(runs[1].model), rtol=1e-5, atol=1e-7)
    for whole, cut in zip(*(run.read_history() for run in runs), strict=True):
        assert {name: cut[name] for name in ("loss", "loss_mean", "gradient_norm")} == pytest.approx(
            {name: whole[name] for name in ("loss", "loss_mean", "gradient_norm")}, rel=1e-5
        )


def test_activations_that_are_computed_again_train_the_same(finished: Any, tmp_path: Path) -> None:
    train(transformer_config(), tmp_path, dataclasses.replace(RUNTIME, checkpoint_activations=True))
    assert all(block.checkpointed for block in state_of_last_run().transformer.blocks)
    run = finished("plain")[0]
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), load_file(run.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_is_the_same_but_for_rounding(finished: Any, tmp_path: Path, precision: str) -> None:
    train(transformer_config(precision=precision), tmp_path)
    lines, expected = RunDirectory(tmp_path).read_history(), finished("plain")[0].read_history()
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=5e-3)
    assert lines[-1]["loss"] != expected[-1]["loss"]
    assert [line.get("fp16_scale") for line in lines] == [65536.0 if precision == "fp16" else None] * len(lines)


def test_the_scale_of_fp16_losses_is_resumed(tmp_path: Path) -> None:
    config = transformer_config(precision="fp16")
    with pytest.raises(StopRequested):
        train(config, tmp_path, should_stop=stop_at(4))
    meta = tmp_path / "checkpoint" / "meta.json"
    found = json.loads(meta.read_text())
    assert found["scalers"]["model"]["scale"] == 65536
    found["scalers"]["model"]["scale"] = 1024.0
    meta.write_text(json.dumps(found))
    train(config, tmp_path)
    assert [line["fp16_scale"] for line in RunDirectory(tmp_path).read_history()] == [65536.0, 65536.0, 1024.0, 1024.0]


def test_the_peak_of_memory_is_that_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def costly(*arguments: Any) -> Any:
        monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2**40))
        return ibq.evaluation.transformer.evaluate_transformer(*arguments)

    monkeypatch.setattr(trainer, "evaluate_transformer", costly)
    train(transformer_config(steps=2), tmp_path)
    assert 0 < RunDirectory(tmp_path).read_row()["peak_memory_gib"] < 2**10


def decayed_of(config: TransformerTrainConfig) -> tuple[set[str], set[str]]:
    """Names of the parameters in the group with weight decay, and of the others."""
    network = Transformer(config.transformer_config)
    names = {parameter: name for name, parameter in network.named_parameters()}
    optimizer = adamw(config, network)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0][: len(optimizer.param_groups)]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    decayed, *others = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    assert decayed.union(*others) == set(names.values())
    return decayed, set().union(*others)


def test_weight_decay_is_for_all_parameters_as_in_the_released_loop() -> None:
    decayed, others = decayed_of(transformer_config())
    assert others == set()
    assert {name.rsplit(".", 1)[-1] for name in decayed} == {"weight", "bias"}


def test_weight_decay_can_be_for_matrices_alone() -> None:
    decayed, others = decayed_of(transformer_config(**{"model.subtoken_bits": (2, 3), "optim.decayed": "matrices"}))
    assert {name.rsplit(".", 1)[-1] for name in decayed} == {"weight"}
    assert all("norm" in name or name.endswith("bias") for name in others)


@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_training_decays_as_adamw_is_defined(tmp_path: Path, decayed: str) -> None:
    """Loshchilov and Hutter's update in float64, with the decay of each step, against the weights of a run."""
    fields = {"optim.decayed": decayed, "optim.weight_decay": 0.5, "optim.final_weight_decay": 5.0}
    config = transformer_config(**WITHOUT_DROPOUT | fields | {"optim.lr": 0.02, "steps": 3, "optim.clip_norm": None})
    gradients: list[dict[str, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        step = TrainedNetwork.step

        def recorded(trained: TrainedNetwork) -> None:
            named = trained.network.named_parameters()
            gradients.append({name: p.grad.double() for name, p in named if p.grad is not None})
            step(trained)

        patch.setattr(TrainedNetwork, "step", recorded)
        train(config, tmp_path)
    torch.manual_seed(config.seed)
    start = NextTokenLoss(Transformer(config.transformer_config))
    trained = {f"transformer.{name}": weight for name, weight in load_file(tmp_path / "model.safetensors").items()}
    largest = 0.0
    for name, weight in start.named_parameters():
        w, m, v = weight.detach().double(), torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for t in range(3):
            decay = 5.0 + (0.5 - 5.0) * (0.5 + 0.5 * math.cos(math.pi * t / 2))
            g, lr = gradients[t][name], config.lr_at(t)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            w = w * (1 - lr * decay * (decayed == "all" or w.ndim > 1))
            w = w - lr * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
        largest = max(largest, (w - trained[name]).abs().max().item())
    assert largest < 1e-6


def test_the_averaged_weights_are_an_exponential_moving_average(tmp_path: Path) -> None:
    """Each checkpoint, written at every step, holds weights and average; the event of a step finds that of the step
    before on disk."""
    config = transformer_config(**{"optim.ema_decay": 0.7, "steps": 4})
    untrained, found = untrained_tokenizer(config), []
    for _ in train_transformer(config, untrained, tmp_path, EVERY_STEP):
        found.append(load_checkpoint(tmp_path / "checkpoint")[0])
    states = [checkpoint for checkpoint in found if checkpoint is not None]
    assert [meta["step"] for _, meta in states] == [1, 2, 3]
    names = [name.removeprefix("average.") for name in states[0].tensors if name.startswith("average.")]
    assert len(names) == len(list(Transformer(config.transformer_config).parameters()))
    for (before, _), (after, _) in itertools.pairwise(states):
        for name in names:
            expected = 0.7 * before[f"average.{name}"] + 0.3 * after[f"model.transformer.{name}"]
            torch.testing.assert_close(after[f"average.{name}"], expected, rtol=1e-5, atol=1e-7)
    last = dict(state_of_last_run().transformer.named_parameters())
    expected = 0.7 * states[-1].tensors["average.head.weight"] + 0.3 * last["head.weight"]
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["head.weight"], expected, rtol=1e-5, atol=1e-7)


def test_without_an_average_the_result_is_the_last_weights(finished: Any, tmp_path: Path) -> None:
    train(transformer_config(), tmp_path)
    result, last = load_file(tmp_path / "model.safetensors"), dict(state_of_last_run().transformer.named_parameters())
    assert all(torch.equal(result[name], parameter) for name, parameter in last.items())


# --- Stopping, dying, resuming ----------------------------------------------------------------------------------------


@every_arm
@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_stop_and_resume_equals_the_uninterrupted_run(finished: Any, tmp_path: Path, arm: str, steps: int) -> None:
    config = transformer_config(**ARMS[arm])
    with pytest.raises(StopRequested, match=f"step {steps} of 8"):
        train(config, tmp_path, should_stop=stop_at(steps))
    run = RunDirectory(tmp_path)
    assert not run.finished
    torch.manual_seed(99)  # another process would not share this one's random state
    assert [event.step for event in train(config, tmp_path)] == [step for step in (2, 4, 6, 8) if step > steps]
    assert_same_transformer(run, finished(arm)[0])


@pytest.mark.parametrize("runtime", [RUNTIME, EVERY_STEP], ids=["no checkpoint yet", "checkpoint every step"])
def test_a_killed_run_resumes_to_the_same_end(finished: Any, tmp_path: Path, runtime: Runtime) -> None:
    """Killed while its third event is looked at: lines beyond the last checkpoint are on disk and are redone."""
    config = transformer_config()
    abandoned = train_transformer(
        config, untrained_tokenizer(config), tmp_path, dataclasses.replace(runtime, log_every=2)
    )
    for _ in range(3):
        next(abandoned)
    abandoned.close()
    checkpoint, _ = load_checkpoint(tmp_path / "checkpoint")
    assert (checkpoint is None) == (runtime is RUNTIME)
    assert [event.step for event in train(config, tmp_path)] == ([2, 4, 6, 8] if checkpoint is None else [6, 8])
    assert_same_transformer(RunDirectory(tmp_path), finished("plain")[0])


def test_a_damaged_checkpoint_is_noted_and_the_one_before_taken(finished: Any, tmp_path: Path) -> None:
    config = transformer_config()
    with pytest.raises(StopRequested):
        train(config, tmp_path, EVERY_STEP, stop_at(5))
    (tmp_path / "checkpoint" / "state.safetensors").write_bytes(b"torn")
    train(config, tmp_path)
    run = RunDirectory(tmp_path)
    assert run.read_attempts()[0]["reason"].startswith(
        "checkpoint is damaged (its tensors are not those that were written); going on from"
    )
    assert [line["step"] for line in run.read_history()] == [1, 2, 3, 4, 6, 8]
    expected = load_file(finished("plain")[0].model)
    assert all(torch.equal(weight, expected[name]) for name, weight in load_file(run.model).items())


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_run_that_ends_between_parts_of_its_evaluation_repeats_none(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Parts of 2 samples, two at each guidance: three are on disk when the run ends, and the next run draws the
    fourth."""
    monkeypatch.setattr(ibq.evaluation.transformer, "PART", 2)
    run, drawn, patient = RunDirectory(tmp_path), [], False

    def is_time() -> bool:
        return not patient and len(list(run.samples.rglob("*.safetensors"))) == 3

    class Counted(ibq.evaluation.transformer.Sampler):
        def __call__(self, numbers_B: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
            if how == "killed" and is_time():
                raise KeyboardInterrupt
            drawn.append(numbers_B.tolist())
            return super().__call__(numbers_B, classes_B)

    monkeypatch.setattr(ibq.evaluation.transformer, "Sampler", Counted)
    with pytest.raises(KeyboardInterrupt if how == "killed" else StopRequested):
        train(transformer_config(), tmp_path, should_stop=lambda: how == "stopped" and is_time())
    assert not run.finished
    checkpoint, _ = load_checkpoint(run.checkpoint)
    assert checkpoint is not None
    assert checkpoint.meta["step"] == 8
    drawn, patient = [], True
    assert train(transformer_config(), tmp_path) == [], "nothing is trained again"
    assert drawn == [[2, 3]]
    assert not run.samples.exists()
    assert not run.checkpoint.exists()
    samples, expected = load_file(run.generated), load_file(finished("plain")[0].generated)
    assert torch.equal(samples["tokens@2"], expected["tokens@2"])
    assert run.read_row()["train_seconds"] == run.read_history()[-1]["seconds"]


def test_a_stop_while_encoding_keeps_what_is_encoded(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ibq.data.tokens, "SHARD", 16)
    with pytest.raises(StopRequested):
        train(
            transformer_config(), tmp_path / "run", should_stop=lambda: any((tmp_path / "cache").rglob("*.safetensors"))
        )
    encoded = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert encoded
    train(transformer_config(), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in encoded} == encoded
    assert_same_transformer(RunDirectory(tmp_path / "run"), finished("plain")[0])


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    config = transformer_config(steps=2)
    train(config, tmp_path)
    (tmp_path / "samples").mkdir()  # as a kill right after the row leaves it
    (tmp_path / "checkpoint").mkdir()
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(config, tmp_path) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "checkpoint").exists()


# --- Fresh squares ----------------------------------------------------------------------------------------------------


def test_fresh_squares_are_encoded_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        draw(tmp_path / "pictures" / ("train" if i < 8 else "val") / "ab"[i % 2] / f"{i}.png", 40 + i, 40, seed=i)
    folder = {"data.name": f"imagefolder:{tmp_path / 'pictures'}", "data.crop": "random"}
    config = transformer_config(classes=2, batch_size=4, **{"tokenizer.data.name": "photos"} | folder)
    monkeypatch.setattr(trainer, "load_images", load_images)
    runtime = dataclasses.replace(RUNTIME, workers=0)
    train(config, tmp_path / "whole", runtime)
    with pytest.raises(StopRequested):
        train(config, tmp_path / "stopped", runtime, stop_at(3))
    train(config, tmp_path / "stopped", runtime)
    whole = RunDirectory(tmp_path / "whole")
    assert_same_transformer(RunDirectory(tmp_path / "stopped"), whole)
    assert whole.read_row()["token_source"] == "fresh"
    assert whole.read_history()[-1]["data_wait_pct"] > 0


# --- The golden curve -------------------------------------------------------------------------------------------------


def golden_config() -> TransformerTrainConfig:
    return transformer_config(
        **{"steps": 20, "optim.warmup": 0.1, "optim.ema_decay": 0.9, "model.depth": 2, "accumulate": 2},
        **{"optim.decayed": "matrices"},
    )


def curve(folder: Path) -> list[dict[str, float]]:
    runtime = dataclasses.replace(RUNTIME, log_every=1, samples=0)
    return [
        {name: event.record[name] for name in ("loss", "gradient_norm", "lr")}
        for event in train(golden_config(), folder, runtime)
    ]


def test_the_curve_is_the_golden_one(tmp_path: Path) -> None:
    """Regression test: a change of the code changes no number. A change that is meant to raises TRANSFORMER_VERSION and
    writes the curve anew: python tests/ibq/training/test_train_transformer.py"""
    golden = json.loads(GOLDEN.read_text())
    assert (golden["transformer_version"], golden["results_version"]) == (TRANSFORMER_VERSION, RESULTS_VERSION)
    actual = curve(tmp_path)
    assert len(actual) == len(golden["curve"]) == 20
    for step, (mine, theirs) in enumerate(zip(actual, golden["curve"], strict=True), start=1):
        assert mine == pytest.approx(theirs, rel=1e-4), f"step {step}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        watch_images(patch, Path(temporary) / "cache")
        versions = {"transformer_version": TRANSFORMER_VERSION, "results_version": RESULTS_VERSION}
        GOLDEN.write_text(json.dumps(versions | {"curve": curve(Path(temporary) / "run")}, indent=1) + "\n")
