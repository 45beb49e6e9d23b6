"""One cell of the benchmark of sampling, in a process of its own: python -m experiments.benchmarks.sampling_cell CELL,
CELL as JSON.

Prints one JSON line: images a second without a cache, with one and, on CUDA, compiled, and the most that the device's
    memory would allow.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.benchmarks import measure
from ibq.distributed import resolve_device
from ibq.models.config import SIZES, TransformerConfig
from ibq.models.transformer import Transformer
from ibq.sampling import Guidance, Sampler, Sampling, sample_uncached

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLASSES = 10
REPEATS = 3
"""Timed repeats with a cache."""


def measure_sampling(cell: dict[str, Any]) -> dict[str, Any]:
    """Images a second in each mode, after a batch of other samples to warm up, and of how many samples all tokens are
    equal."""
    device = resolve_device(cell["device"])
    transformer = random_transformer(cell).to(device, DTYPES[cell["precision"]])
    sampling, batch = Sampling(guidance=Guidance(cell["guidance"])), cell["batch"]
    numbers_B = torch.arange(batch)
    classes_B = numbers_B % CLASSES

    def uncached(first: int) -> torch.Tensor:
        return sample_uncached(transformer, sampling, seed=0, numbers_B=numbers_B + first, classes_B=classes_B)

    def cached(compiled: bool) -> Callable[[int], torch.Tensor]:
        sampler = Sampler(transformer, sampling, seed=0, batch_size=batch, compile=compiled)
        return lambda first: sampler(numbers_B + first, classes_B)

    tokens_BN, seconds = _timed(cached(compiled=False), device, REPEATS)
    uncached_BN, uncached_seconds = _timed(uncached, device, 1)
    rates = {"uncached_images_per_second": batch / uncached_seconds, "cached_images_per_second": batch / seconds}
    if device.type == "cuda":
        _, compiled_seconds = _timed(cached(compiled=True), device, REPEATS)
        rates["compiled_images_per_second"] = batch / compiled_seconds
    sequences = batch * (1 + sampling.guided)
    bandwidth = copy_rate(device, 2**20 if cell["size"] == "XXS" else 2**30 if device.type == "cuda" else 2**28)
    floor = bytes_of_a_batch(transformer, sequences) / bandwidth
    equal = int((tokens_BN == uncached_BN).all(1).sum())
    sizes = {"parameters": sum(parameter.numel() for parameter in transformer.parameters()), "equal_samples": equal}
    return {"status": "ok", "bytes_per_second": bandwidth, "floor_images_per_second": batch / floor} | rates | sizes


def random_transformer(cell: dict[str, Any]) -> Transformer:
    """With weights at which class, position and all tokens before count, as after training; they cost what any weights
    cost."""
    config = TransformerConfig(
        depth=SIZES[cell["size"]], codebook_size=cell["K"], classes=CLASSES, grid=math.isqrt(cell["tokens"])
    )
    torch.manual_seed(0)
    transformer = Transformer(config).requires_grad_(False)
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if isinstance(module, nn.Embedding) else module.in_features**-0.5)
    return transformer


def bytes_of_a_batch(transformer: Transformer, sequences: int) -> float:
    """Bytes that all steps of a batch must read at least: every weight of blocks and head but AdaLN's, which are needed
    once, and the keys and values up to each position."""
    config = transformer.config
    read = [
        p
        for name, p in transformer.named_parameters()
        if not any(part in name for part in ("tok_emb", "class_emb", "ada_lin"))
    ]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in read)
    position = 2 * config.depth * config.width * read[0].element_size() * sequences
    return config.tokens * (weights + position * (config.tokens + 1) / 2)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second, read and written ones together, of copying `size` bytes here; the median of seven."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        target.copy_(source)
        measure.wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size / statistics.median(seconds[1:])


def _timed(sample: Callable[[int], torch.Tensor], device: torch.device, repeats: int) -> tuple[torch.Tensor, float]:
    """Tokens of the samples from number 0 on, and the median of the seconds that they took."""
    sample(1000)
    seconds = []
    for _ in range(repeats):
        measure.wait_for(device)
        started = time.perf_counter()
        tokens_BN = sample(0)
        measure.wait_for(device)
        seconds.append(time.perf_counter() - started)
    return tokens_BN, statistics.median(seconds)


if __name__ == "__main__":
    print(json.dumps(measure_sampling(json.loads(sys.argv[1]))))
