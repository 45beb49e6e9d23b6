"""One cell of the benchmark of training, in a process of its own: python -m experiments.benchmarks.training_cell CELL,
CELL as JSON.

The trainer is the real one; it is left after the last step, before it evaluates. Its pictures are noise in memory
instead of ImageNet's, and its perceptual network has random weights, which cost the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.models import vgg16

from experiments.benchmarks import measure
from experiments.imagenet256.tokenizers import TOKENIZERS
from ibq.config import TrainConfig
from ibq.distributed import resolve_device
from ibq.losses import PerceptualLoss
from ibq.models.tokenizer import Tokenizer
from ibq.quantizers import Quantizer
from ibq.training.runtime import Runtime
from ibq.training.tokenizer import train_tokenizer

WARM_UP, TIMED = 8, 16
RECIPE_OF = {"ibq": "imagenet256_ibq_16384", "vq": "imagenet256_vqgan_16384", "lfq": "imagenet256_lfq_16384"}
SMALL = {
    "data.resolution": 32,
    "model.base_channels": 4,
    "model.norm_groups": 4,
    "model.res_blocks": 1,
    "model.z_channels": 8,
    "model.attention_resolutions": [2],
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 2,
    "quantizer.code_dim": 8,
}


def config_of(cell: dict[str, Any], folder: Path) -> TrainConfig:
    """The method's recipe with the cell's K, batch, micro-batches and precision, on images of a folder that are held in
    memory."""
    fields: dict[str, Any] = {"data.name": f"imagefolder:{folder}", "data.crop": "center"}
    fields |= {
        "batch_size": cell["batch"],
        "accumulate": cell["accumulate"],
        "precision": cell["precision"],
        "steps": WARM_UP + TIMED,
    }
    fields |= SMALL if cell["small"] else {}
    sizes = Quantizer.registry[cell["method"]].config_class.sizes(cell["K"])
    fields |= {f"quantizer.{name}": value for name, value in sizes.items()}
    return TOKENIZERS[RECIPE_OF[cell["method"]]]().with_fields(**fields)


def measure_training(cell: dict[str, Any]) -> dict[str, Any]:
    """Images a second over the timed steps, peak GiB and the size of what was trained, or status 'does not fit'."""
    device = resolve_device(cell["device"])
    if device.type != "cuda":
        measure.limit_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_of(cell, folder / "images")
        _write_noise(folder / "images", config.batch_size, config.data.resolution)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Tokenizer(config).parameters())
        runtime = Runtime(
            device=cell["device"],
            log_every=WARM_UP,
            snapshots=0,
            checkpoint_every_s=1e9,
            compile=cell["compiled"],
            backend="dense" if cell["operator"] == "matrix" else "auto",
        )
        sizes = {"parameters": parameters, "resolution": config.data.resolution}
        weights, seconds = _random_vgg(), {}
        start = measure.start_peak(device)
        try:
            perceptual = PerceptualLoss("lpips-vgg", weights)
            for event in train_tokenizer(config, folder / "run", runtime, perceptual=perceptual):
                seconds[event.step] = event.record["seconds"]
                if event.step == config.steps:
                    break
        except RuntimeError as error:
            if not measure.is_out_of_memory(error):
                raise
            return {"status": "does not fit"} | sizes
        peak = measure.peak_bytes(device) - (start if device.type != "cuda" else 0)
    rate = TIMED * config.batch_size / (seconds[WARM_UP + TIMED] - seconds[WARM_UP])
    return {"status": "ok", "images_per_second": rate, "peak_gib": peak / 2**30, "timed_steps": TIMED} | sizes


def _random_vgg() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16().state_dict().items() if name.startswith("features.")}
    return {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}


def _write_noise(folder: Path, batch: int, side: int) -> None:
    """Two batches of training pictures and one test picture; they cost what any pictures cost."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 2 * batch), ("test", 1)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            noise_HWC = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise_HWC.numpy()).save(folder / split / f"{i:04d}.png")


if __name__ == "__main__":
    print(json.dumps(measure_training(json.loads(sys.argv[1]))))
