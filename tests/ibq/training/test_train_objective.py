"""The adversarial game in the trainer: against a loop written out by hand, over micro-batches, stops and losses of
finiteness."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_runs import (
    GAN,
    RUNTIME,
    SMALL,
    assert_same_run,
    poison_codebook,
    poison_decoder,
    poison_discriminator,
    poison_images,
    read_the_images_once,
    stop_after,
    weights_of,
)

import ibq.training.tokenizer as trainer
from ibq.config import TrainConfig
from ibq.data import load_images
from ibq.data.loader import batch_indices
from ibq.errors import NonFiniteError
from ibq.losses import PerceptualLoss
from ibq.run_directory import RunDirectory
from ibq.training.checkpoint import load_checkpoint
from ibq.training.runtime import Runtime, StopRequested
from ibq.training.tokenizer import train_tokenizer
from ibq.training.tokenizer_state import TrainingState

__all__ = ["read_the_images_once"]

EVERY_STEP = Runtime(device="cpu", log_every=1, snapshots=2, eval_images=8, checkpoint_every_s=0)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[TrainingState]:
    """The states that the trainer makes, for tests to look into or to poison."""
    made: list[TrainingState] = []

    class Seen(TrainingState):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(trainer, "TrainingState", Seen)
    return made


# --- The step against one written out ---------------------------------------------------------------------------------


def by_hand(config: TrainConfig, state: TrainingState, steps: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Plain steps from the same beginning: discriminator first, then the generator, on one forward pass; docs/method.md
    section 4."""
    tokenizer, critic = copy.deepcopy(state.tokenizer), copy.deepcopy(state.trained["discriminator"].network)
    perceptual, images = PerceptualLoss("fashion-cnn"), load_images(config.data, "train")
    optimizers = [torch.optim.Adam(network.parameters(), lr=SMALL, betas=(0.5, 0.9)) for network in (tokenizer, critic)]
    real_average = fake_average = 0.0
    for step in range(steps):
        x = images.batch(batch_indices(0, step, len(images), 4), "cpu")
        y, _, quantized = tokenizer(x)
        real, fake = critic(x), critic(y.detach())
        lecam = F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()
        optimizers[1].zero_grad()
        (0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean() + 0.05 * lecam).backward()
        optimizers[1].step()
        real_average = 0.999 * real_average + 0.001 * real.mean().item()
        fake_average = 0.999 * fake_average + 0.001 * fake.mean().item()
        terms = quantized.losses
        quantization = terms["double"] + terms["commitment"] + 0.25 * terms["codebook"]
        entropy = 0.05 * (terms["sample_entropy"] - terms["codebook_entropy"])
        reconstruction = (x - y).abs().mean() + perceptual(x, y)
        game = F.softplus(-critic(y).mean((1, 2, 3))).mean()
        weight = 0.1
        if config.loss.adversarial.adaptive:
            last = tokenizer.decoder.conv_out.weight
            norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, game)]
            weight = 0.1 * (norms[0] / (norms[1] + 1e-4)).item()
        optimizers[0].zero_grad()
        (reconstruction + quantization + entropy + weight * game).backward()
        optimizers[0].step()
    return tokenizer, critic


@pytest.mark.parametrize("adaptive", [False, True])
def test_three_steps_equal_those_written_out_by_hand(
    tiny: Any, tmp_path: Path, states: list[TrainingState], adaptive: bool
) -> None:
    config = tiny(
        steps=3, **{"optim.milestones": [1.0], "optim.lr": SMALL, "loss.adversarial.adaptive": adaptive}, **GAN
    )
    expected = by_hand(config, TrainingState(config, torch.device("cpu")), 3)
    list(train_tokenizer(config, tmp_path, EVERY_STEP))
    for trained, network in zip(states[0].trained.values(), expected, strict=True):
        torch.testing.assert_close(weights_of(trained.network), weights_of(network), rtol=1e-4, atol=5e-6)


ARMS: dict[str, dict[str, Any]] = {
    "hinge": {},
    "adaptive, batch norm": {"loss.adversarial.adaptive": True, "loss.adversarial.norm": "batch"},
    "vanilla, no lecam, starts late": {
        "loss.adversarial.loss": "vanilla",
        "loss.adversarial.lecam_weight": 0.0,
        "loss.adversarial.start": 0.5,
    },
    "two micro-batches, clipped, cosine": {
        "accumulate": 2,
        "optim.clip_norm": 0.5,
        "optim.schedule": "cosine",
        "optim.warmup": 0.3,
    },
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
}
every_arm = pytest.mark.parametrize("arm", ARMS)


