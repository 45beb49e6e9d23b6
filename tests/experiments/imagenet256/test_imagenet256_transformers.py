"""The recipes of transformers against the paper's numbers, written out here a second time, and against what their own
headings say."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from experiments.imagenet256 import RECIPES, transformers
from experiments.imagenet256.tokenizers import TOKENIZERS, imagenet256_vqgan_16384
from experiments.imagenet256.transformer_plan import plan
from experiments.imagenet256.transformers import TRANSFORMERS
from ibq.errors import ConfigError
from ibq.models.transformer import Transformer
from ibq.schema import flatten

# docs/method.md section 6
SHARED = {
    "data.resolution": 256,
    "data.crop": "random",
    "data.flip": False,
    "data.resize": "released",
    "classes": 1000,
    "model.token_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.ffn_dropout": 0.1,
    "model.class_dropout": 0.1,
    "optim.lr": pytest.approx(3e-4),
    "optim.betas": [0.9, 0.95],
    "optim.weight_decay": 0.05,
    "optim.decayed": "all",
    "optim.clip_norm": 1.0,
    "optim.ema_decay": None,
    "batch_size": 768,
    "precision": "bf16",
    "tokenizer_sha256": "",
}
WHOLE: list[int] = []
OWN = {
    "imagenet256_transformer_b": ("imagenet256_ibq_16384", 16, WHOLE, 300, 0.1),
    "imagenet256_transformer_l": ("imagenet256_ibq_16384", 20, WHOLE, 350, 0.1),
    "imagenet256_transformer_xl": ("imagenet256_ibq_16384", 24, WHOLE, 400, 0.01),
    "imagenet256_transformer_xxl": ("imagenet256_ibq_16384", 30, WHOLE, 450, 0.01),
    "imagenet256_transformer_b_lfq_16384": ("imagenet256_lfq_16384", 16, WHOLE, 300, 0.1),
    "imagenet256_transformer_b_lfq_262144": ("imagenet256_lfq_262144", 16, [6, 12], 300, 0.1),
}
"""Tokenizer, depth, bits of sub-tokens, epochs, and what the learning rate comes down to."""
PARAMETERS = {
    "imagenet256_transformer_b": 342_994_944,
    "imagenet256_transformer_l": 649_640_960,
    "imagenet256_transformer_xl": 1_076_103_168,
    "imagenet256_transformer_xxl": 2_063_331_840,
    "imagenet256_transformer_b_lfq_16384": 342_994_944,
}
EXPECTED = {
    "imagenet256_transformer_b": "gFID 2.88, IS 254.73 at temperature 1.10, guidance 2.25.",
    "imagenet256_transformer_l": "gFID 2.45, IS 267.48 at temperature 1.00, guidance 2.00.",
    "imagenet256_transformer_xl": "gFID 2.14, IS 278.99 at temperature 1.15, guidance 2.35.",
    "imagenet256_transformer_xxl": "gFID 2.05, IS 286.73 at temperature 1.20, guidance 2.85.",
    "imagenet256_transformer_b_lfq_16384": "not reported.",
    "imagenet256_transformer_b_lfq_262144": "not reported; Open-MAGVIT2 itself, with 343 M parameters, gFID 3.08, IS "
    "258.26.",
}


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(TRANSFORMERS[name]().transformer_config).parameters())


def test_there_are_the_recipes_of_the_paper_and_train_knows_both_stages() -> None:
    assert TRANSFORMERS.keys() == OWN.keys()
    assert RECIPES.keys() == TOKENIZERS.keys() | TRANSFORMERS.keys()


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_has_the_papers_numbers(name: str) -> None:
    tokenizer, depth, bits, epochs, final_factor = OWN[name]
    config = TRANSFORMERS[name]()
    flat = flatten(config.to_json_dict())
    wanted = SHARED | {"model.depth": depth, "model.subtoken_bits": bits}
    wanted |= {"optim.final_weight_decay": 0.08 if depth == 30 else None}
    assert {field: flat[field] for field in wanted} == wanted
    assert config.tokenizer == TOKENIZERS[tokenizer]()
    assert (config.data.kind, config.tokens, config.grid, config.tokens_per_image) == ("imagefolder", "fresh", 16, 256)
    a_pass = 1_281_167 // 768
    assert config.steps == epochs * a_pass
    rising, resting = epochs // 50 * a_pass, round(0.05 * config.steps)  # 6, 7, 8 and 9 epochs
    assert config.lr_at(rising - 1) < 3e-4
    assert [config.lr_at(step) for step in (rising, rising + resting - 1)] == pytest.approx([3e-4, 3e-4])
    assert config.lr_at(rising + resting) < 3e-4
    assert config.lr_at(config.steps - 1) == pytest.approx(3e-4 * final_factor)
    assert 768 % (8 * config.accumulate) == 0  # the processes of the recipe's command


@pytest.mark.parametrize("name", OWN)
def test_a_heading_says_claim_cost_expected_number_and_command(name: str) -> None:
    config, heading = TRANSFORMERS[name](), str(inspect.getdoc(TRANSFORMERS[name]))
    found = re.findall(r"^(Claim|Cost|Expected|Command): (.+(?:\n {4}.+)*)$", heading, re.MULTILINE)
    parts = {name: " ".join(text.split()) for name, text in found}
    assert parts.keys() == {"Claim", "Cost", "Expected", "Command"}
    counted = parameters(name)
    assert counted == PARAMETERS.get(name, counted)
    assert (
        parts["Cost"]
        == f"{config.steps:,} steps of 768 images ({OWN[name][3]} epochs), {counted / 1e6:,.1f} M parameters."
    )
    assert parts["Expected"] == EXPECTED[name]
    assert (
        parts["Command"]
        == f"torchrun --nproc-per-node 8 -m experiments train {name} --tokenizer TOKENIZER --data IMAGENET"
    )


def test_a_recipe_says_that_its_precision_is_ours_and_can_be_that_of_the_released_runs() -> None:
    assert "bfloat16 is ours" in str(transformers.__doc__)
    config = TRANSFORMERS["imagenet256_transformer_b"]().with_fields(precision="fp16")
    lines = dict(plan(config, 8))
    assert lines["a step"].endswith("on each of 8 GPUs, fp16")
    assert lines["memory"] == dict(plan(TRANSFORMERS["imagenet256_transformer_b"](), 8))["memory"].replace(
        "in bf16", "in fp16"
    )


def test_a_recipe_takes_the_config_of_another_tokenizer() -> None:
    vq = imagenet256_vqgan_16384()
    config = TRANSFORMERS["imagenet256_transformer_b"](vq)
    assert config.tokenizer == vq
    assert config.run_id("0" * 64) != TRANSFORMERS["imagenet256_transformer_b"]().run_id("0" * 64)
    assert (
        TRANSFORMERS["imagenet256_transformer_b"](TOKENIZERS["imagenet256_ibq_1024"]()).transformer_config.codebook_size
        == 1024
    )
    with pytest.raises(ConfigError, match=r"subtoken_bits=\(6, 12\) make 262,144 tokens and codebook_size is 16,384"):
        TRANSFORMERS["imagenet256_transformer_b_lfq_262144"](vq)


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_IMAGENET", str(tmp_path))
    config = TRANSFORMERS["imagenet256_transformer_b"]()
    assert config.data.folder == config.tokenizer.data.folder == str(tmp_path)
