"""Released checkpoints: every tensor where it belongs, averaged against trained, and each fault of a file as one
sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from released_layout import (
    CLASSES,
    CODE_DIM,
    CODES,
    DEPTH,
    Tensors,
    averages,
    loss_networks,
    networks,
    sentence,
    tokenizer_state,
    transformer_network,
    transformer_state,
    write,
)

from ibq import Tokenizer, TrainedTransformer, load_released, load_tokenizer
from ibq.errors import ConfigError, DataError


def imported(path: Path, **weights: Any) -> Tokenizer:
    tokenizer = load_released(path, **weights)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


def trained(path: Path, **weights: Any) -> TrainedTransformer:
    loaded = load_released(path, **weights)
    assert isinstance(loaded, TrainedTransformer)
    return loaded


def assert_holds(tokenizer: Tokenizer, state: Tensors) -> None:
    """The tokenizer has these weights and no others, by name."""
    held = {
        ("quantize.embedding.weight" if n == "quantize.embedding" else n): p for n, p in tokenizer.named_parameters()
    }
    assert held.keys() == state.keys()
    for name, parameter in held.items():
        assert torch.equal(parameter, state[name]), name
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
    assert not tokenizer.training
    assert bool(tokenizer.quantize.initialized)


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def test_trained_weights_are_where_they_belong(tmp_path: Path) -> None:
    assert_holds(imported(write(tmp_path / "t.ckpt", tokenizer_state()), weights="raw"), networks())


def test_averaged_weights_are_the_default(tmp_path: Path) -> None:
    path, trained, shadows = write(tmp_path / "t.ckpt", tokenizer_state()), networks(), averages(networks())
    expected = {name: shadows["model_ema." + name.replace(".", "")] for name in trained}
    assert not torch.equal(expected["quant_conv.bias"], trained["quant_conv.bias"])
    assert_holds(imported(path), expected)
    assert_holds(imported(path, weights="ema"), expected)


@pytest.mark.parametrize(
    ("sizes", "multipliers", "res_blocks", "attention"),
    [
        ({}, (1, 1, 2), 2, (64,)),
        ({"multipliers": (1,), "attention_levels": (0,), "blocks": 1}, (1,), 1, (256,)),
        ({"multipliers": (1, 2), "attention_levels": (), "blocks": 3}, (1, 2), 3, ()),
        (
            {"base": 64, "multipliers": (1, 1), "attention_levels": (0, 1), "blocks": 1, "codes": 5},
            (1, 1),
            1,
            (256, 128),
        ),
    ],
)
def test_sizes_come_from_shapes(
    tmp_path: Path, sizes: dict[str, Any], multipliers: tuple[int, ...], res_blocks: int, attention: tuple[int, ...]
) -> None:
    tokenizer = imported(write(tmp_path / "t.ckpt", tokenizer_state(**sizes)), weights="raw")
    model, quantizer = tokenizer.config.model, tokenizer.config.quantizer
    assert (model.base_channels, model.channel_multipliers, model.res_blocks) == (
        sizes.get("base", 32),
        multipliers,
        res_blocks,
    )
    assert (model.attention_resolutions, model.z_channels, model.norm_groups) == (attention, 8, 32)
    assert (quantizer.codebook_size, quantizer.code_dim) == (sizes.get("codes", CODES), CODE_DIM)
    assert_holds(tokenizer, networks(**sizes))


def test_the_config_is_the_released_recipe(tmp_path: Path) -> None:
    config = imported(write(tmp_path / "t.ckpt", tokenizer_state())).config
    assert config.data.model_dump(exclude={"name"}) == {
        "resolution": 256, "crop": "random", "flip": False, "resize": "released"
    }  # fmt: skip
    assert (config.loss.pixel, config.loss.perceptual, config.loss.adversarial.weight) == ("l1", "lpips-vgg", 0.1)
    assert (config.optim.lr, config.optim.betas, config.optim.ema_decay) == (1e-4, (0.5, 0.9), 0.999)
    assert (config.batch_size, config.precision, config.averages) == (256, "fp16", "local")
    assert config.quantizer.loss_weights == {
        "commitment": 1.0, "codebook": 0.25, "double": 1.0, "sample_entropy": 0.05, "codebook_entropy": -0.05
    }  # fmt: skip
    steps_an_epoch = config.steps / 330
    assert steps_an_epoch == pytest.approx(1_281_167 / 256, rel=1e-3)
    drops = [round(steps_an_epoch * epoch) + 1 for epoch in (0, 249, 251, 299, 301)]
    assert [config.lr_at(step) for step in drops] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


def test_the_recipe_of_8192_codes_is_its_own(tmp_path: Path) -> None:
    config = imported(write(tmp_path / "t.ckpt", tokenizer_state(codes=8192))).config
    assert (config.precision, config.optim.milestones) == ("bf16", (250 / 280,))
    assert config.steps / 280 == pytest.approx(1_281_167 / 256, rel=1e-3)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    tokenizer = imported(write(tmp_path / "t.ckpt", tokenizer_state()))
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.config == tokenizer.config
    assert loaded.state_dict().keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(tensor, tokenizer.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(images).images, tokenizer(images).images)


def test_weights_outlive_the_file_and_no_random_number_is_drawn(tmp_path: Path) -> None:
    path, before = write(tmp_path / "t.ckpt", tokenizer_state()), torch.random.get_rng_state()
    tokenizer = imported(path, weights="raw")
    assert torch.equal(torch.random.get_rng_state(), before)
    path.write_bytes(bytes(path.stat().st_size))
    assert_holds(tokenizer, networks())


def test_half_precision_is_widened(tmp_path: Path) -> None:
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tokenizer_state().items()
    }
    assert_holds(
        imported(write(tmp_path / "t.ckpt", state), weights="raw"), {n: t.half().float() for n, t in networks().items()}
    )


def test_an_average_of_the_frozen_perceptual_loss_is_known_too(tmp_path: Path) -> None:
    shadows = {"model_ema." + n.replace(".", ""): t for n, t in loss_networks().items() if "perceptual" in n}
    assert_holds(imported(write(tmp_path / "t.ckpt", tokenizer_state() | shadows), weights="raw"), networks())


def test_a_tokenizer_without_averages_has_its_trained_weights_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "t.ckpt", networks() | loss_networks())
    assert_holds(imported(path, weights="raw"), networks())
    with pytest.raises(
        DataError,
        match=r"t.ckpt holds no averaged weights \(.+ 'model_ema.'\); pass weights='raw' \(of a command: --weights "
        r"raw\)$",
    ):
        load_released(path)


# --- Transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_transformer_comes_with_its_tokenizer(tmp_path: Path, weights: str) -> None:
    transformer, tokenizer, averaged = trained(write(tmp_path / "g.ckpt", transformer_state()), weights=weights)
    assert_holds(tokenizer, networks())
    assert not averaged, "the file has no averages"
    expected = transformer_network()
    assert transformer.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in transformer.state_dict().items())
    config = transformer.config
    assert (config.depth, config.codebook_size, config.classes, config.grid) == (DEPTH, CODES, CLASSES, 64)
    assert not transformer.training


def test_a_tokenizer_inside_may_have_averages_and_the_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "g.ckpt", transformer_state(tokenizer=tokenizer_state(), depth=1, classes=2))
    shadows = averages(networks())
    assert_holds(trained(path).tokenizer, {name: shadows["model_ema." + name.replace(".", "")] for name in networks()})
    assert_holds(trained(path, weights="raw").tokenizer, networks())
    assert [trained(path, weights=weights).averaged for weights in ("ema", "raw")] == [True, False]


def test_the_transformers_grid_holds_what_its_tokenizer_decodes(tmp_path: Path) -> None:
    sizes = {"multipliers": (1, 1, 1, 1, 1), "attention_levels": (4,), "blocks": 1}
    transformer, tokenizer, _ = trained(
        write(tmp_path / "g.ckpt", transformer_state(tokenizer=networks(**sizes), depth=1))
    )
    assert transformer.config.grid == 16
    assert tokenizer.config.model.attention_resolutions == (16,)
    with torch.no_grad():
        logits_BSK = transformer(torch.zeros(1, 255, dtype=torch.int64), torch.tensor([CLASSES]))
        assert tokenizer.decode(logits_BSK.argmax(2).reshape(1, 16, 16)).shape == (1, 3, 256, 256)


# --- Faults -----------------------------------------------------------------------------------------------------------


SMALL: dict[str, Any] = {"multipliers": (1, 2), "attention_levels": (1,), "blocks": 1}
A_TOKENIZER = tokenizer_state(**SMALL)
A_TRANSFORMER = transformer_state(tokenizer=networks(**SMALL))
KEYS_OF_A_TOKENIZER = [
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.norm1.bias",
    "encoder.down.0.block.0.conv1.weight",
    "encoder.down.0.downsample.conv.bias",
    "encoder.down.1.block.0.nin_shortcut.weight",
    "encoder.down.1.attn.0.q.weight",
    "encoder.conv_out.weight",
    "decoder.mid.attn_1.proj_out.bias",
    "decoder.up.1.block.1.conv1.weight",
    "decoder.up.1.upsample.conv.weight",
    "decoder.conv_out.weight",
    "quant_conv.weight",
    "post_quant_conv.bias",
    "quantize.embedding.weight",
    "model_ema.decoderup0block1conv1weight",
    "model_ema.quantizeembeddingweight",
    "model_ema.lossdiscriminatormain0weight",
    "model_ema.lossdiscriminatormain3bias",
    "model_ema.decay",
    "model_ema.num_updates",
]
KEYS_OF_A_TRANSFORMER = [
    "transformer.tok_emb.weight",
    "transformer.blocks.0.attention.wqkv.weight",
    "transformer.blocks.1.feed_forward.w3.weight",
    "transformer.blocks.1.ffn_norm.weight",
    "transformer.blocks.0.ada_lin.1.bias",
    "transformer.head_nm.rmsnorm.weight",
    "transformer.head_nm.ada_lin.1.weight",
    "transformer.head.weight",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.decoder.up.0.block.0.conv1.bias",
]
EVERY_KIND = [(A_TOKENIZER, key) for key in KEYS_OF_A_TOKENIZER] + [
    (A_TRANSFORMER, key) for key in KEYS_OF_A_TRANSFORMER
]
SAME_SIZES = (
    {"quantize.embedding.weight", "model_ema.quantizeembeddingweight"},
    {"transformer.tok_emb.weight", "transformer.head.weight"},
)


@pytest.mark.parametrize(("state", "key"), EVERY_KIND, ids=[key for _, key in EVERY_KIND])
def test_a_key_missing_renamed_or_misshapen_is_named(tmp_path: Path, state: Tensors, key: str) -> None:
    others, tensor, path = {name: t for name, t in state.items() if name != key}, state[key], tmp_path / "t.ckpt"
    assert sentence(write(path, others)) == f"FILE lacks {key!r}; take the file as it was released"
    renamed = key.replace("model_ema.", "model_ema.x") if key.startswith("model_ema") else key + "s"
    assert sentence(write(path, others | {renamed: tensor})) == (
        f"FILE lacks {key!r} and has {renamed!r}, which is unknown (2 keys do not fit in all); take the file as it was "
        f"released"
    )
    grown = tensor.new_zeros([side + 1 for side in tensor.shape] or [2])
    text = sentence(write(path, others | {key: grown}))
    blamed = re.search(r"has '(\S+)' in the shape \(.*\) where the other tensors want \(.*\)", text)
    assert blamed, text
    assert blamed[1] == key or {key, blamed[1]} in SAME_SIZES, (
        "of two tensors that disagree, either may be the wrong one"
    )


@pytest.mark.parametrize(
    "key", ["transformer.class_emb.embedding_table.weight", "first_stage_model.quantize.embedding.weight"]
)
def test_a_key_that_alone_says_a_size_is_named_too(tmp_path: Path, key: str) -> None:
    others, path = {name: t for name, t in A_TRANSFORMER.items() if name != key}, tmp_path / "t.ckpt"
    alone = f"FILE lacks {key!r}, or has it in a wrong shape; take the file as it was released"
    assert sentence(write(path, others)) == alone
    assert sentence(write(path, others | {key: torch.zeros(())})) == alone
    wrong_other_side = A_TRANSFORMER[key].new_zeros(A_TRANSFORMER[key].shape[0], 7)
    assert f"has {key!r} in the shape {tuple(wrong_other_side.shape)}" in sentence(
        write(path, others | {key: wrong_other_side})
    )


@pytest.mark.parametrize(
    ("state", "key"),
    [
        (A_TOKENIZER, "encoder.down.0.block.1.conv1.weight"),
        (A_TOKENIZER, "encoder.down.2.block.0.conv1.weight"),
        (A_TOKENIZER, "encoder.down.0.attn.0.q.weight"),
        (A_TOKENIZER, "decoder.up.0.upsample.conv.weight"),
        (A_TOKENIZER, "encoder.down.0.block.0.nin_shortcut.weight"),
        (A_TOKENIZER, "quantize.embedding.bias"),
        (A_TOKENIZER, "model_ema.encoder.conv_in.weight"),
        (A_TOKENIZER, "model_ema.lossdiscriminatormain8weight"),
        (A_TOKENIZER, "colorize"),
        (A_TRANSFORMER, "transformer.head.bias"),
        (A_TRANSFORMER, "transformer.blocks.0.attention.wo.bias"),
        (A_TRANSFORMER, "first_stage_model.decoder.up.0.block.9.conv1.weight"),
        (A_TRANSFORMER, "first_stage_model.mask_token"),
        (A_TRANSFORMER, "model_ema.transformerheadweight"),
        (A_TRANSFORMER, "cond_stage_model.weight"),
    ],
)
def test_a_key_too_many_is_named(tmp_path: Path, state: Tensors, key: str) -> None:
    text = sentence(write(tmp_path / "t.ckpt", state | {key: torch.zeros(3)}))
    assert (
        text == f"FILE has {key!r}, which belongs to no part of the released layout; take the file as it was released"
    )


def test_the_discriminators_averages_have_its_shapes(tmp_path: Path) -> None:
    state = tokenizer_state()
    state["loss.discriminator.main.0.weight"] = torch.zeros(9, 3, 4, 4)
    text = sentence(write(tmp_path / "t.ckpt", state))
    assert (
        "has 'model_ema.lossdiscriminatormain0weight' in the shape (4, 3, 4, 4) where the other tensors want (9, 3, 4, "
        "4)" in text
    )


def without_last_block(state: Tensors) -> Tensors:
    return {name: tensor for name, tensor in state.items() if not name.startswith("transformer.blocks.2.")}


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (tokenizer_state(channels=1), "its images have 1 channels where the released tokenizers read 3"),
        (
            tokenizer_state(base=48, multipliers=(1,), attention_levels=()),
            "norm_groups=32 does not divide a level of 48 channels",
        ),
        (
            without_last_block(transformer_state(depth=3)),
            "2 blocks of width 192, where the width is 64 times the number of blocks",
        ),
        (
            transformer_state(tokenizer=networks(codes=9)),
            "holds a transformer over 12 codes and a tokenizer of 9, which do not belong together",
        ),
    ],
)
def test_shapes_of_no_architecture_are_refused(tmp_path: Path, state: Tensors, why: str) -> None:
    assert why in sentence(write(tmp_path / "t.ckpt", state))


@pytest.mark.parametrize(("value", "weights"), [(float("nan"), "raw"), (float("inf"), "ema")])
def test_weights_that_are_not_finite_are_refused_where_they_are_used(
    tmp_path: Path, value: float, weights: str
) -> None:
    state, trained = tokenizer_state(), "decoder.up.0.block.1.conv1.weight"
    key = {"raw": trained, "ema": "model_ema." + trained.replace(".", "")}[weights]
    state[key].view(-1)[3] = value
    path = write(tmp_path / "t.ckpt", state)
    assert sentence(path, weights=weights) == f"FILE has NaN or infinity in {key!r}; take the file as it was released"
    imported(path, weights="raw" if weights == "ema" else "ema")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    state = transformer_state()
    state["transformer.head.weight"] = state["transformer.head.weight"].long()
    text = sentence(write(tmp_path / "t.ckpt", state))
    assert (
        text
        == "FILE has torch.int64, which is no weight's type, in 'transformer.head.weight'; take the file as it was "
        "released"
    )


@pytest.mark.parametrize("state", [{}, {"conv1.weight": torch.ones(2)}])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, state: Tensors) -> None:
    text = sentence(write(tmp_path / "t.ckpt", state))
    assert text.startswith("FILE holds neither a tokenizer nor a transformer of the released layout")
    assert ("its first key is 'conv1.weight'" in text) == bool(state)


def test_half_a_transformer_is_refused(tmp_path: Path) -> None:
    for beginning in ("transformer.", "first_stage_model."):
        state = {name: tensor for name, tensor in transformer_state().items() if not name.startswith(beginning)}
        assert f"lacks every key of '{beginning}" in sentence(write(tmp_path / "t.ckpt", state))


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    assert sentence(tmp_path / "absent.ckpt") == "there is no file FILE; pass the path of a released checkpoint"
    assert sentence(tmp_path).startswith("there is no file FILE")


def test_other_weights_than_ema_and_raw_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^weights='emma' must be 'ema' or 'raw'$"):
        load_released(tmp_path / "t.ckpt", weights="emma")  # type: ignore[arg-type]