@every_arm
def test_terms_add_up_for_both_networks_and_a_resumed_run_equals_the_whole_one(
    tiny: Any, tmp_path: Path, arm: str
) -> None:
    config = tiny(**GAN | ARMS[arm])
    list(train_tokenizer(config, tmp_path / "whole", RUNTIME))
    run = RunDirectory(tmp_path / "whole")
    for line in run.read_history():
        shares = {name.removeprefix("weighted_"): value for name, value in line.items() if name.startswith("weighted_")}
        raw = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss_")}
        assert shares.keys() == raw.keys()
        sides = {"loss": {}, "discriminator_loss": {}}
        for name, share in shares.items():
            sides["discriminator_loss" if name in ("discriminator", "lecam") else "loss"][name] = share
        playing = line["step"] > config.adversarial_start
        assert ("adversarial" in raw) == ("discriminator" in raw) == playing
        assert ("lecam" in raw) == (playing and config.loss.adversarial.lecam_weight > 0)
        for total, terms in sides.items():
            assert line.get(total, 0) == pytest.approx(sum(terms.values()), rel=1e-5)
        assert shares["fashion_cnn"] == raw["fashion_cnn"]
        if not config.loss.adversarial.adaptive and playing:
            assert shares["adversarial"] == pytest.approx(0.1 * raw["adversarial"], rel=1e-5)
    for stop in (3, 5):
        with pytest.raises(StopRequested):
            list(train_tokenizer(config, tmp_path / str(stop), RUNTIME, stop_after(stop)))
        list(train_tokenizer(config, tmp_path / str(stop), RUNTIME))
        assert_same_run(RunDirectory(tmp_path / str(stop)), run)


def test_before_its_start_the_discriminator_does_nothing(
    tiny: Any, tmp_path: Path, states: list[TrainingState]
) -> None:
    late = tiny(steps=4, **GAN, **{"loss.adversarial.start": 0.5})
    without = tiny(steps=4, **{"loss.perceptual": "fashion-cnn", "model.norm_groups": 2})
    beginning = [
        p.clone() for p in TrainingState(late, torch.device("cpu")).trained["discriminator"].network.parameters()
    ]
    games = [train_tokenizer(config, tmp_path / str(i), EVERY_STEP) for i, config in enumerate((late, without))]
    for (one, other), step in zip(itertools.islice(zip(*games, strict=True), 3), (1, 2, 3), strict=True):
        now = [p.clone() for p in states[0].trained["discriminator"].network.parameters()]
        assert all(map(torch.equal, now, beginning)) == (step <= 2)
        assert (one.record["loss_pixel"] == other.record["loss_pixel"]) == (
            step <= 3
        )  # the third loss is of weights that two steps made
        assert (one.record["gradient_norm"] == other.record["gradient_norm"]) == (step <= 2)


def test_micro_batches_equal_the_whole_batch_but_for_the_entropy(
    tiny: Any, tmp_path: Path, states: list[TrainingState]
) -> None:
    for entropy_weight in (0.0, 0.05):
        for accumulate in (1, 2, 4):
            config = tiny(
                steps=5, accumulate=accumulate, **GAN, **{"optim.lr": SMALL, "quantizer.entropy_weight": entropy_weight}
            )
            list(train_tokenizer(config, tmp_path / f"{entropy_weight} {accumulate}", EVERY_STEP))
    weights = [weights_of(*(trained.network for trained in state.trained.values())) for state in states]
    plain, entropic = [[(w - group[0]).abs().max().item() for w in group[1:]] for group in (weights[:3], weights[3:])]
    assert max(plain) < 1e-5
    assert min(entropic) > 1e-4


def test_recomputed_activations_change_nothing(tiny: Any, tmp_path: Path) -> None:
    for name, checkpointed in (("kept", False), ("recomputed", True)):
        runtime = Runtime(device="cpu", log_every=2, snapshots=3, eval_images=8, checkpoint_activations=checkpointed)
        list(train_tokenizer(tiny(**GAN, **{"model.attention_resolutions": [8]}), tmp_path / name, runtime))
    assert_same_run(RunDirectory(tmp_path / "kept"), RunDirectory(tmp_path / "recomputed"))


