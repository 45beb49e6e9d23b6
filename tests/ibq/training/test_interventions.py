"""A run that is changed while it trains: what changes, what is recorded, and that a resume repeats it bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import RUNTIME, assert_same_run, read_the_images_once, stop_after  # noqa: F401

import ibq.training.interventions
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.models.tokenizer import Tokenizer
from ibq.quantizers import build_quantizer
from ibq.run_directory import RunDirectory, append_line
from ibq.training.interventions import (
    LIVE_FIELDS,
    Intervention,
    Journal,
    after,
    amended,
    live_fields,
    read_interventions,
    scheduled,
)
from ibq.training.logging import CODEBOOK_PARAMETER, EntropyPull
from ibq.training.runtime import StopRequested
from ibq.training.tokenizer import train_tokenizer
from ibq.training.tokenizer_state import TrainingState

CHANGES = [
    Intervention(step=3, fields={"optim.lr": 3e-4, "quantizer.entropy_weight": 0.1}),
    Intervention(step=5, restart_dead=True),
    Intervention(step=6, fields={"quantizer.double": False, "quantizer.beta_on": "commitment"}),
]
VQ_CHANGES = [
    Intervention(step=2, fields={"quantizer.entropy_weight": 0.05}),
    Intervention(step=5, fields={"quantizer.entropy_weight": 0.0}, restart_dead=True),
]


def trained(config: TrainConfig, folder: Path, changes: Iterable[Intervention] | None) -> RunDirectory:
    list(train_tokenizer(config, folder, RUNTIME, intervene=None if changes is None else scheduled(changes)))
    return RunDirectory(folder)


@pytest.fixture(scope="module", params=["ibq", "vq"])
def changed(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Config, interventions and the uninterrupted run with them."""
    config, changes = tiny(request.param), CHANGES if request.param == "ibq" else VQ_CHANGES
    return config, changes, trained(config, tmp_path_factory.mktemp("changed"), changes)


# --- What an intervention does ----------------------------------------------------------------------------------------


def test_without_a_change_nothing_changes(tiny: Any, tmp_path: Path) -> None:
    runs = [trained(tiny(), tmp_path / name, changes) for name, changes in (("asked", []), ("not asked", None))]
    assert_same_run(*runs)
    assert not runs[0].interventions.exists()
    assert "interventions" not in runs[0].read_row()


def test_a_change_takes_effect_at_its_step_and_not_before(tiny: Any, tmp_path: Path) -> None:
    config = tiny(**{"quantizer.entropy_weight": 0.0})
    plain, changed = trained(config, tmp_path / "plain", None), trained(config, tmp_path / "changed", CHANGES[:1])
    before, after = zip(plain.read_history(), changed.read_history(), strict=True), changed.read_history()[1:]
    assert next(iter(before))[1]["loss"] == plain.read_history()[0]["loss"]  # step 2
    for line in after:  # steps 4, 6, 8
        assert line["lr"] == pytest.approx(3e-4 * config.lr_at(line["step"] - 1) / config.optim.lr)
        assert line["weighted_sample_entropy"] == pytest.approx(0.1 * line["loss_sample_entropy"])
    assert "loss_sample_entropy" not in changed.read_history()[0]
    assert changed.read_history()[1]["loss"] != plain.read_history()[1]["loss"]


def test_the_run_stays_that_of_its_config(changed: tuple) -> None:
    config, changes, run = changed
    assert json.loads(run.config.read_text()) == config.to_json_dict()
    row = run.read_row()
    assert row["config.optim.lr"] == config.optim.lr
    assert row["config.quantizer.entropy_weight"] == config.quantizer.entropy_weight
    assert row["interventions"] == len(changes)
    recorded = [Intervention.model_validate_json(line) for line in run.interventions.read_text().splitlines()]
    assert recorded == changes


def test_dead_codes_are_put_on_features_and_nothing_else_is(tiny: Any) -> None:
    config = tiny("vq")
    state = TrainingState(config, torch.device("cpu"))
    state.start_average()
    embedding = state.tokenizer.get_parameter(CODEBOOK_PARAMETER)
    before_KD = embedding.detach().clone()
    embedding.grad = torch.ones_like(embedding)
    state.generator.optimizer.step()
    stepped_KD = embedding.detach().clone()
    state.log_window.add(torch.tensor([0, 1, 1]))
    state.recent_window.add(torch.tensor([2]))
    features_MD = torch.arange(9 * 8.0).view(9, 8) + 100
    state.restart_dead(features_MD)
    moved = [k for k in range(16) if not torch.equal(embedding[k], stepped_KD[k])]
    assert moved == list(range(3, 12))  # as many as there are features
    assert {tuple(row) for row in embedding[moved].tolist()} == {tuple(row) for row in features_MD.tolist()}
    averaged = state.averaged_tokenizer.get_parameter(CODEBOOK_PARAMETER)
    assert torch.equal(averaged[moved], embedding[moved])
    assert torch.equal(averaged[:3], before_KD[:3])
    moments = state.generator.optimizer.state[embedding]
    assert not moments["exp_avg"][moved].any()
    assert moments["exp_avg"][:3].all()


