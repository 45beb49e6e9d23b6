"""Cost of a transformer's recipe: counts against arithmetic by hand and against real passes, memory and hours
by rules, in words."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.imagenet256 import transformer_plan
from experiments.imagenet256.transformers import TRANSFORMERS
from ibq.config import TransformerTrainConfig
from ibq.errors import ConfigError
from ibq.models.transformer import Transformer

SMALL = {
    "model.depth": 2,
    "data.resolution": 64,
    "classes": 10,
    "tokenizer.data.resolution": 64,
    "tokenizer.model.base_channels": 8,
    "tokenizer.model.norm_groups": 8,
    "tokenizer.model.res_blocks": 1,
    "tokenizer.model.attention_resolutions": [],
    "tokenizer.model.z_channels": 8,
    "tokenizer.quantizer.codebook_size": 64,
    "tokenizer.quantizer.code_dim": 8,
    "precision": "fp32",
}


@pytest.fixture
def small() -> TransformerTrainConfig:
    return TRANSFORMERS["imagenet256_transformer_b"]().with_fields(**SMALL)


def kept_by_a_real_pass(config: TransformerTrainConfig, images: int) -> int:
    """Bytes of what autograd keeps of embedding, blocks and head; the loss's own logits are not among them."""
    transformer, kept = Transformer(config.transformer_config), dict[int, int]()
    weights = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    tokens_BT = torch.randint(config.quantizer.codebook_size, (images, config.tokens_per_image))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden_BSW = transformer.hidden(tokens_BT[:, :-1], torch.zeros(images, dtype=torch.int64))
        predictions = transformer.predictions(hidden_BSW, tokens_BT)
    assert predictions
    return sum(kept.values())


@pytest.mark.parametrize(("precision", "bits"), [("fp32", []), ("bf16", [2, 4])], ids=["whole", "sub-tokens"])
def test_what_is_counted_as_kept_is_what_autograd_keeps(
    small: TransformerTrainConfig, precision: str, bits: list[int]
) -> None:
    config = small.with_fields(**{"precision": precision, "model.subtoken_bits": bits})
    costs = transformer_plan.count(config, 3)
    counted = 3 * (2 * costs.kept_a_block + costs.kept_after) + costs.copies
    assert counted == pytest.approx(kept_by_a_real_pass(config, 3), rel=0.04)  # the embedding's own is left out


def test_compute_is_that_of_products_counted_by_hand(small: TransformerTrainConfig) -> None:
    """A product's backward pass has two products, attention's five for two."""
    S, W, F, K, depth = 16, 128, small.model.ffn_width, 64, 2
    matrices, modulation, attention = 2 * S * (4 * W * W + 3 * W * F), 2 * 6 * W * W, 4 * S * S * W
    by_hand = depth * (3 * (matrices + modulation) + 3.5 * attention) + 3 * (2 * 2 * W * W + 2 * S * W * K)
    assert transformer_plan.count(small, 1).flops == by_hand


def test_logits_that_are_computed_twice_count_twice(small: TransformerTrainConfig) -> None:
    config = small.with_fields(**{"tokenizer.quantizer.codebook_size": 2**14})
    few, many = (transformer_plan.count(config, images).flops for images in (1, 512))
    assert many - few == 2 * 16 * 128 * 2**14


def test_the_encoder_counts_with_its_convolutions(small: TransformerTrainConfig) -> None:
    """Against hooks on a real pass; beside convolutions there is the attention in the middle, which is small."""
    from ibq.models.tokenizer import Tokenizer

    tokenizer, products = Tokenizer(small.tokenizer), []
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda conv, _, out: products.append(2 * conv.weight[0].numel() * out.numel()))
    with torch.no_grad():
        tokenizer.features(torch.zeros(1, 3, 64, 64))
    counted = transformer_plan.count(small, 1).encoding_flops
    assert sum(products) < counted < 1.01 * sum(products)


