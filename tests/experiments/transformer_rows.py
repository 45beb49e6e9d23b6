"""Runs of the ablation of transformers that nobody trained: rows, histories and samples that say what a test wants them
to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from experiments.ablations import ABLATIONS
from experiments.cells import Cell
from experiments.study import Study
from ibq.run_directory import append_line, write_json, write_tensors
from ibq.schema import flatten

ABLATION = ABLATIONS["generation"]
GUIDANCES = (1.0, 2.0, 3.0)
NOT_AT_SMOKE = {"guidance_sweep"}
"""Figures of distances, of which the 16 images of a smoke run are too few."""
QUALITY: Mapping[str, tuple[float, float, float]] = {
    "vq_tokens": (100.0, 40.0, 0.2),
    "vq_features_tokens": (330.0, 10.0, 0.1),
    "ibq_deep": (325.0, 6.0, 0.095),
    "lfq_halves": (365.0, 12.0, 0.11),
    "ibq_tokens": (340.0, 8.0, 0.095),
    "lfq_tokens": (360.0, 15.0, 0.11),
    "ibq_shallow": (350.0, 11.0, 0.095),
}
"""Bits an image, lowest FID[fashion-cnn] and the tokenizer's L1 of each arm."""


def study(seeds: int | None = None) -> Study:
    return Study("quick", (ABLATION.name,), seeds)


def arms(of: Study) -> list[Cell]:
    """Those that are ready and those that wait for a tokenizer, which nobody trained."""
    return [cell for cell in of.cells + of.waiting if cell.is_arm]


def known(
    lost: tuple[str, ...] = (), pending: tuple[str, ...] = (), seeds: int | None = None, best: float = 2.0
) -> Study:
    """A study all of whose arms are finished but for the named ones."""
    for cell in arms(study(seeds)):
        if cell.arm.name not in pending:
            lose(cell) if cell.arm.name in lost else finish(cell, best)
    return study(seeds)


def finish(cell: Cell, best: float = 2.0) -> None:
    """Write a finished run whose FID[fashion-cnn] is lowest at the guidance `best`; its kept samples are as bright as
    their class and their guidance say."""
    bits, fid, l1 = QUALITY[cell.arm.name]
    row = _facts(cell) | {
        "status": "ok",
        "cross_entropy": bits * math.log(2) / 64,
        "bits_per_image": bits,
        "uniform_bits_per_image": 640.0,
    }
    row |= {"sample_images_per_s": 10.0, "guidance": best}
    for g in GUIDANCES:
        at = {
            "fid": fid * (1 + abs(g - best)),
            "is": 5 + g,
            "precision": 0.5 + g / 10,
            "recall": 0.6 - g / 10,
            "label_agreement": 0.7,
        }
        row |= {f"{name}[fashion-cnn]@{g:g}": value for name, value in at.items()}
        row |= {f"{name}[fashion-cnn]": value for name, value in at.items()} if g == best else {}
    row |= {f"config.{name}": value for name, value in flatten(cell.config.identity()).items()}
    row |= {"protocol.split": "test", "protocol.n_images": 2000, "protocol.weights": "raw", "protocol.samples": 1000}
    row |= {"protocol.guidances": "1, 2, 3", "protocol.sampling": f"temperature 1, no truncation, seed {cell.seed}"}
    write_json(cell.run.tokenizer_row, {"run": "tokenizer", "l1": l1, "perplexity": 500.0, "fid[fashion-cnn]": fid / 2})
    for step in (10, 20):
        append_line(cell.run.history, {"step": step, "loss": 7 - step / 10, "seconds": float(step)})
    shown_N = torch.arange(5, 27)
    classes_N = torch.arange(40) % 10
    pictures = {
        f"images@{g:g}": (10 * classes_N[shown_N] + g)
        .to(torch.uint8)[:, None, None, None]
        .expand(-1, 1, 32, 32)
        .contiguous()
        for g in GUIDANCES
    }
    write_tensors(
        cell.run.path / "eval" / "samples.safetensors", {"classes_N": classes_N, "shown_N": shown_N} | pictures
    )
    write_json(cell.run.row, row)


def lose(cell: Cell) -> None:
    """Write the row of a run that did not stay finite."""
    write_json(cell.run.row, _facts(cell) | {"status": "nan", "reason": "loss is nan at step 4"})


def _facts(cell: Cell) -> dict[str, object]:
    depth = cell.config.model.depth  # type: ignore[union-attr]
    numbers = {
        "seed": cell.seed,
        "parameters": 250_000 * depth**2,
        "depth": depth,
        "train_seconds": 60.0,
        "peak_memory_gib": 0.5,
    }
    names = {"method": cell.config.quantizer.method, "device": "a CPU", "torch": "2", "python": "3", "commit": "abc"}
    sizes = {
        "codebook_size": 1024,
        "code_dim": cell.config.quantizer.code_dim,
        "cores": 2,
        "threads": 1,
        "results_version": 1,
    }
    return {"run": cell.run.path.name, **names, **sizes, **numbers}
