"""Can the objective be driven down at all? Sixteen photo crops of 64×64, trained to more than 30 dB with every term but
LPIPS.

L1, the quantization and entropy terms of IBQ as released, and a PatchGAN of weight 0.1 with LeCam from the first step,
by the real trainer on a folder of sixteen pictures that are both its training and its test split. The learning curve of
PSNR comes from stopping the run every so many steps, as a user would, reconstructing all sixteen with the averaged
weights of the checkpoint, and going on from it.
Command: python -m experiments bench overfit   (2 CPU cores: about 10 minutes)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from experiments.benchmarks import cells
from experiments.report import figures
from ibq.config import DataConfig, TrainConfig
from ibq.data import load_images
from ibq.distributed import resolve_device
from ibq.evaluation.tokenizer import evaluate
from ibq.metrics import METRICS
from ibq.metrics.distances import to_uint8
from ibq.models.tokenizer import Tokenizer, load_tokenizer
from ibq.run_directory import RunDirectory, append_line, read_lines, write_tensors
from ibq.training.checkpoint import load_checkpoint, part_of
from ibq.training.runtime import Runtime, StopRequested
from ibq.training.tokenizer import train_tokenizer

NAME = "overfit"
CROPS, SIDE = 16, 64
WANTED_DB, POINTS = 30.0, 20
MEASURED = ("psnr_db", "l1", "perplexity")
PICTURES = "pictures.safetensors"

CAPTION = (
    "Sixteen photo crops of 64×64 overfitted with L1, IBQ's quantization and entropy terms and a PatchGAN with LeCam: "
    "PSNR of all sixteen "
    "under the averaged weights, seconds of training and the most memory that the process has needed so far."
)


def config_of(folder: Path, small: bool = False) -> TrainConfig:
    """The whole objective but for the perceptual term; `small`: a few steps of a tiny network, to try the benchmark
    itself."""
    fields: dict[str, Any] = {
        "data": {"name": f"imagefolder:{folder}", "resolution": SIDE},
        "model": {"base_channels": 16, "channel_multipliers": [1, 2, 4], "norm_groups": 8, "z_channels": 64},
        "quantizer": {"method": "ibq", "codebook_size": 1024, "code_dim": 64},
        "loss": {"adversarial": {"weight": 0.1, "channels": 16, "layers": 2}},
        "optim": {"lr": 2e-3, "milestones": [0.7, 0.9], "ema_decay": 0.98},
        "steps": 3000,
        "batch_size": 4,
    }
    if small:
        fields |= {
            "model": {"base_channels": 4, "channel_multipliers": [1, 1, 2], "norm_groups": 4, "z_channels": 8},
            "steps": 6,
        }
        fields["quantizer"] = {"method": "ibq", "codebook_size": 32, "code_dim": 8}
    return TrainConfig.parse(fields)


def run(device_name: str = "auto", small: bool = False, say: Callable[[str], None] = print) -> pd.DataFrame:
    """Train, or go on, and return a row for every point of the curve; the pictures come into the report's folder.

    Raises:
        ConfigError: an unknown device. DataError: the photos are not installed.
    """
    device = resolve_device(device_name)
    folder = cells.folder(NAME, device, "overfit.py", "ibq") / ("small" if small else "full")
    write_crops(folder / "crops")
    config, trained = config_of(folder / "crops", small), RunDirectory(folder / "run")
    runtime = Runtime(
        device=device_name,
        log_every=max(1, config.steps // 100),
        snapshots=0,
        checkpoint_every_s=1e9,
        eval_images=CROPS,
    )
    points = POINTS if not small else 3
    curve = read_lines(folder / "curve.jsonl")
    for step in [config.steps * point // points for point in range(1, points)][len(curve) :]:
        if trained.finished:  # a kill came between the row and the last point
            break
        append_line(folder / "curve.jsonl", measured_at(step, config, trained, runtime))
        curve = read_lines(folder / "curve.jsonl")
        say(f"step {curve[-1]['step']} of {config.steps}: {curve[-1]['psnr_db']:.2f} dB, {curve[-1]['seconds']:.0f} s")
    for _ in train_tokenizer(config, trained.path, runtime):
        pass
    row = trained.read_row()
    end = {"step": config.steps, "seconds": row["train_seconds"]} | {name: row[name] for name in MEASURED}
    say(
        f"step {config.steps} of {config.steps}: {end['psnr_db']:.2f} dB, {end['seconds']:.0f} s; wanted: over "
        f"{WANTED_DB:g} dB"
    )
    write_tensors(cells.report_folder(NAME) / PICTURES, pictures(load_tokenizer(trained.path), config))
    facts = {
        "peak_gib": row["peak_memory_gib"],
        "parameters": row["parameters"],
        "codebook_size": row["codebook_size"],
        "small": small,
    }
    return pd.DataFrame([*curve, end]).assign(**facts, **cells.facts(device))


def write_crops(folder: Path) -> None:
    """Sixteen crops spread over the test regions of the photos, as PNG; train/ and test/ hold the same."""
    photos = load_images(DataConfig(name="photos", resolution=SIDE), "test")
    chosen_N = torch.linspace(0, len(photos) - 1, CROPS).round().long()
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i, crop_CHW in enumerate(photos.pixels(chosen_N)):
            Image.fromarray(crop_CHW.permute(1, 2, 0).numpy()).save(folder / split / f"{i:02d}.png")


def measured_at(step: int, config: TrainConfig, run: RunDirectory, runtime: Runtime) -> dict[str, Any]:
    """Train to a step, stop resumably, and measure the averaged weights of the checkpoint on all crops."""
    before, _ = load_checkpoint(run.checkpoint)
    questions = itertools.count(before.meta["step"] if before else 0)
    with suppress(StopRequested):
        for _ in train_tokenizer(config, run.path, runtime, lambda: next(questions) >= step):
            pass
    checkpoint, _ = load_checkpoint(run.checkpoint)
    assert checkpoint is not None
    tokenizer = Tokenizer(config)
    tokenizer.load_state_dict(part_of(checkpoint.tensors, "average.module."))
    metrics, *_ = evaluate(tokenizer, load_images(config.data, "test"), CROPS, CROPS, weights="ema")
    meta = {name: checkpoint.meta[name] for name in ("step", "seconds")}
    return meta | {name: metrics[name] for name in MEASURED}


@torch.no_grad()
def pictures(tokenizer: Tokenizer, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The crops and what the finished tokenizer makes of them, uint8 (16, 3, 64, 64) each."""
    images = load_images(config.data, "test")
    x_BCHW = images.batch(torch.arange(CROPS), "cpu")
    return {"crops": to_uint8(x_BCHW), "reconstructions": to_uint8(tokenizer(x_BCHW).images)}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The curve, a line a point."""
    shown = rows.iloc[[*range(3, len(rows) - 1, 4), len(rows) - 1]] if len(rows) > 8 else rows
    return pd.DataFrame(
        {
            "step": shown["step"].astype(str),
            **{METRICS[of].heading: shown[of].map(f"{{:.{METRICS[of].digits}f}}".format) for of in MEASURED},
            "seconds": shown["seconds"].map("{:.0f}".format),
            "peak GiB": shown["peak_gib"].map("{:.2f}".format),
        }
    )


def figure(rows: pd.DataFrame, of_crops: dict[str, torch.Tensor]) -> Figure:
    """The sixteen crops above their reconstructions, and beside them PSNR against steps with the line that was
    wanted."""
    figures.theme()
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=[1.9, 1])
    strips = [
        torch.cat(list(half), 2)
        for i in (0, CROPS // 2)
        for half in (of_crops[name][i : i + CROPS // 2] for name in of_crops)
    ]
    left.imshow(torch.cat(strips, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    left.set(xticks=[], yticks=[], title="rows 1 and 3: crops; rows 2 and 4: their reconstructions")
    left.grid(False)
    right.plot(rows["step"], rows["psnr_db"], marker="o", ms=3)
    right.axhline(WANTED_DB, color="0.3", ls="--", lw=1)
    right.set(xlabel="training step", ylabel=METRICS["psnr_db"].axis, title=f"dashed: {WANTED_DB:g} dB")
    return drawn


def write(rows: pd.DataFrame, publish: bool = False) -> Path:
    """The report, as `cells.write_report` says."""
    pictures = load_file(cells.report_folder(NAME) / PICTURES)
    return cells.write_report(NAME, rows, table(rows), CAPTION, figure(rows, pictures), publish, unpublished=PICTURES)