def test_a_moving_average_begins_anew_where_its_code_does() -> None:
    quantizer = build_quantizer(
        {"method": "vq", "codebook_size": 4, "code_dim": 2, "ema_decay": 0.9, "beta_on": "commitment"}
    )
    quantizer(torch.randn(1, 2, 4, 4))
    dead_K = torch.tensor([True, False, False, False])
    quantizer.restart_codes(dead_K, torch.tensor([[5.0, 7.0]]), torch.Generator())
    quantizer(torch.randn(1, 2, 4, 4))  # which first applies the averages
    assert quantizer.codebook[0].tolist() == pytest.approx([5, 7], rel=1e-3)


# --- Interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_resume_repeats_what_was_done_by_hand(changed: tuple, tmp_path: Path, stop: int) -> None:
    config, changes, whole = changed
    with pytest.raises(StopRequested):
        list(
            train_tokenizer(
                config, tmp_path, RUNTIME, stop_after(stop), scheduled([c for c in changes if c.step < stop])
            )
        )
    list(train_tokenizer(config, tmp_path, RUNTIME, intervene=scheduled([c for c in changes if c.step >= stop])))
    assert_same_run(RunDirectory(tmp_path), whole)


def test_what_was_done_after_the_last_checkpoint_is_done_again(changed: tuple, tmp_path: Path) -> None:
    config, changes, whole = changed
    with pytest.raises(StopRequested):
        list(train_tokenizer(config, tmp_path, RUNTIME, stop_after(1)))
    events = train_tokenizer(config, tmp_path, RUNTIME, intervene=scheduled(changes))
    assert [next(events).step for _ in range(3)] == [2, 4, 6]
    next(events)  # the change before step 7 is recorded; then a kill
    events.close()
    assert (tmp_path / "checkpoint/meta.json").is_file()
    list(train_tokenizer(config, tmp_path, RUNTIME))
    assert_same_run(RunDirectory(tmp_path), whole)


