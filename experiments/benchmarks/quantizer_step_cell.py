"""One cell of the benchmark of quantizers, in a process of its own: python -m
experiments.benchmarks.quantizer_step_cell CELL, CELL as JSON.

Prints one JSON line: time and peak memory of a training step of one quantizer and of VQ, taken in turns.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.ablations import ABLATIONS
from experiments.ablations.changes import CODEBOOK_SIZE, tokenizer_config
from experiments.benchmarks import measure
from experiments.recipes import PRESETS
from ibq.distributed import resolve_device
from ibq.losses import weighted_sum
from ibq.quantizers import Quantizer, build_quantizer

REPEATS = 7
"""Timed pairs of steps, after one to warm up."""
PAGE = 4096
"""Bytes; less is not seen on a CPU."""


def measure_step(cell: dict[str, Any]) -> dict[str, Any]:
    """Medians of seconds, of a method, of VQ and of their ratio, and peak GiB of the method above what stands still."""
    device = resolve_device(cell["device"])
    if device.type != "cuda":
        measure.limit_memory()
    torch.manual_seed(0)
    small = cell | {"K": 64, "N": 64}
    _step(_quantizer(small, cell["arm"]).to(device), small, device)(0)  # loads the libraries
    steps = {"mine": _step(_quantizer(cell, cell["arm"]).to(device), cell, device)}
    before = measure.start_peak(device)
    steps["mine"](0)
    peak = max(PAGE, measure.peak_bytes(device) - before)
    steps["vq"] = _step(_quantizer(cell, "vq").to(device), cell, device)
    steps["vq"](0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(REPEATS):
        for name, step in steps.items():
            started = time.perf_counter()
            step(i + 1)
            measure.wait_for(device)
            seconds[name].append(time.perf_counter() - started)
    return {
        "status": "ok",
        "seconds": statistics.median(seconds["mine"]),
        "vq_seconds": statistics.median(seconds["vq"]),
        "times_vq": statistics.median([a / b for a, b in zip(seconds["mine"], seconds["vq"], strict=True)]),
        "peak_gib": peak / 2**30,
    }


def _quantizer(cell: dict[str, Any], arm: str) -> Quantizer:
    """The arm's quantizer at the cell's sizes, as if its codes had begun as features."""
    preset, changes = PRESETS["quick"], ABLATIONS["quantizers"].arm(arm).changes
    config = tokenizer_config(preset, changes, {CODEBOOK_SIZE: cell["K"]})
    quantizer = build_quantizer(config.quantizer).train()
    if quantizer.features_to_cluster:
        features_MD = torch.randn(config.quantizer.codebook_size, config.quantizer.code_dim)
        quantizer.cluster(features_MD, torch.Generator().manual_seed(0))
    return quantizer


def _step(quantizer: Quantizer, cell: dict[str, Any], device: torch.device) -> Callable[[int], None]:
    """Forward, backward and Adam step on N fresh features."""
    parameters = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True) if parameters else None
    shape = (cell["N"] // 64, quantizer.config.code_dim, 8, 8)

    def step(number: int) -> None:
        quantizer.set_step(number)
        z_BDHW = torch.randn(shape, device=device, requires_grad=True)
        z_q_BDHW, _, losses = quantizer(z_BDHW)
        loss = z_q_BDHW.square().mean() + weighted_sum(losses, quantizer.config.loss_weights)
        loss.backward()
        if adam is not None:
            adam.step()
            adam.zero_grad()

    return step


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        print(json.dumps(measure_step(given)))
    except RuntimeError as error:
        if not measure.is_out_of_memory(error):
            raise
        print(json.dumps({"status": "does not fit"}))
