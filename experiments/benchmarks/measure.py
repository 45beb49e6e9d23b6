"""One cell of the benchmark of index backpropagation, in a process of its own: python -m experiments.benchmarks.measure
CELL, CELL as JSON.

Prints one JSON line: the median time of a forward and backward pass, its peak memory above the inputs, or that it does
    not fit.
Suffixes: N tokens, K codes, D code dimension, B images of L tokens.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ibq.distributed import resolve_device
from ibq.errors import ConfigError
from ibq.ops import index_backprop
from ibq.schema import Backend

TOKENS_PER_IMAGE = 256
"""16 x 16, as in the paper's images."""

REPEATS = ((1.0, 7), (10.0, 3), (float("inf"), 1))
"""Repeats of a pass of up to so many seconds, after the first, which warms up and is measured for memory."""


def released(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The released formulation (docs/method.md sections 3 and 4), in whatever precision autocast gives.

    (B, K, L) tensors of images of 256 tokens, one-hot products for z_q and for the selected code, a softmax over K and
    one at tau over rearranged rows. Returns the sum of both products (N, D), and the entropy penalty.
    """
    N, D = z_ND.shape
    z_BDL = z_ND.reshape(-1, TOKENS_PER_IMAGE if N % TOKENS_PER_IMAGE == 0 else N, D).mT
    logits_BKL = torch.einsum("bdl,kd->bkl", z_BDL, codebook_KD)
    p_BKL = logits_BKL.softmax(1)
    onehot_BKL = torch.zeros_like(p_BKL).scatter_(1, p_BKL.argmax(1, keepdim=True), 1.0)
    z_q_BDL = torch.einsum("bkl,kd->bdl", onehot_BKL - p_BKL.detach() + p_BKL, codebook_KD)
    selected_BDL = torch.einsum("bkl,kd->bdl", onehot_BKL, codebook_KD)
    penalty = z_ND.new_zeros(())
    if temperature is not None:
        scaled_NK = logits_BKL.mT.reshape(N, -1) / temperature
        p_NK = scaled_NK.softmax(1)
        mean_K = p_NK.mean(0)
        penalty = -(p_NK * F.log_softmax(scaled_NK, 1)).sum(1).mean() + (mean_K * (mean_K + 1e-5).log()).sum()
    return (z_q_BDL + selected_BDL).mT.reshape(N, D), penalty


def operator(
    backend: Backend,
    matmul_dtype: torch.dtype,
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    temperature: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by `ibq.index_backprop`."""
    z_q_ND, indices_N, sample_entropy, codebook_entropy = index_backprop(
        z_ND, codebook_KD, entropy_temperature=temperature, backend=backend, matmul_dtype=matmul_dtype
    )
    if sample_entropy is None or codebook_entropy is None:
        return z_q_ND + codebook_KD[indices_N], z_ND.new_zeros(())
    return z_q_ND + codebook_KD[indices_N], sample_entropy - codebook_entropy


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds (median, fastest, slowest, how many) and peak GiB above the inputs of one cell, or status 'does not
    fit'."""
    device, dtype = resolve_device(cell["device"]), getattr(torch, cell["dtype"])
    if device.type != "cuda":
        if not Path("/proc/self/clear_refs").exists():
            raise ConfigError(
                "memory on a CPU is read from Linux's /proc, which this system lacks; measure on Linux or on CUDA"
            )
        limit_memory()
    torch.manual_seed(0)
    method = released if cell["method"] == "released" else partial(operator, cell["method"], dtype)
    temperature = 0.01 if cell["entropy"] else None

    def step(z_ND: torch.Tensor, codebook_KD: torch.Tensor, g_ND: torch.Tensor) -> float:
        for tensor in (z_ND, codebook_KD, g_ND):
            tensor.data.normal_(0, 0.3)  # fresh, outside the clock
        wait_for(device)
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            z_q_ND, penalty = method(z_ND, codebook_KD, temperature)
        torch.autograd.grad((z_q_ND.float() * g_ND).sum() + 0.05 * penalty, (z_ND, codebook_KD))
        wait_for(device)
        return time.perf_counter() - started

    def inputs(N: int, K: int) -> tuple[torch.Tensor, ...]:
        z_ND, codebook_KD, g_ND = (torch.randn(rows, cell["D"], device=device).mul_(0.3) for rows in (N, K, N))
        return z_ND.requires_grad_(), codebook_KD.requires_grad_(), g_ND

    step(*inputs(2, 2))  # loads the libraries
    tensors = inputs(cell["N"], cell["K"])
    try:
        before = start_peak(device)
        first = step(*tensors)
        peak = peak_bytes(device) - before
        first = step(*tensors) if device.type == "cuda" else first  # that one held the compilation of kernels
        seconds = [step(*tensors) for _ in range(next(repeats for limit, repeats in REPEATS if first <= limit))]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "does not fit"}
    spread = {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "timed": len(seconds),
    }
    return {"status": "ok", "peak_gib": peak / 2**30} | spread


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product here, the median of seven: what any formulation is measured against."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:]) / 1e12


def is_out_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("out of memory", "allocate memory", "ALLOC_FAILED"))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limit_memory() -> None:
    """Let an allocation beyond the free memory fail instead of waking the system's out-of-memory killer."""
    limit = int(_status("/proc/meminfo", "MemAvailable") * 0.9) + int(_status("/proc/self/status", "VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def start_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    return _status("/proc/self/status", "VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("/proc/self/status", "VmHWM")


def _status(file: str, name: str) -> int:
    """Bytes that the kernel states under a name."""
    return next(
        int(line.split()[1]) * 1024 for line in Path(file).read_text().splitlines() if line.startswith(name + ":")
    )


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "method" in given:
        print(json.dumps(measure(given)))
    else:
        print(
            json.dumps({"matrix_tflops": matrix_rate(resolve_device(given["device"]), getattr(torch, given["dtype"]))})
        )
