"""`ibq evaluate MODEL PICTURES`: usage, rate and distortion of a tokenizer on a folder of pictures, or with --data on
the test split of a data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ibq.cli.common import PictureOptions, closing_line, open_model, open_model_and_data, progress, reconstructed
from ibq.cli.data_pictures import DataPictures
from ibq.cli.pictures import PictureFolder
from ibq.errors import ConfigError, nearest, require_packages
from ibq.evaluation.pictures import PerceptualMetric, PictureEvaluation
from ibq.evaluation.tokenizer import PERCEPTUAL
from ibq.run_directory import write_json

DEFAULT_PERCEPTUAL = ("inception", "lpips-alex", "lpips-vgg", "efficientnet-lite0", "perceptual-efficientnet-lite0")


def evaluate(given: PictureOptions, metrics: tuple[str, ...], out: Path | None) -> None:
    """Print the numbers of a tokenizer on a folder of pictures, or on the test split of a data set.

    Args:
        given: model, and pictures or data.
        metrics: of PERCEPTUAL, those that need a network; () is DEFAULT_PERCEPTUAL, ("none",) is none.
        out: a JSON file for all of it.

    Raises:
        ConfigError, DataError: an argument cannot be used, or a number is not finite.
    """
    if out and out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file")
    if unknown := [name for name in metrics if name not in (*PERCEPTUAL, "none")]:
        raise ConfigError(f"--metric {unknown[0]} does not exist; {nearest(unknown[0], [*PERCEPTUAL, 'none'])}")
    if "none" in metrics and len(set(metrics)) > 1:
        other = next(name for name in metrics if name != "none")
        raise ConfigError(f"--metric none and --metric {other} contradict each other; leave one out")
    if not (given.pictures or given.data):
        raise ConfigError("there is nothing to evaluate on; name a folder as PICTURES, or a data set by --data")
    require_packages("torchmetrics", "torch_fidelity", "torchvision", "lpips")
    pictures: PictureFolder | DataPictures
    model, pictures = open_model_and_data(given) if given.data else open_model(given)
    device = next(model.tokenizer.parameters()).device
    wanted = dict.fromkeys(metrics or DEFAULT_PERCEPTUAL)
    perceptual = [PerceptualMetric(name, len(pictures.names), device) for name in wanted if name != "none"]
    evaluation = PictureEvaluation(model.tokenizer, perceptual)
    with progress(len(pictures.names)) as bar:
        for batch in reconstructed(model, pictures, pictures.names, given.batch_size):
            evaluation.update([p.position for p in batch.pictures], batch.originals_BCHW, batch.output)
            bar.update(len(batch.pictures))
        bar.update(bar.total - bar.n)
    if isinstance(pictures, PictureFolder):
        pictures.require_used(evaluation.pictures)
    numbers, protocol, absent = evaluation.compute()
    seen = str(pictures.framing if isinstance(pictures, PictureFolder) else pictures)
    facts = model.facts(seen) | {"pictures": _number_and_sizes(pictures, evaluation)}
    print(_table(facts, numbers, protocol, absent))
    if out:
        write_json(out, _as_json(facts, numbers, protocol, absent, pictures, evaluation))
    print(closing_line(pictures, evaluation.pictures, device), file=sys.stderr)


def _number_and_sizes(pictures: PictureFolder | DataPictures, evaluation: PictureEvaluation) -> str:
    common = sorted(evaluation.sizes, key=lambda size: -evaluation.sizes[size])
    sizes = ", ".join(common[:3]) + (f" and {len(common) - 3:,} more sizes" if len(common) > 3 else "")
    return f"{evaluation.pictures:,} of {sizes}, {len(pictures.skipped):,} skipped"


def _table(facts: dict[str, str], metrics: dict[str, float], protocol: dict[str, str], absent: dict[str, str]) -> str:
    """Facts, then a line for each number with its protocol, then what is absent."""
    width = max(map(len, [*facts, *metrics, *absent]))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    lines += ["", *(f"{name:<{width}}  {value:>12,.6g}  {protocol[name]}" for name, value in metrics.items())]
    lines += [f"{name:<{width}}  {'absent':>12}  {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _as_json(
    facts: dict[str, str],
    metrics: dict[str, float],
    protocol: dict[str, str],
    absent: dict[str, str],
    pictures: PictureFolder | DataPictures,
    evaluation: PictureEvaluation,
) -> dict[str, Any]:
    return {
        "facts": facts,
        "metrics": {name: {"value": value, "protocol": protocol[name]} for name, value in metrics.items()},
        "absent": absent,
        "pictures": evaluation.pictures,
        "sizes": evaluation.sizes,
        "skipped": pictures.skipped,
    }
