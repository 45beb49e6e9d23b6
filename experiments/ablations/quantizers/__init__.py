"""Every quantizer that people use, with the tricks its users need, and IBQ's parts taken away one by one.

Paper: Table 1 compares tokenizers of different recipes, data and lengths; here autoencoder, data, steps, bits a token
    (K) and the tuning
budget are equal: before the comparison every method searches its learning rate at three values, in runs of a third of
    the steps. Close
relatives take over the rate of the arm that they change: the controls of IBQ that of IBQ as released, so that one part
    alone differs.
Cost: 84 runs of the search and 40 of the comparison, 10,200 steps at quick, since arms take half of the preset's steps:
about 50 minutes on 2 cores at 2 GHz (0.39 s a step) with one seed; --seeds 3 adds 80 runs of the comparison.
Command: python -m experiments run quantizers

Arms of 150 steps at quick want shorter time constants than the literature's, which are counted in steps: 0.9 for moving
averages and for the usage that restarts go by, 25 steps from one replacement of DiVeQ to the next, 15 for each halving
of NS-VQ's kernel, 100 steps for the fall of Gumbel's temperature and of BSQ's weight (half of which a search run sees).

BSQ stands here twice: in LFQ's recipe (temperature 0.01, entropy over all codes, commitment), and in that of its
released code (zhaoyue-zephyrus/bsq-vit): temperature 1, the codebook's entropy a bit at a time, no commitment, and a
weight of 0.1 that falls from three times as much to itself, there over 2,000 steps.

D is the preset's but where a method has its own: 8 for cosine codes (LlamaGen) and for fixed unit vectors, log2 K for
LFQ and BSQ, the number of levels for FSQ.
"""

from __future__ import annotations

from typing import Any

from experiments.ablations import vq_vs_ibq
from experiments.ablations.base import EFFECTIVE_DIMENSIONS, Ablation, Arm, Contrast, Factor, PaperRow
from experiments.ablations.changes import Times, of_quantizer
from experiments.ablations.quantizers.tuning import Tuning

STEP_SHARE, SEARCH_SHARE = 1 / 2, 1 / 3
TUNING = Tuning("optim.lr", factors=(0.3, 1.0, 3.0), step_share=SEARCH_SHARE)
VQ = vq_vs_ibq.fields("VQ", "uniform", "off", "commitment")
IBQ = vq_vs_ibq.fields("IBQ", "normal", "on", "codebook", "on")
FAIR_IBQ = vq_vs_ibq.fields("IBQ", "kmeans", "on", "commitment")
ENTROPY = {"entropy_weight": IBQ["entropy_weight"]}

METHODS: dict[str, dict[str, Any]] = {
    "Euclidean search, straight-through copy": VQ,
    "cosine search in 8 dimensions (LlamaGen)": VQ | {"distance": "cosine", "codebook_init": "normal", "code_dim": 8},
    "codes as moving averages (VQ-VAE-2)": VQ | {"ema_decay": 0.9},  # in steps, of which there are 150
    "restart of dead codes (Jukebox)": VQ
    | {"restart": "dead", "usage_decay": 0.9},  # an unused code is dead after 22 steps, not 230
    "codes drawn to features (CVQ-VAE)": VQ | {"restart": "online"},
    "k-means init and entropy penalty": VQ | {"codebook_init": "kmeans"} | ENTROPY,
    "entropy penalty": VQ | ENTROPY,
    "codes drawn from N(0, 1)": VQ | {"codebook_init": "normal"},
    "rotation trick, features init": VQ | {"gradient": "rotation", "codebook_init": "features"},
    "learnt linear map of learnt codes, features init": VQ
    | {"reparametrization": "linear", "codebook_init": "features"},
    "learnt linear map of frozen codes (SimVQ)": {"method": "simvq", "beta_on": "commitment"},
    "error vector with a gradient to the code (DiVeQ)": {"method": "diveq", "replace_every": 25},
    "points between codes in training (SF-DiVeQ), k-means init": {
        "method": "diveq",
        "curve": True,
        "replace_every": None,
        "codebook_init": "kmeans",
    },
    "codes drawn to the features' Gaussian (Wasserstein VQ)": {"method": "wasserstein"},
    "codes through a small ViT (FVQ / VQBridge)": {"method": "vqbridge", "beta_on": "commitment"},
    "optimal transport of a batch, linear map, k-means init (OptVQ)": {
        "method": "optvq",
        "codebook_init": "kmeans",
        "beta_on": "commitment",
    },
    "codes follow by a kernel of distance (NS-VQ)": {"method": "nsvq", "halving_steps": 15, "beta_on": "commitment"},
    "signs, D = log2 K (LFQ)": {"method": "lfq"},
    "signs on the sphere, D = log2 K (BSQ)": {"method": "bsq"},
    "signs on the sphere, as released (BSQ)": {
        "method": "bsq",
        "entropy_temperature": 1.0,
        "codebook_entropy": "bits",
        "commitment_weight": 0.0,
        "entropy_weight": 0.1,
        "entropy_boost": 3.0,
        "entropy_boost_steps": 100,
    },
    "rounded channels (FSQ)": {"method": "fsq"},
    "rounded channels, bounded by a sigmoid (iFSQ)": {"method": "fsq", "bound": "sigmoid"},
    "channels with noise in place of rounding (FSP)": {"method": "fsq", "bound": "cdf"},
    "nearest of fixed unit vectors in 8 dimensions (spherical)": {
        "method": "spherical",
        "points": "fibonacci",
        "code_dim": 8,
    },
    "VQ in two groups, of the root of K codes each (GSQ)": {"method": "grouped", "groups": 2, "inner": VQ},
    "IBQ in two groups, of the root of K codes each": {"method": "grouped", "groups": 2, "inner": IBQ},
    "Gumbel-softmax, straight-through, T from 1 to 1/16 (DALL-E)": {
        "method": "gumbel",
        "final_temperature": 1 / 16,
        "anneal_steps": 100,
    },
    "Gumbel-softmax without noise, T = 1": {"method": "gumbel", "noise": False},
    "as released": IBQ,
    "k-means init, 0.25 on commitment, no double term": FAIR_IBQ,
    "VQ but for search, logits and gradient": VQ | {"method": "ibq", "double": False},
    "without entropy penalty": IBQ | {"entropy_weight": 0.0},
    "without double term": IBQ | {"double": False},
    "codes drawn from U(-1/K, 1/K)": IBQ | {"codebook_init": "uniform"},
    "0.25 on commitment": IBQ | {"beta_on": "commitment"},
    "soft path to features alone (entropies still reach all codes)": IBQ | {"soft_path": "features"},
    "soft path to codes alone": IBQ | {"soft_path": "codes"},
    "softmax over the 8 best codes": IBQ | {"top_m": 8},
    "logits over 8 (the root of D = 64), entropies as they were": IBQ
    | {"logit_scale": 1 / 8, "entropy_temperature": 0.01 / 8},
    "normalised features and codes, logits ×10": IBQ
    | {"similarity": "cosine", "logit_scale": 10.0},  # at 1 p is all but uniform
}
"""Quantizer fields by what is said of them in tables."""