# --- One network ------------------------------------------------------------------------------------------------------


def test_clipping_shortens_the_gradient_to_the_norm_and_reports_the_one_before(tiny: Any) -> None:
    trained = TrainingState(tiny(**{"optim.clip_norm": 0.5}), torch.device("cpu")).generator
    trained.set_lr(1e-3)
    trained.zero_grad()
    trained.backward({"a": 100 * sum(p.square().sum() for p in trained.network.parameters())}, {"a": 1.0})
    trained.unscale_and_clip()
    gradients = torch.cat([p.grad.flatten() for p in trained.network.parameters() if p.grad is not None])
    assert gradients.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert trained.report()["gradient_norm"] > 1


def test_an_overflow_in_fp16_costs_one_update_and_halves_the_scale_until_there_is_none_left(tiny: Any) -> None:
    trained = TrainingState(tiny(precision="fp16"), torch.device("cpu")).generator
    weight = next(trained.network.parameters())

    def step(gradient: float) -> torch.Tensor:
        trained.set_lr(1e-3)
        trained.zero_grad()
        trained.backward({"a": weight.sum()}, {"a": 1.0})
        assert weight.grad is not None
        weight.grad.fill_(gradient)
        trained.unscale_and_clip()
        before = weight.detach().clone()
        trained.step()
        return (weight - before).abs().max()

    assert trained.scaler.get_scale() == 2**16
    assert step(1.0) > 0
    assert step(math.inf) == 0
    assert trained.scaler.get_scale() == 2**15
    for _ in range(15):
        step(math.inf)
    with pytest.raises(NonFiniteError, match="the gradient of"):
        step(math.inf)


# --- What is not finite stops the run before an update ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (poison_images, r"^step 2: the images are not finite: \d+ of \d+ values of features are NaN"),
        (poison_codebook, r"^step 2: \d+ of \d+ values of codebook are NaN"),
        (poison_discriminator, r"^step 2: loss term 'discriminator' is nan"),
        (poison_decoder, r"^step 2: the reconstructions are not finite: loss term '\w+' is nan"),
    ],
)
def test_nan_stops_before_any_update_names_term_and_step_and_leaves_the_last_good_checkpoint(
    tiny: Any, tmp_path: Path, states: list[TrainingState], poison: Any, reason: str
) -> None:
    config = tiny(**GAN)
    with pytest.raises(StopRequested):
        list(train_tokenizer(config, tmp_path, RUNTIME, stop_after(1)))
    good, _ = load_checkpoint(tmp_path / "checkpoint")
    events = train_tokenizer(config, tmp_path, RUNTIME)
    assert next(events).step == 2
    assert len(states) == 2
    del states[0]
    poison(states[0])
    before = [p.detach().clone() for trained in states[0].trained.values() for p in trained.network.parameters()]
    with pytest.raises(NonFiniteError, match=reason) as caught:
        list(events)
    after = [p.detach() for trained in states[0].trained.values() for p in trained.network.parameters()]
    changed = [not torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True)]
    assert not any(changed)
    row = RunDirectory(tmp_path).read_row()
    assert (row["status"], row["reason"]) == ("nan", str(caught.value))
    assert list(train_tokenizer(config, tmp_path, EVERY_STEP)) == [], "nan is final"
    kept, damaged = load_checkpoint(tmp_path / "checkpoint")
    assert not damaged
    assert kept.meta == good.meta
    assert kept.meta["step"] == 1


def test_a_state_that_is_not_finite_takes_no_checkpoints_place(
    tiny: Any, tmp_path: Path, states: list[TrainingState]
) -> None:
    events = train_tokenizer(tiny(**GAN), tmp_path, EVERY_STEP)
    assert [next(events).step for _ in range(3)] == [1, 2, 3]
    poison_codebook(states[0])
    with pytest.raises(NonFiniteError, match=r"^step 3: 'quantize\.embedding' is not finite after the update"):
        next(events)
    kept, _ = load_checkpoint(tmp_path / "checkpoint")
    assert kept.meta["step"] == 2