def test_a_change_before_one_that_is_yet_to_be_repeated(tiny: Any, tmp_path: Path) -> None:
    """Changed at step 6 and killed, a run goes on from step 1 and is changed at step 4: the later step has the last
    word."""
    config, (early, late) = (
        tiny(),
        (Intervention(step=step, fields={"optim.lr": lr}) for step, lr in ((4, 7e-4), (6, 1e-5))),
    )
    with pytest.raises(StopRequested):
        list(train_tokenizer(config, tmp_path, RUNTIME, stop_after(1)))
    events = train_tokenizer(config, tmp_path, RUNTIME, intervene=scheduled([late]))
    assert [next(events).step for _ in range(4)][-1] == 8
    events.close()
    with pytest.raises(StopRequested):
        list(train_tokenizer(config, tmp_path, RUNTIME, stop_after(6), scheduled([early])))
    run = RunDirectory(tmp_path)
    assert read_interventions(run) == [early, late]
    list(train_tokenizer(config, tmp_path, RUNTIME))
    assert run.read_history()[-1]["lr"] == pytest.approx(1e-5 * config.lr_at(7) / config.optim.lr)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_live_fields_are_those_that_mean_something(tiny: Any) -> None:
    assert set(live_fields(tiny())) == set(LIVE_FIELDS) - {
        "quantize_from",
        "loss.perceptual_weight",
        "loss.adversarial.weight",
        "quantizer.commitment_weight",
    }
    assert "quantizer.commitment_weight" in live_fields(TrainConfig(quantizer={"method": "lfq"}))
    assert "loss.perceptual_weight" in live_fields(tiny(**{"loss.perceptual": "fashion-cnn"}))
    assert "loss.adversarial.weight" in live_fields(
        tiny(**{"loss.adversarial.weight": 0.1, "loss.adversarial.layers": 2})
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"quantizer.codebook_size": 32}, "'quantizer.codebook_size' cannot change while this run trains"),
        ({"optim.lrr": 1.0}, "did you mean 'optim.lr'"),
        ({"optim.lr": -1.0}, "optim.lr.*greater than 0"),
        ({"loss.perceptual_weight": 2.0}, "cannot change"),
    ],
)
def test_what_cannot_change_is_one_sentence(tiny: Any, tmp_path: Path, fields: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        amended(tiny(), fields)
    with pytest.raises(ConfigError, match=sentence):
        trained(tiny(), tmp_path, [Intervention(step=1, fields=fields)])
    assert not RunDirectory(tmp_path).interventions.exists()


def test_a_method_without_single_codes_restarts_none() -> None:
    for method, fields in (
        ("lfq", {"code_dim": 4}),
        ("simvq", {"code_dim": 4}),
        ("vq", {"code_dim": 4, "reparametrization": "linear"}),
        ("vqbridge", {"code_dim": 4}),
        ("optvq", {"code_dim": 4}),
    ):
        quantizer = build_quantizer({"method": method, "codebook_size": 16, **fields})
        with pytest.raises(ConfigError, match=f"method='{method}' has no codes that can be placed one by one"):
            quantizer.restart_codes(torch.ones(16, dtype=torch.bool), torch.randn(20, 4), torch.Generator())
        assert not quantizer.config.places_codes


def test_a_restart_without_single_codes_is_refused_before_it_is_recorded(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method='simvq' has no codes that can be placed one by one"):
        trained(tiny("simvq"), tmp_path, [Intervention(step=1, restart_dead=True)])
    assert not RunDirectory(tmp_path).interventions.exists()
    for method in ("vq", "ibq", "gumbel", "diveq", "wasserstein"):
        assert after(tiny(method), Intervention(restart_dead=True)) == tiny(method)


def test_a_script_that_goes_on_records_nothing_twice(
    changed: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, changes, quiet = changed
    step = changes[-1].step
    monkeypatch.setattr(TrainingState, "update_average", failing_once(TrainingState.update_average, step + 1))
    with pytest.raises(OSError, match="the power"):
        trained(config, tmp_path, changes)
    assert len(RunDirectory(tmp_path).read_history()) > 0
    trained(config, tmp_path, changes)
    assert read_interventions(RunDirectory(tmp_path)) == list(changes)
    assert_same_run(RunDirectory(tmp_path), quiet)


def failing_once(method: Callable[[TrainingState], None], at_call: int) -> Callable[[TrainingState], None]:
    """The method, which at one of its calls fails instead."""
    calls = itertools.count(1)

    def called(state: TrainingState) -> None:
        if next(calls) == at_call:
            raise OSError("the power has gone")
        method(state)

    return called


def test_one_process_alone_and_whole_records(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    append_line(run.interventions, {"step": 1, "feilds": {}})
    with pytest.raises(ConfigError, match=r"interventions.jsonl cannot be read \(feilds: Extra inputs"):
        Journal(run, tiny(), 0, None)
    monkeypatch.setattr(ibq.training.interventions, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="is trained by one process, not by 2"):
        Journal(RunDirectory(tmp_path / "other"), tiny(), 0, scheduled([]))


# --- The pull of the entropy penalty ----------------------------------------------------------------------------------


def test_the_pull_of_the_entropy_is_that_of_separate_backward_passes(tiny: Any) -> None:
    config = tiny(**{"quantizer.entropy_temperature": 0.5})
    tokenizer, x_BCHW = Tokenizer(config), torch.rand(2, 1, 32, 32) * 2 - 1

    def gradients(of_entropy: bool) -> torch.Tensor:
        y_BCHW, z_BDHW, quantized = tokenizer(x_BCHW)
        weights = config.quantizer.loss_weights
        terms = [weights[name] * term for name, term in quantized.losses.items() if ("entropy" in name) == of_entropy]
        return torch.autograd.grad(sum(terms) + (0 if of_entropy else (x_BCHW - y_BCHW).abs().mean()), z_BDHW)[0]

    expected = gradients(True).norm() / gradients(False).norm()
    y_BCHW, z_BDHW, quantized = tokenizer(x_BCHW)
    weights = config.quantizer.loss_weights
    pull = EntropyPull(z_BDHW, quantized.losses, weights)
    loss = (x_BCHW - y_BCHW).abs().mean() + sum(weights[name] * term for name, term in quantized.losses.items())
    (8.0 * loss).backward()
    assert pull.report(8.0) == {"entropy_pull": pytest.approx(float(expected), rel=1e-4)}
    without = Tokenizer(tiny(**{"quantizer.entropy_weight": 0.0}))(x_BCHW)
    assert EntropyPull(without.features, without.quantized.losses, {}).report(1.0) == {}
