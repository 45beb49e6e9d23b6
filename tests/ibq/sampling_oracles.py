"""Small transformers with random weights that make classes, positions and tokens count, in float64."""

from __future__ import annotations

import itertools
import math

import torch

from ibq.models.config import TransformerConfig
from ibq.models.transformer import Transformer
from ibq.models.transformer.subtokens import split
from ibq.sampling import Sampling


def network(
    codes: int = 11, grid: int = 3, classes: int = 3, depth: int = 2, subtoken_bits: tuple[int, ...] = (), seed: int = 0
) -> Transformer:
    """In training mode, so that whoever samples has to see to that."""
    config = TransformerConfig(
        codebook_size=codes, grid=grid, classes=classes, depth=depth, subtoken_bits=subtoken_bits
    )
    transformer, generator = Transformer(config).double(), torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        std = 1.0 if "emb" in name or name.startswith("head.positions") else 1.5 / math.sqrt(parameter.shape[-1])
        torch.nn.init.normal_(parameter.data, std=std, generator=generator)
        if name.endswith(("norm.weight", "rmsnorm.weight")):
            torch.nn.init.ones_(parameter.data)
    return transformer.requires_grad_(False)


def reference_probabilities(logits: list[float], sampling: Sampling) -> list[float]:
    """The module's order of temperature, top-k, top-p and min-p, one symbol after the other."""
    K = len(logits)
    if sampling.temperature == 0:
        return [float(k == logits.index(max(logits))) for k in range(K)]
    weights = [math.exp(logit / sampling.temperature) for logit in logits]
    ranked = sorted(range(K), key=lambda k: (-weights[k], k))[: sampling.top_k]
    whole, kept, reached = sum(weights[k] for k in ranked), [], 0.0
    for k in ranked:
        if sampling.top_p == 1 or reached < sampling.top_p:
            kept.append(k)
        reached += weights[k] / whole
    kept = [k for k in kept if weights[k] >= sampling.min_p * weights[ranked[0]]]
    total = sum(weights[k] for k in kept)
    return [weights[k] / total if k in kept else 0.0 for k in range(K)]


def all_images(transformer: Transformer) -> torch.Tensor:
    """Every sequence of tokens (K**N, N)."""
    config = transformer.config
    return torch.tensor(list(itertools.product(range(config.codebook_size), repeat=config.tokens)))


def exact_probabilities(transformer: Transformer, label: int, sampling: Sampling) -> torch.Tensor:
    """Of every sequence of `all_images`, from full forward passes and `reference_probabilities`."""
    transformer.eval()
    images_MN = all_images(transformer)
    symbols_MNJ = split(images_MN, transformer.symbols)
    M, N, J = symbols_MNJ.shape
    hidden_2MNW = [
        transformer.hidden(images_MN[:, :-1], torch.full((M,), c)) for c in (label, transformer.config.classes)
    ]
    p_M = torch.ones(M, dtype=torch.float64)
    for step, j in itertools.product(range(N), range(J)):
        conditional_MK, unconditional_MK = (
            transformer.symbol_logits(hidden_MNW[:, step], symbols_MNJ[:, step, :j]) for hidden_MNW in hidden_2MNW
        )
        guided_MK = unconditional_MK + sampling.guidance.at(step, N) * (conditional_MK - unconditional_MK)
        known: dict[tuple[float, ...], list[float]] = {}
        for m, logits in enumerate(map(tuple, guided_MK.tolist())):
            if logits not in known:
                known[logits] = reference_probabilities(list(logits), sampling)
            p_M[m] *= known[logits][symbols_MNJ[m, step, j]]
    return p_M