def arm(name: str, family: str, method: str, *, focal: bool = False, tuned_as: str | None = None) -> Arm:
    changes = {**of_quantizer(METHODS[method]), "steps": Times(STEP_SHARE)}
    return Arm(name, {"family": family, "method": method}, changes, focal=focal, tuned_as=tuned_as)


PLAIN, HELPED, IMPLIED, GUMBEL, OURS, CONTROL = (
    "VQ",
    "VQ with help",
    "no learnt codebook",
    "Gumbel",
    "IBQ",
    "IBQ, a part off",
)

ARMS = (
    arm("vq", PLAIN, "Euclidean search, straight-through copy", focal=True),
    arm("vq_cosine", HELPED, "cosine search in 8 dimensions (LlamaGen)"),
    arm("vq_ema", HELPED, "codes as moving averages (VQ-VAE-2)"),
    arm("vq_restart", HELPED, "restart of dead codes (Jukebox)", focal=True),
    arm("vq_online", HELPED, "codes drawn to features (CVQ-VAE)"),
    arm("vq_best", HELPED, "k-means init and entropy penalty", focal=True),
    arm("vq_entropy", HELPED, "entropy penalty", tuned_as="vq"),
    arm("vq_normal", HELPED, "codes drawn from N(0, 1)", tuned_as="vq"),
    arm("vq_rotation", HELPED, "rotation trick, features init"),
    arm("vq_linear", HELPED, "learnt linear map of learnt codes, features init"),
    arm("simvq", HELPED, "learnt linear map of frozen codes (SimVQ)"),
    arm("diveq", HELPED, "error vector with a gradient to the code (DiVeQ)"),
    arm("diveq_curve", HELPED, "points between codes in training (SF-DiVeQ), k-means init"),
    arm("wasserstein", HELPED, "codes drawn to the features' Gaussian (Wasserstein VQ)"),
    arm("vqbridge", HELPED, "codes through a small ViT (FVQ / VQBridge)"),
    arm("optvq", HELPED, "optimal transport of a batch, linear map, k-means init (OptVQ)"),
    arm("nsvq", HELPED, "codes follow by a kernel of distance (NS-VQ)"),
    arm("grouped_vq", HELPED, "VQ in two groups, of the root of K codes each (GSQ)"),
    arm("grouped_ibq", HELPED, "IBQ in two groups, of the root of K codes each"),
    arm("lfq", IMPLIED, "signs, D = log2 K (LFQ)", focal=True),
    arm("bsq", IMPLIED, "signs on the sphere, D = log2 K (BSQ)"),
    arm("bsq_released", IMPLIED, "signs on the sphere, as released (BSQ)"),
    arm("fsq", IMPLIED, "rounded channels (FSQ)", focal=True),
    arm("ifsq", IMPLIED, "rounded channels, bounded by a sigmoid (iFSQ)"),
    arm("fsp", IMPLIED, "channels with noise in place of rounding (FSP)"),
    arm("spherical", IMPLIED, "nearest of fixed unit vectors in 8 dimensions (spherical)"),
    arm("gumbel", GUMBEL, "Gumbel-softmax, straight-through, T from 1 to 1/16 (DALL-E)"),
    arm("gumbel_noiseless", GUMBEL, "Gumbel-softmax without noise, T = 1"),
    arm("ibq", OURS, "as released", focal=True),
    arm("ibq_fair", OURS, "k-means init, 0.25 on commitment, no double term"),
    arm("ibq_bare", OURS, "VQ but for search, logits and gradient", tuned_as="vq"),
    arm("ibq_no_entropy", CONTROL, "without entropy penalty", tuned_as="ibq"),
    arm("ibq_single", CONTROL, "without double term", tuned_as="ibq"),
    arm("ibq_uniform", CONTROL, "codes drawn from U(-1/K, 1/K)", tuned_as="ibq"),
    arm("ibq_commitment", CONTROL, "0.25 on commitment", tuned_as="ibq"),
    arm("ibq_features_path", CONTROL, "soft path to features alone (entropies still reach all codes)", tuned_as="ibq"),
    arm("ibq_codes_path", CONTROL, "soft path to codes alone", tuned_as="ibq"),
    arm("ibq_top_8", CONTROL, "softmax over the 8 best codes", tuned_as="ibq"),
    arm("ibq_scaled", CONTROL, "logits over 8 (the root of D = 64), entropies as they were", tuned_as="ibq"),
    arm("ibq_normalised", CONTROL, "normalised features and codes, logits ×10", tuned_as="ibq"),
)

