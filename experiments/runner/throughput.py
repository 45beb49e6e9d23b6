"""Seconds of a step of each stage: measured on the finished runs of a study, else the preset's reference."""

from __future__ import annotations

from typing import NamedTuple

from experiments.cells import Cell, Stage, unique_runs
from experiments.recipes import Preset
from experiments.study import Study
from ibq.config import TrainConfig
from ibq.models.config import TransformerDials
from ibq.run_directory import RunDirectory


class StepCost(NamedTuple):
    """Seconds of a step, None where nothing was measured, and what was measured. A tokenizer's step is any arm's; a
    transformer's is one of the preset's size, with its share of encoding and evaluation."""

    seconds: float | None
    basis: str


def step_cost(study: Study, stage: Stage) -> StepCost:
    finished = [cell for cell in unique_runs(study.cells) if cell.stage == stage and cell.run.finished]
    measured = [cell for cell in finished if cell.run.read_row()["status"] == "ok"]
    if not measured:
        preset = study.preset
        return StepCost(
            preset.transformer_seconds_per_step if stage == "transformer" else preset.seconds_per_step,
            preset.measured_on,
        )
    basis = f"{len(measured)} finished runs"
    if stage == "transformer":
        return StepCost(
            sum(seconds_spent(cell.run) for cell in measured) / sum(work(cell, study.preset) for cell in measured),
            basis,
        )
    return StepCost(
        sum(cell.run.read_row()["train_seconds"] / cell.config.steps for cell in measured) / len(measured), basis
    )


def work(cell: Cell, preset: Preset) -> float:
    """A run's steps; those of a transformer counted in steps of the preset's size on the tokens of its tokenizer."""
    config = cell.config
    if isinstance(config, TrainConfig):
        return config.steps
    K, usual = config.quantizer.codebook_size, TransformerDials(**preset.transformer["model"])
    products = config.batch_size * config.tokens_per_image * _products(config.model, K)
    return (
        config.steps
        * products
        / (preset.transformer["batch_size"] * config.tokenizer.tokens_per_image * _products(usual, K))
    )


def seconds_spent(run: RunDirectory) -> float:
    """From the start to the end of each attempt at a run, whatever it did in between."""
    seconds, started = 0.0, None
    for attempt in run.read_attempts():
        if attempt["event"] == "started":
            started = attempt["time"]
        elif started is not None and "time" in attempt:
            seconds, started = seconds + attempt["time"] - started, None
    return seconds


def _products(dials: TransformerDials, codebook_size: int) -> int:
    """Multiplications of a token's forward pass, without those of attention among tokens and of the classes'
    modulation."""
    block = 4 * dials.width**2 + 3 * dials.width * dials.ffn_width
    return dials.depth * block + dials.width * codebook_size
