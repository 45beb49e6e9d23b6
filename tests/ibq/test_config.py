"""A run's identity: what enters it, what cannot be said wrongly, what stays the same for ever."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ibq import IBQConfig, VQConfig
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.quantizers import Quantizer
from ibq.schema import flatten, set_fields
from ibq.training.runtime import Runtime

IBQ = TrainConfig(quantizer=IBQConfig())
OTHER_VALUES: dict[str, Any] = {
    "data.name": "photos",
    "data.resolution": 64,
    "data.crop": "random",
    "data.flip": True,
    "data.resize": "released",
    "model.base_channels": 32,
    "model.channel_multipliers": (1, 2),
    "model.res_blocks": 2,
    "model.attention_resolutions": (8,),
    "model.z_channels": 16,
    "model.norm_groups": 8,
    "quantizer.codebook_size": 512,
    "quantizer.code_dim": 32,
    "quantizer.codebook_init": "features",
    "quantizer.init_scale": 2.0,
    "quantizer.beta": 0.5,
    "quantizer.beta_on": "both",
    "quantizer.entropy_weight": 0.1,
    "quantizer.entropy_temperature": 0.02,
    "quantizer.double": False,
    "quantizer.matmul_precision": "bfloat16",
    "quantizer.soft_path": "codes",
    "quantizer.top_m": 8,
    "quantizer.logit_scale": 0.5,
    "quantizer.similarity": "cosine",
    "loss.pixel": "l2",
    "loss.pixel_weight": 2.0,
    "loss.perceptual": "fashion-cnn",
    "loss.perceptual_weight": 0.5,
    "loss.adversarial.weight": 0.1,
    "loss.adversarial.adaptive": True,
    "loss.adversarial.loss": "vanilla",
    "loss.adversarial.start": 0.5,
    "loss.adversarial.lecam_weight": 0.0,
    "loss.adversarial.lecam_decay": 0.9,
    "loss.adversarial.channels": 32,
    "loss.adversarial.layers": 2,
    "loss.adversarial.norm": "group",
    "optim.lr": 1e-4,
    "optim.betas": (0.9, 0.95),
    "optim.milestones": (0.5,),
    "optim.decay_factor": 0.5,
    "optim.schedule": "cosine",
    "optim.final_factor": 0.1,
    "optim.warmup": 0.1,
    "optim.clip_norm": 1.0,
    "optim.ema_decay": 0.9,
    "steps": 301,
    "quantize_from": 0.5,
    "batch_size": 33,
    "accumulate": 2,
    "averages": "local",
    "precision": "bf16",
    "seed": 1,
}
FOLDER, GAN = {"data.name": "imagefolder:/pictures"}, {"loss.adversarial.weight": 0.1}
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "data.crop": FOLDER,
    "data.flip": FOLDER | {"data.crop": "random"},
    "data.resize": FOLDER,
    "loss.perceptual_weight": {"loss.perceptual": "fashion-cnn"},
    "optim.final_factor": {"optim.schedule": "cosine"},
} | {path: GAN for path in OTHER_VALUES if path.startswith("loss.adversarial.") and path not in GAN}
"""Other fields that a field needs to have an effect."""


# --- Identity ---------------------------------------------------------------------------------------------------------


def test_every_training_field_is_covered_here() -> None:
    assert OTHER_VALUES.keys() == flatten(IBQ.to_json_dict()).keys() - {"quantizer.method"}


@pytest.mark.parametrize("path", OTHER_VALUES)
def test_every_training_field_and_the_seed_change_the_run_id(path: str) -> None:
    before = IBQ.with_fields(**SURROUNDINGS.get(path, {}))
    changed = before.with_fields(**{path: OTHER_VALUES[path]})
    assert changed != before
    assert changed.run_id("data") != before.run_id("data")
    differing = {
        name for name, value in flatten(changed.to_json_dict()).items() if value != flatten(before.to_json_dict())[name]
    }
    assert differing == {path}


def test_method_data_and_results_version_change_the_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    before = IBQ.run_id("data")
    assert TrainConfig(quantizer=VQConfig()).run_id("data") != before != IBQ.run_id("other data")
    monkeypatch.setattr("ibq.config.RESULTS_VERSION", 10**6)
    assert IBQ.run_id("data") != before


def test_equal_configs_have_one_run_id_however_they_were_written() -> None:
    spelled_out = TrainConfig.parse(
        {"quantizer": {"codebook_size": 1024, "method": "ibq"}, "optim": {"betas": [0.5, 0.9]}, "steps": 300}
    )
    assert spelled_out == IBQ
    assert hash(spelled_out) == hash(IBQ)
    assert spelled_out.run_id("data") == IBQ.run_id("data")
    assert IBQ.with_fields(steps=7).with_fields(steps=300).run_id("data") == IBQ.run_id("data")


def test_the_run_id_names_method_and_seed_and_is_the_same_in_another_process() -> None:
    code = (
        "from ibq import *; from ibq.config import TrainConfig; print(TrainConfig(quantizer=IBQConfig(), "
        "seed=3).run_id('data'))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    here = TrainConfig(quantizer=IBQConfig(), seed=3).run_id("data")
    assert elsewhere.stdout.strip() == here
    assert here.startswith("ibq-s3-")


def test_nothing_of_the_runtime_is_a_training_field() -> None:
    leaves = {path.rsplit(".", 1)[-1] for path in flatten(IBQ.to_json_dict())}
    assert leaves.isdisjoint(field.name for field in fields(Runtime))


@given(
    method=st.sampled_from(["vq", "ibq"]),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 10**6),
            "seed": st.integers(0, 2**31),
            "optim.lr": st.floats(1e-9, 10),
            "quantizer.beta": st.floats(0, 10),
            "quantizer.entropy_weight": st.floats(0, 1),
            "model.attention_resolutions": st.lists(st.sampled_from([8, 16, 32]), max_size=3),
            "quantizer.codebook_init": st.sampled_from(["uniform", "normal", "features"]),
        },
    ),
)
def test_json_round_trip(method: str, changes: dict[str, Any]) -> None:
    config = TrainConfig.parse({"quantizer": {"method": method}}).with_fields(**changes)
    back = TrainConfig.parse(json.loads(json.dumps(config.to_json_dict())))
    assert back == config
    assert type(back.quantizer) is type(config.quantizer)
    assert back.run_id("data") == config.run_id("data")
    flat = flatten(config.to_json_dict())
    assert {path: flat[path] for path in changes} == changes


# --- Frozen and strict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "data", "model", "quantizer", "loss", "optim"])
def test_every_part_is_frozen(part: str) -> None:
    node = getattr(IBQ, part) if part else IBQ
    for name in type(node).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(node, name, getattr(node, name))


@pytest.mark.parametrize("part", ["", "data", "model", "quantizer", "loss", "optim"])
def test_unknown_keys_are_errors_everywhere(part: str) -> None:
    tree = IBQ.to_json_dict()
    (tree[part] if part else tree)["misspelt"] = 1
    with pytest.raises(ConfigError, match=r"^([a-z]+\.)?misspelt: [^\n]*$"):
        TrainConfig.parse(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.resolution": 30},
            r"resolution=30 is not a multiple of the down-sampling factor 4; choose a multiple of 4",
        ),
        ({"model.norm_groups": 5}, r"norm_groups=5 does not divide a level of 16 channels; choose .* base_channels=16"),
        ({"model.base_channels": 24}, r"norm_groups=16 does not divide a level of 24 channels"),
        ({"model.channel_multipliers": (1, 0)}, r"level of 0 channels"),
        ({"model.channel_multipliers": ()}, r"channel_multipliers: .*at least 1"),
        ({"optim.betas": (0.5, 1.0)}, r"betas=\(0.5, 1.0\) must both lie in \[0, 1\)"),
        ({"optim.milestones": (0.9, 0.1)}, r"milestones=\(0.9, 0.1\) must be ascending"),
        ({"optim.milestones": (0.0,)}, r"milestones=\(0.0,\).*\(0, 1\]"),
        ({"optim.milestones": (0.5, 1.5)}, r"milestones=\(0.5, 1.5\).*\(0, 1\]"),
        ({"optim.ema_decay": 1.0}, r"ema_decay: .*less than 1 .*1.0"),
        ({"optim.lr": math.nan}, r"optim.lr: .*finite"),
        ({"batch_size": 33, "accumulate": 2}, r"batch_size=33 is not a multiple of accumulate=2; choose a divisor"),
        ({"data.crop": "random"}, r"data: crop='random' reads images of a folder, and fashion-mnist comes in one size"),
        (
            {"data.resize": "released"},
            r"data: resize='released' scales images of a folder, and fashion-mnist comes in one size; leave it out",
        ),
        (FOLDER | {"data.flip": True}, r"flip=True goes with crop='random', and crop is 'center'"),
        ({"loss.perceptual_weight": 2.0}, r"perceptual_weight=2.0 has no effect with perceptual='none'"),
        (
            FOLDER | {"loss.perceptual": "fashion-cnn"},
            r"'fashion-cnn' knows Fashion-MNIST, not imagefolder; use 'efficientnet-lite0', 'lpips-vgg'",
        ),
        (
            FOLDER | {"loss.perceptual": "lpips-vgg", "data.resolution": 16},
            r"reads 32 pixels a side or more, not resolution=16",
        ),
        ({"loss.adversarial.norm": "none"}, r"norm='none' has no effect with weight=0.0; set loss.adversarial.weight"),
        (
            GAN | {"loss.adversarial.norm": "group", "loss.adversarial.channels": 6},
            r"8 groups, which do not divide 12 channels; .* of 4",
        ),
        (GAN | {"loss.adversarial.layers": 4}, r"layers=4 halve resolution=32 to 2, and 3 pixels are the least"),
        ({"optim.final_factor": 0.1}, r"final_factor=0.1 is where a cosine ends; set schedule='cosine'"),
        ({"optim.clip_norm": 0.0}, r"clip_norm: .*greater than 0"),
        ({"steps": 0}, r"steps: .*greater than or equal to 1 \(given 0\)"),
        ({"batch_size": "many"}, r"batch_size: .*integer.*'many'"),
        (
            {"quantizer.method": "vqq"},
            r"quantizer: method='vqq' is not a quantizer; choose one of " + ", ".join(sorted(Quantizer.registry)),
        ),
        ({"quantizer.method": "vq"}, r"quantizer.double: "),
        ({"quantizer.codebook_size": 0}, r"quantizer.codebook_size: .*given 0"),
    ],
    ids=str,
)
def test_contradictions_are_one_sentence_that_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        IBQ.with_fields(**changes)
    assert "\n" not in str(caught.value)


def test_micro_batches_are_refused_for_what_every_forward_moves_or_draws() -> None:
    moving = [
        {"method": "vq", "restart": "dead"},
        {"method": "vq", "ema_decay": 0.9, "beta_on": "commitment"},
        {"method": "gumbel"},
    ]
    for quantizer in moving:
        with pytest.raises(
            ConfigError, match=rf"accumulate=2 would move what method='{quantizer['method']}' changes or draws"
        ):
            TrainConfig.parse({"quantizer": quantizer, "accumulate": 2})
    for quantizer in ({"method": "vq"}, {"method": "ibq"}, {"method": "gumbel", "noise": False}):
        assert TrainConfig.parse({"quantizer": quantizer, "accumulate": 2}).accumulate == 2


def test_several_problems_are_all_reported_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^steps: [^\n;]*; batch_size: [^\n;]*$"):
        IBQ.with_fields(steps=0, batch_size=0)


@pytest.mark.parametrize("tree", [{}, {"quantizer": None}, {"quantizer": 7}, {"quantizer": {}}])
def test_a_config_needs_a_quantizer(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^quantizer: [^\n]*$"):
        TrainConfig.parse(tree)


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("quantizer.codebok_size", "'quantizer.codebook_size'"),
        ("codebook_size", "'quantizer.codebook_size'"),
        ("optimizer.lr", "'optim.lr'"),
        ("stepz", "'steps'"),
        ("model.quantizer.beta", "'quantizer.beta'"),
        ("steps.more", "'steps'"),
    ],
)
def test_a_mistyped_path_names_the_nearest_field(path: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no field '{path}'; did you mean {suggestion}\?"):
        IBQ.with_fields(**{path: 1})


def test_a_path_like_no_other_lists_them_and_a_section_is_no_field() -> None:
    with pytest.raises(ConfigError, match=r"valid names are accumulate, averages, batch_size"):
        IBQ.with_fields(xyzxyz=1)
    with pytest.raises(ConfigError, match="there is no field 'quantizer'"):
        IBQ.with_fields(quantizer={"method": "vq"})


def test_with_fields_leaves_the_original_alone() -> None:
    tree = IBQ.to_json_dict()
    changed = set_fields(tree, {"optim.lr": 5.0, "model.channel_multipliers": (1,)})
    assert tree == IBQ.to_json_dict()
    assert (changed["optim"]["lr"], changed["model"]["channel_multipliers"]) == (5.0, (1,))


# --- Derived numbers --------------------------------------------------------------------------------------------------


def test_the_default_milestones_are_the_papers_epochs() -> None:
    config = IBQ.with_fields(steps=330, **{"optim.lr": 1e-4})
    for first, last, expected in ((0, 249, 1e-4), (250, 299, 1e-5), (300, 329, 1e-6)):
        assert config.lr_at(first) == config.lr_at(last) == pytest.approx(expected)


@given(
    steps=st.integers(1, 500), milestones=st.lists(st.floats(0.01, 1), max_size=3).map(sorted), factor=st.floats(0.1, 1)
)
def test_the_learning_rate_falls_by_the_factor_at_each_milestone(
    steps: int, milestones: list[float], factor: float
) -> None:
    config = IBQ.with_fields(steps=steps, **{"optim.milestones": milestones, "optim.decay_factor": factor})
    for step in range(steps):
        passed = sum(step / steps >= fraction for fraction in milestones)
        ambiguous = any(abs(step - fraction * steps) < 1e-9 * steps for fraction in milestones)
        assert ambiguous or config.lr_at(step) == pytest.approx(config.optim.lr * factor**passed)


def test_warm_up_rises_to_the_rate_and_a_cosine_falls_to_its_end() -> None:
    config = IBQ.with_fields(
        steps=100, **{"optim.schedule": "cosine", "optim.warmup": 0.1, "optim.final_factor": 0.05, "optim.lr": 1.0}
    )
    rates = [config.lr_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    for step in range(10, 101):
        assert rates[step] == pytest.approx(0.05 + 0.95 * math.cos(math.pi * (step - 10) / 180) ** 2)
    stepped = IBQ.with_fields(steps=100, **{"optim.warmup": 0.1, "optim.milestones": (0.5,), "optim.lr": 1.0})
    assert [stepped.lr_at(step) for step in (0, 10, 49, 50, 99)] == pytest.approx([1 / 11, 1, 1, 0.1, 0.1])


def test_the_discriminator_begins_at_its_fraction_of_the_run() -> None:
    assert IBQ.with_fields(**GAN).adversarial_start == 0
    assert IBQ.with_fields(steps=9, **GAN | {"loss.adversarial.start": 0.5}).adversarial_start == 4


@pytest.mark.parametrize(
    ("multipliers", "factor", "tokens"), [((1,), 1, 1024), ((1, 2), 2, 256), ((1, 1, 2, 2), 8, 16)]
)
def test_downsampling_and_tokens(multipliers: tuple[int, ...], factor: int, tokens: int) -> None:
    config = IBQ.with_fields(**{"model.channel_multipliers": multipliers})
    assert (config.model.downsampling, config.tokens_per_image) == (factor, tokens)


def test_channels_follow_the_data() -> None:
    assert (IBQ.data.channels, IBQ.with_fields(**{"data.name": "photos"}).data.channels) == (1, 3)