def test_memory_follows_the_rules_and_fsdp_shares_the_state_out(small: TransformerTrainConfig) -> None:
    costs = transformer_plan.count(small, 4)
    n = sum(parameter.numel() for parameter in Transformer(small.transformer_config).parameters())
    assert costs.transformer == n
    alone, ddp, fsdp = (
        {name: gib * 2**30 for name, gib in transformer_plan.memory_gib(small, costs, 4, gpus, sharding).items()}
        for gpus, sharding in ((1, "ddp"), (8, "ddp"), (8, "fsdp"))
    )
    assert (alone["state"], ddp["state"], fsdp["state"]) == (16 * n, 20 * n, 2 * n)
    assert fsdp["gathered"] == 8 * n  # two blocks are all there are
    assert {name: ddp[name] for name in alone if name != "state"} == {
        name: alone[name] for name in alone if name != "state"
    }
    averaged = small.with_fields(**{"optim.ema_decay": 0.999})
    assert transformer_plan.memory_gib(averaged, costs, 4, 1, "ddp")["state"] * 2**30 == 20 * n


def test_a_recipe_fits_80_gb_by_this_estimate_and_has_no_more_micro_batches_than_that_needs() -> None:
    config = TRANSFORMERS["imagenet256_transformer_xxl"]()
    costs = transformer_plan.count(config, 24)
    total = {images: sum(transformer_plan.memory_gib(config, costs, images, 8, "ddp").values()) for images in (24, 48)}
    assert total[96 // config.accumulate] < 72 < total[2 * 96 // config.accumulate]


def test_hours_are_an_assumption_and_cached_tokens_are_encoded_once(small: TransformerTrainConfig) -> None:
    costs = transformer_plan.count(small, 1)
    said = transformer_plan.hours(small.with_fields(precision="bf16"), costs, 8)
    images = small.steps * 768
    training, encoding = (
        images * flops / peak / 0.4 / 8 / 3600
        for flops, peak in ((costs.flops, 989e12), (costs.encoding_flops, 494e12))
    )
    assert said.startswith(
        "not known: nothing is measured; at 40% of what the maker of an H100 SXM states (989 TFLOP/s in bfloat16 "
        "or float16, 494 in "
    )
    assert said.endswith(
        f"{training + encoding:,.0f} on 8: {training:,.0f} for the transformer and {encoding:,.0f} for encoding"
    )
    assert transformer_plan.hours(small.with_fields(**{"data.crop": "center"}), costs, 8).endswith(
        " and 0 for encoding"
    )


def test_a_step_that_cannot_be_cut_is_refused(small: TransformerTrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=768 cannot be cut into 1 micro-batches .* on each of 7 GPUs"):
        transformer_plan.plan(small, 7)


def test_the_command_prints_heading_sizes_and_hours() -> None:
    result = CliRunner().invoke(app, ["plan", "imagenet256_transformer_xxl", "--gpus", "64", "--set", "accumulate=1"])
    assert result.exit_code == 0, result.output
    assert "Expected: gFID 2.05, IS 286.73 at temperature 1.20, guidance 2.85." in result.output
    assert (
        "parameters: 2,063,331,840 of the transformer; 110,982,019 of the tokenizer, which are not trained"
        in result.output
    )
    assert "750,600 steps of 768 images: 450.0 epochs" in result.output
    assert "rises to 0.0003 over 15,012 steps, rests for 37,530 and falls to 3e-06" in result.output
    assert "1 micro-batches of 12 images on each of 64 GPUs, bf16" in result.output
    assert "activations: 12 images × (256 positions × 30 blocks × " in result.output
    assert "ddp:        about " in result.output
    assert "fsdp:       about " in result.output
    assert "hours:      not known: nothing is measured; " in result.output
    assert "changed: accumulate=1; the heading is that of the recipe unchanged" in result.output


def test_one_gpu_has_nothing_to_share_out(small: TransformerTrainConfig) -> None:
    assert "fsdp" not in str(transformer_plan.plan(small, 1))
    assert "fsdp" in str(transformer_plan.plan(small, 2))


def test_the_list_shows_them() -> None:
    result = CliRunner().invoke(app, ["list"])
    assert all(name in result.output for name in TRANSFORMERS)
