"""An ablation of three transformers, two of which share their tokenizer, and what is said of its runs."""

from __future__ import annotations

from dataclasses import replace

from experiments.ablations import ABLATIONS, Arm, Factor
from experiments.cells import Cell
from ibq.run_directory import write_json

PAIR = ABLATIONS["vq_vs_ibq"]
TIMING = {"train_seconds", "encode_seconds", "peak_memory_gib", "sample_images_per_s"}


def arm(name: str, of: str, depth: int, **more: object) -> Arm:
    levels = {**PAIR.arm(of).levels, "depth": str(depth)}
    return Arm(name, levels, PAIR.arm(of).changes, {"model.depth": depth}, **more)  # type: ignore[arg-type]


TOY = replace(
    PAIR,
    name="toy",
    notebook=None,
    factors=(*PAIR.factors, Factor("depth", ("1", "2"), "of the transformer")),
    arms=(
        arm("vq", "vq_published", 1),
        arm("ibq", "ibq_published", 1, focal=True),
        arm("ibq_deep", "ibq_published", 2),
    ),
    contrasts=(),
    paper_rows=(),
    figures=(),
    tables=("arms",),
    columns=("train_seconds", "parameters"),
)


def pretend(cell: Cell, status: str = "ok", **facts: object) -> None:
    """A finished run of a tokenizer."""
    cell.run.path.mkdir(parents=True)
    write_json(cell.run.row, {"run": cell.run.path.name, "status": status, "train_seconds": 0.5, **facts})


def names(cells: list[Cell]) -> list[str]:
    return [f"{cell.arm.name} {cell.seed}" for cell in cells]
