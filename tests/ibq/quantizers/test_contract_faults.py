"""Quantizers of one's own with a fault each: the rule that it breaks says so in the right words."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_files import SOURCE, source, write

from ibq import plugins
from ibq.quantizers import QuantizerConfig, parse_quantizer_config
from ibq.quantizers.contract import RULES, broken, demand
from ibq.quantizers.contract.processes import two_processes

pytestmark = pytest.mark.usefixtures("own_plugins")

USAGE = """def __init__(self, config):
        super().__init__(config)
        self.register_buffer("usage_K", torch.zeros(config.codebook_size))"""
COUNT = """if self.training:
            self.usage_K += torch.bincount(indices_N, minlength=len(self.usage_K))"""
FORWARD = """def forward(self, z_BDHW, mask=None):
        tokens = z_BDHW.movedim(1, -1)
        z_q_ND, indices_N, losses = self.quantize(tokens.flatten(0, -2))
        return Quantized(z_q_ND.reshape(tokens.shape).movedim(-1, 1), indices_N.reshape(tokens.shape[:-1]), losses)"""
FAULTS: dict[str, tuple[dict[str, str], str, str]] = {
    "not the code bit for bit": (
        {"after": "z_q_ND = z_ND + (codes_ND - z_ND).detach()"},
        "round trip",
        "in training z_q is not indices_to_codes(indices) bit for bit: they differ in",
    ),
    "another code": (
        {"after": "z_q_ND = straight_through(z_ND, codebook_KD[indices_N - 1])"},
        "round trip",
        "of 144 values, by up to",
    ),
    "another codebook": (
        {"class": "def codes_of(self, indices):\n        return (1 + (not self.training)) * self.embedding[indices]"},
        "round trip",
        "in evaluation z_q is not indices_to_codes(indices) bit for bit",
    ),
    "indices of 32 bits": (
        {"after": "indices_N = indices_N.int()"},
        "shapes and types",
        "in training indices are torch.int32 of shape (2, 3, 4); they must be int64",
    ),
    "a loss without a weight": (
        {"after": 'losses["extra"] = z_ND.square().mean()'},
        "losses",
        "in training loss extra has no weight; add it to the config's loss_weights",
    ),
    "a weight without a loss": (
        {"after": 'del losses["codebook"]'},
        "losses",
        "loss_weights has codebook, which is no loss that quantize returns",
    ),
    "a loss for each token": (
        {"after": 'losses["commitment"] = (z_ND - codes_ND.detach()).square().mean(1)'},
        "losses",
        "loss commitment has the shape (24,); take its mean",
    ),
    "a loss without a gradient": (
        {"after": 'losses["commitment"] = losses["commitment"].detach()'},
        "losses",
        "loss commitment has no gradient",
    ),
    "a loss that is not finite": (
        {"after": 'losses["commitment"] = losses["commitment"].log() / 0'},
        "losses",
        "loss commitment is ",
    ),
    "no gradient for the encoder": (
        {"after": 'z_q_ND, losses["commitment"] = codes_ND, losses["codebook"]'},
        "gradients",
        "in step 1 no gradient reaches the features",
    ),
    "a parameter that nothing uses": (
        {
            "class": "def __init__(self, config):\n        super().__init__(config)\n"
            "        self.idle = nn.Parameter(torch.ones(1))"
        },
        "gradients",
        "no gradient reaches the parameter idle, for which DistributedDataParallel would wait",
    ),
    "the largest dot product without logits": (
        {
            "after": "indices_N = (z_ND @ codebook_KD.T).argmax(1)\n        codes_ND = codebook_KD[indices_N]\n"
            "        z_q_ND = straight_through(z_ND, codes_ND)"
        },
        "logits",
        "the largest logit is not that of the index for",
    ),
    "features that a batch centres": (
        {"before": "z_ND = z_ND - z_ND.mean(0)"},
        "each token alone",
        "of 24 tokens have another index by themselves than together",
    ),
    "noise in evaluation": (
        {"before": "z_ND = z_ND + torch.randn_like(z_ND)"},
        "evaluation",
        "in evaluation two forwards of the same features differ in indices",
    ),
    "counts in evaluation": (
        {"class": USAGE, "after": "self.usage_K += 1"},
        "evaluation",
        "a forward in evaluation changes the state usage_K",
    ),
    "a field without a default": (
        {"config": "strength: float"},
        "config",
        "the config's field strength has no default",
    ),
    "a field that JSON changes": (
        {"config": "names: tuple = (frozenset({1, 2}),)"},
        "config",
        "keep to fields that JSON can hold",
    ),
    "state that is lost": (
        {"class": "seen = 0", "before": "self.seen += self.training", "after": 'losses["codebook"] *= 1 + self.seen'},
        "resume",
        "in step 4 of a run that was resumed from the state_dict of step 3; keep what changes in a parameter or",
    ),
    "state that is not saved": (
        {
            "class": USAGE.replace("size))", "size), persistent=False)"),
            "after": COUNT,
            "before": "codebook_KD = codebook_KD + 1e-2 * self.usage_K[:, None]",
        },
        "resume",
        "keep what changes in a parameter or in a persistent buffer",
    ),
    "noise that the config does not mention": (
        {"before": "z_ND = z_ND + torch.randn_like(z_ND) if self.training else z_ND"},
        "changes in forward",
        "two training forwards of the same features within a step differ in indices",
    ),
    "counts that the config does not mention": (
        {"class": USAGE, "after": COUNT},
        "changes in forward",
        "differ in state usage_K, and changes_in_forward is False; let the config's property return True",
    ),
    "counts that recomputation doubles": (
        {"class": USAGE, "after": COUNT},
        "recomputation",
        "with gradient checkpointing (use_reentrant=True) usage_K differs in step 1; change nothing in a forward while",
    ),
    "codes that move under a backward pass": (
        {
            "after": 'losses["codebook"] = (z_ND @ codebook_KD.T).square().mean()\n'
            "        self.embedding.data.mul_(0.9 if self.training else 1)"
        },
        "two forwards",
        "two forwards before one backward pass give",
    ),
    "k-means that a forward undoes": (
        {
            "class": USAGE.replace(
                '"usage_K", torch.zeros(config.codebook_size)', '"own_KD", self.embedding.detach() + 0'
            ),
            "before": "self.embedding.data.copy_(self.own_KD)\n        codebook_KD = self.codebook",
        },
        "late quantization",
        "in the forwards after cluster has set the codes to their k-means",
    ),
    "a mask that is ignored": (
        {"class": "def forward(self, z_BDHW, mask=None):\n        return super().forward(z_BDHW)"},
        "masks",
        "masked tokens have a part in step 1: from a step of the other tokens alone differs",
    ),
    "a mask that only hides": (
        {
            "class": "def forward(self, z_BDHW, mask=None):\n        z_q, indices, losses = super().forward(z_BDHW)\n"
            "        return Quantized(z_q, indices if mask is None else indices * mask, losses)"
        },
        "masks",
        "loss 'codebook'",
    ),
    "a mask that must not hold NaN": (
        {
            "class": "def forward(self, z_BDHW, mask=None):\n        assert mask is None or z_BDHW.isfinite().all()\n"
            "        return super().forward(z_BDHW, mask)"
        },
        "masks",
        "it raises AssertionError",
    ),
    "no mask of all tokens": (
        {
            "class": "def forward(self, z_BDHW, mask=None):\n        z_BDHW = z_BDHW if mask is None else 2 * z_BDHW\n"
            "        return super().forward(z_BDHW, mask)"
        },
        "mask of all",
        "with a mask of all tokens loss 'codebook', loss 'commitment' differs",
    ),
    "a forward for maps alone": (
        {"class": FORWARD},
        "sequences, videos",
        "it raises RuntimeError",
    ),
    "a forward that takes nothing": ({"class": FORWARD}, "empty batches", "an empty batch (0, 12, 6) raises"),
    "a forward that takes NaN": (
        {"class": FORWARD},
        "not finite",
        "features with nan are quantized; let the base's forward stand, which refuses them",
    ),
    "a forward within autocast": (
        {"class": FORWARD, "after": 'losses["commitment"] = (z_ND @ codebook_KD.T).mean()'},
        "autocast",
        "within autocast loss 'commitment' has another type than without; let the base's forward stand",
    ),
    "a forward in the type of its features": ({"class": FORWARD}, "other types", "it raises RuntimeError"),
    "a forward with a tuple": (
        {"class": "def forward(self, z_BDHW, mask=None):\n        return tuple(super().forward(z_BDHW, mask))"},
        "shapes and types",
        "forward returns a tuple, not Quantized(z_q, indices, losses); write quantize",
    ),
    "losses in the type of the weights": (
        {"after": "losses = {name: loss.to(self.dtype) for name, loss in losses.items()}"},
        "casts",
        "cast to torch.bfloat16, in training, loss commitment is",
    ),
    "counts in bfloat16": (
        {"class": USAGE, "after": COUNT},
        "accumulators",
        "the buffer usage_K, which training changes, becomes torch.bfloat16; keep it in a module of the class",
    ),
}


def config_of(folder: Path, text: str) -> QuantizerConfig:
    plugins.load_file(write(folder, text=text))
    return parse_quantizer_config({"method": "mine", "codebook_size": 64, "code_dim": 6})


@pytest.mark.parametrize("rule", RULES)
def test_without_a_fault_every_rule_is_kept(rule: str, tmp_path: Path) -> None:
    assert broken(rule, config_of(tmp_path, SOURCE)) == []
    assert "\n" not in demand(rule)


def test_every_rule_has_a_fault() -> None:
    assert {rule for _, rule, _ in FAULTS.values()} == RULES.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said_in_words(fault: str, tmp_path: Path) -> None:
    lines, rule, words = FAULTS[fault]
    fields = {"strength": 1.0} if fault == "a field without a default" else {}
    plugins.load_file(write(tmp_path, text=source(**lines)))
    config = parse_quantizer_config({"method": "mine", "codebook_size": 64, "code_dim": 6} | fields)
    sentences = broken(rule, config)
    assert any(words in sentence for sentence in sentences), sentences
    assert not any("\n" in sentence for sentence in sentences)


def test_what_is_raised_is_said_with_its_line(tmp_path: Path) -> None:
    config = config_of(tmp_path, source(before='raise RuntimeError("no\\nway")'))
    assert broken("round trip", config) == ["it raises RuntimeError: no way (mine.py, line 20)"]


OF_PROCESSES = {
    "counts of each process": (
        {"class": USAGE, "after": COUNT},
        "two processes that average their gradients differ in quantizer.usage_K; add up what is counted over ranks",
    ),
    "a loss on the mean of a process": (
        {"after": 'losses["codebook"] = losses["codebook"] + z_ND.mean(0).square().mean()'},
        "two processes do not train what one does on the joined batch: the gradient of ",
    ),
    "one that raises": (
        {"after": 'if z_ND.dtype == torch.float64: raise ValueError("no such type")'},
        "in two processes it raises ValueError: no such type",
    ),
    "no fault": ({}, ""),
}


@pytest.mark.processes
def test_faults_of_two_processes(tmp_path: Path) -> None:
    """One that raises leaves those after it to two other processes."""
    configs = []
    for number, (lines, _) in enumerate(OF_PROCESSES.values()):
        plugins.load_file(write(tmp_path, f"m{number}.py", source(f"m{number}", **lines)))
        configs.append(parse_quantizer_config({"method": f"m{number}", "codebook_size": 64, "code_dim": 6}))
    for (_, words), sentences in zip(OF_PROCESSES.values(), two_processes(configs), strict=True):
        assert len(sentences) == bool(words)
        assert all(sentence.startswith(words) for sentence in sentences), sentences
