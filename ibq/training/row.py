"""Row of a run: facts of training, provenance, metrics, protocol and config fields, written last and atomically."""

from __future__ import annotations

import os
import platform
import resource
from typing import Any

import torch

from ibq.config import RESULTS_VERSION, RunConfig
from ibq.distributed import barrier, device_name, gather_objects, is_writer, world_size
from ibq.errors import NonFiniteElsewhereError, NonFiniteError
from ibq.run_directory import RunDirectory, source_commit, write_json
from ibq.schema import flatten


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: of the device or, on a CPU, of the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cause(origin: str, error: Exception) -> str:
    """Reason why a step is refused, as the process says where it began; a collective, as all refuse a step together."""
    *_, reason = max(
        gather_objects((bool(origin), not isinstance(error, NonFiniteElsewhereError), f"{origin}{error}")),
        key=lambda said: said[:2],
    )
    return reason


def write_lost(run: RunDirectory, row: dict[str, Any]) -> NonFiniteError:
    """Write the row, with its `reason`, of a run that did not stay finite; returns what to raise, which all processes
    do (a collective)."""
    if is_writer():
        write_json(run.row, row)
    barrier()  # whoever ends before the row is whole could have all processes ended
    return NonFiniteError(row["reason"])


def row_of(
    config: RunConfig, status: str, facts: dict[str, Any], protocol: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """A row, flat: what was trained, where and with which code, facts and metrics, protocol, config fields.

    Args:
        facts: `data_hash`, what training cost, and the metrics.
        protocol: what the metrics belong to.
    """
    provenance = {
        "run": config.run_id(facts["data_hash"]),
        "status": status,
        "method": config.quantizer.method,
        "codebook_size": config.quantizer.codebook_size,
        "code_dim": config.quantizer.code_dim,
        "seed": config.seed,
        "device": device_name(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": source_commit(),
        "results_version": RESULTS_VERSION,
    }
    fields = {f"config.{name}": value for name, value in flatten(config.identity()).items()}
    return provenance | facts | {f"protocol.{name}": value for name, value in protocol.items()} | fields