ABLATION = Ablation(
    name="quantizers",
    title="Every quantizer on its best foot",
    notebook="07_quantizers",
    question="With equal bits a token and an equal tuning budget, what does IBQ have over its rivals, and which of its "
    "parts does it need?",
    factors=(
        Factor(
            "family",
            (PLAIN, HELPED, IMPLIED, GUMBEL, OURS, CONTROL),
            "VQ as it is or with one remedy; grids that need no codebook; sampling; IBQ; IBQ as released with one part "
            "changed",
        ),
        Factor("method", tuple(METHODS), "what sets the arm apart from the first of its family"),
    ),
    arms=ARMS,
    contrasts=(
        Contrast(
            "usage",
            "vq",
            "ibq",
            "Each at its best rate, IBQ as released uses at least twice the codes of plain VQ.",
            "bits",
            1.0,
        ),
        Contrast(
            "quality",
            "vq_best",
            "ibq",
            "Each at its best rate, IBQ as released reconstructs better than VQ with k-means and entropy penalty, by "
            "at least 0.003 of L1.",
            "l1",
            -0.003,
        ),
        Contrast(
            "estimator",
            "vq_best",
            "ibq_fair",
            "Each at its best rate, and alike but for the estimator, IBQ reconstructs better than that VQ, by at least "
            "0.003 of L1.",
            "l1",
            -0.003,
        ),
    ),
    adaptive=TUNING,
    figures=(
        "usage_over_training",
        "usage_of_each",
        "dimension_over_training",
        "dimension_of_each",
        "search",
        "rate_distortion",
        "reconstructions",
        "code_map",
    ),
    tables=("verdicts", "search", "parts", "arms", "paper"),
    columns=(
        "code_dim",
        "learning_rate",
        "perplexity",
        "usage",
        *EFFECTIVE_DIMENSIONS,
        "bits",
        "psnr_db",
        "l1",
        "fid",
        "quantization_error",
        "step_ms",
        "parameters",
        "peak_memory",
    ),
    paper_source="Table 1 (ImageNet 256x256, 50k validation images; recipes and lengths differ)",
    paper_rows=(
        PaperRow("VQGAN, K = 1,024, D = 256", {"rFID": 7.94, "usage %": 44.0}, "vq"),
        PaperRow("VQGAN, K = 16,384, D = 256", {"rFID": 4.98, "usage %": 5.9}, "vq"),
        PaperRow("LlamaGen, K = 16,384, D = 8", {"rFID": 2.19, "usage %": 97.0}, "vq_cosine"),
        PaperRow("LlamaGen, K = 16,384, D = 256", {"rFID": 9.21, "usage %": 0.29}),
        PaperRow("Open-MAGVIT2 (LFQ), K = 262,144, D = 18", {"rFID": 1.17, "usage %": 100.0}, "lfq"),
        PaperRow("IBQ, K = 1,024, D = 256", {"rFID": 2.24, "usage %": 99.0}, "ibq"),
        PaperRow("IBQ, K = 16,384, D = 256", {"rFID": 1.37, "usage %": 96.0}, "ibq"),
    ),
)
