"""Stage two: the same autoregressive transformer on the tokens of VQ, LFQ and IBQ, with factorized tokens, and at three
depths.

Paper: Table 5, K = 16,384 and the same transformer without factorized tokens: IBQ better than LFQ in generation
(numbers not reported here). Table 7: gFID 2.88 of IBQ B down to 2.05 of XXL; Open-MAGVIT2, whose tokens are factorized,
3.08 to 2.33.
Cost: 7 transformers and the 4 tokenizers that they need.  Command: python -m experiments run generation

At quick the tokenizers train three times the preset's steps (900), since after 300 a classifier of Fashion-MNIST
recognises 60% of what IBQ reconstructs, and no transformer can be better than its tokenizer; so there they share no run
with other ablations. Every arm has the same K, data, and steps of tokenizer and transformer; depth alone sets the size
of the transformer, but that factorized tokens bring a small one of their own (at quick half as many parameters again,
instead of the wide head and embedding). The dropouts of 0.1 in the paper are 0 at quick, where 700 steps of 32 images
see no image twice. FID[fashion-cnn] is that at the guidance where it is lowest, which is chosen on the very samples
that it is of, in every arm alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from experiments.ablations import codebook_size as sizes
from experiments.ablations.base import Ablation, Arm, Axis, Contrast, Factor, PaperRow
from experiments.ablations.changes import Given, Times
from ibq.schema import bits_of

METHODS: dict[str, Mapping[str, Any]] = {
    "VQ": sizes.METHODS["VQ"],
    "VQ, features": sizes.METHODS["VQ, features"],
    "LFQ": {"quantizer.method": "lfq"},
    "IBQ": sizes.METHODS["IBQ"],
}
"""Changes of the tokenizer, those of arms of notebooks 01 and 05."""
DEPTHS = {"×1/2": Fraction(1, 2), "×1": Fraction(1), "×3/2": Fraction(3, 2)}


def arm(name: str, method: str, token: str = "whole", depth: str = "×1") -> Arm:
    levels = {"method": method, "token": token, "depth": depth}
    # no transformer is better than its tokenizer, so these are trained longer than those of other ablations
    changes = {**METHODS[method], "steps": lambda given: Times(given.preset.transformer_tokenizer_steps)}
    transformer: dict[str, Any] = {
        "model.depth": partial(_depth, DEPTHS[depth]),
        "model.subtoken_bits": _halves if token == "halves" else [],
    }
    return Arm(name, levels, changes, transformer, focal=True)


def _depth(share: Fraction, given: Given) -> int:
    """Rounded up, so that a transformer has at least one block."""
    assert given.transformer
    return math.ceil(share * given.transformer.model.depth)


def _halves(given: Given) -> list[int]:
    """Bits of two sub-tokens of a token, as equal as can be."""
    bits = bits_of(given.codebook_size)
    return [bits // 2, bits - bits // 2]


ABLATION = Ablation(
    name="generation",
    title="Generation",
    notebook="08_generation",
    question="Do images come out better where the same transformer learns the tokens of IBQ, and better still where it "
    "is deeper?",
    factors=(
        Factor(
            "method",
            tuple(METHODS),
            "the tokenizer: vq_published, vq_features and ibq_published of notebook 01, LFQ of notebook 05",
        ),
        Factor(
            "token",
            ("halves", "whole"),
            "predicted whole, or as two sub-tokens of half of its bits each, by a small transformer of their own",
        ),
        Factor(
            "depth",
            tuple(DEPTHS),
            "blocks of the transformer, and with them its width, as a multiple of the preset's (2 at quick)",
        ),
    ),
    arms=(
        arm("vq_tokens", "VQ"),
        arm("vq_features_tokens", "VQ, features"),
        arm("ibq_deep", "IBQ", depth="×3/2"),
        arm("lfq_halves", "LFQ", token="halves"),
        arm("ibq_tokens", "IBQ"),
        arm("lfq_tokens", "LFQ"),
        arm("ibq_shallow", "IBQ", depth="×1/2"),
    ),
    contrasts=(
        Contrast(
            "IBQ against LFQ",
            "lfq_tokens",
            "ibq_tokens",
            "With as many codes, tokens predicted whole, FID[fashion-cnn] of images generated from IBQ's tokens is at "
            "least 10% lower than "
            "from LFQ's.",
            "fid",
            -0.152,
            paper="Table 5, K = 16,384: IBQ better in generation",
        ),
        Contrast(
            "IBQ against factorized LFQ",
            "lfq_halves",
            "ibq_tokens",
            "FID[fashion-cnn] of images generated from IBQ's tokens, predicted whole, is at least 5% lower than from "
            "LFQ's, factorized.",
            "fid",
            -0.074,
            paper="Table 7: gFID 2.88 of IBQ B, 3.08 of Open-MAGVIT2 343M",
        ),
        Contrast(
            "scaling: quality",
            "ibq_shallow",
            "ibq_deep",
            "On IBQ's tokens FID[fashion-cnn] is at least 10% lower with three times the depth.",
            "fid",
            -0.152,
            paper="Table 7: gFID 2.88 (B), 2.45 (L), 2.14 (XL), 2.05 (XXL)",
        ),
        Contrast(
            "scaling: likelihood",
            "ibq_shallow",
            "ibq_deep",
            "With three times the depth IBQ's tokens take at least 2% fewer bits an image.",
            "bits_per_image",
            -0.029,
        ),
        Contrast(
            "collapse: bits",
            "vq_tokens",
            "ibq_tokens",
            "IBQ's tokens take at least twice the bits an image of those of VQ as published, whose codebook collapses.",
            "bits_per_image",
            1.0,
        ),
        Contrast(
            "collapse: quality",
            "vq_tokens",
            "ibq_tokens",
            "Whatever the bits, FID[fashion-cnn] of images generated from IBQ's tokens is at least 10% lower than from "
            "VQ's as published.",
            "fid",
            -0.152,
        ),
        Contrast(
            "IBQ against VQ, features",
            "vq_features_tokens",
            "ibq_tokens",
            "FID[fashion-cnn] of images generated from IBQ's tokens is at least 10% lower than from those of the VQ of "
            "best quality.",
            "fid",
            -0.152,
        ),
        Contrast(
            "factorized: quality",
            "lfq_tokens",
            "lfq_halves",
            "On LFQ's tokens FID[fashion-cnn] is at least 10% lower where each is predicted as two sub-tokens.",
            "fid",
            -0.152,
        ),
        Contrast(
            "factorized: likelihood",
            "lfq_tokens",
            "lfq_halves",
            "Predicted as two sub-tokens, LFQ's tokens take less than 5% more bits an image than predicted whole.",
            "bits_per_image",
            0.07,
            keeps=True,
        ),
    ),
    axis=Axis("depth", "parameters", "parameters of the transformer"),
    marker="depth",
    fill="token",
    figures=("samples", "guidance_sweep", "bits_and_distortion", "depth_scaling", "loss_over_training"),
    tables=("arms", "verdicts", "paper"),
    columns=(
        "depth",
        "parameters",
        "cross_entropy",
        "bits_per_image",
        "uniform_bits_per_image",
        "tokenizer_perplexity",
        "tokenizer_dimension_used",
        "tokenizer_l1",
        "tokenizer_fid",
        "guidance",
        "fid",
        "fid_inception",
        "is",
        "precision",
        "recall",
        "label_agreement",
        "samples_per_s",
    ),
    paper_source="Tables 5 and 7 (ImageNet 256x256; gFID and IS with the guidance of each model); of Table 5 no number "
    "is known here, and "
    "sizes of Table 7 stand beside depths by their order alone",
    paper_columns=("gFID", "IS"),
    beside_paper=("guidance", "fid", "is"),
    paper_rows=(
        PaperRow("LFQ, K = 16,384, tokens whole (Table 5)", {}, "lfq_tokens"),
        PaperRow("IBQ, K = 16,384 (Table 5)", {}, "ibq_tokens"),
        PaperRow("IBQ B, 343M", {"gFID": 2.88, "IS": 254.73}, "ibq_shallow"),
        PaperRow("IBQ L, 650M", {"gFID": 2.45, "IS": 267.48}, "ibq_tokens"),
        PaperRow("IBQ XL, 1.1B", {"gFID": 2.14, "IS": 278.99}),
        PaperRow("IBQ XXL, 2.1B", {"gFID": 2.05, "IS": 286.73}, "ibq_deep"),
        PaperRow("Open-MAGVIT2, 343M", {"gFID": 3.08, "IS": 258.26}),
        PaperRow("Open-MAGVIT2, 804M", {"gFID": 2.51, "IS": 271.70}, "lfq_halves"),
        PaperRow("Open-MAGVIT2, 1.5B", {"gFID": 2.33, "IS": 271.77}),
        PaperRow("DiT", {}),
        PaperRow("LlamaGen", {}),
        PaperRow("VAR", {}),
        PaperRow("MAR", {}),
    ),
)
