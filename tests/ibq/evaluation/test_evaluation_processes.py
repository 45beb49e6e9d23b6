"""An evaluation by several processes is that by one: same counts, same pictures, same numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes

from ibq.config import DataConfig, TrainConfig
from ibq.data import Images, load_images
from ibq.distributed import Processes
from ibq.errors import NonFiniteInputError
from ibq.evaluation.tokenizer import PerceptualEvaluation, UnfitError, evaluate
from ibq.metrics.distances import Distances
from ibq.models.tokenizer import Tokenizer

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")
N_IMAGES, BATCH_SIZE = 101, 10
WORLDS = (2, 3)
MODEL = {"base_channels": 4, "channel_multipliers": (1, 2, 2), "res_blocks": 1, "z_channels": 8, "norm_groups": 4}
CONFIG = {
    "model": MODEL,
    "quantizer": {"method": "ibq", "codebook_size": 16, "code_dim": 8},
    "steps": 8,
    "batch_size": 4,
}

Evaluated = tuple[dict[str, float], dict[str, Any], dict[str, torch.Tensor]]


class SquaredError(torch.nn.Module):
    """In place of LPIPS's network: one number for each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x_BCHW: torch.Tensor, y_BCHW: torch.Tensor) -> torch.Tensor:
        return self.weight * (x_BCHW - y_BCHW).square().mean((1, 2, 3))


def tokenizer_and_images() -> tuple[Tokenizer, Images]:
    torch.manual_seed(0)
    return Tokenizer(TrainConfig.parse(CONFIG)), load_images(DataConfig(), "test")


def lpips_of_squares() -> PerceptualEvaluation:
    evaluation = PerceptualEvaluation("lpips-alex", CPU)
    evaluation.__dict__["network"] = SquaredError()  # instead of AlexNet
    return evaluation


def measure(folder: Path) -> dict[str, Any]:
    tokenizer, images = tokenizer_and_images()
    os.environ["IBQ_CACHE"] = str(folder / "cache")  # for features, now that the images are here
    return {
        "whole": evaluate(tokenizer, images, N_IMAGES, BATCH_SIZE, weights="ema"),
        "one batch": evaluate(tokenizer, images, 6, BATCH_SIZE, weights="ema"),  # nothing is left for a second process
        "lpips": lpips_of_squares()(tokenizer, images, N_IMAGES, BATCH_SIZE, weights="ema"),
        "fashion-cnn": PerceptualEvaluation("fashion-cnn", CPU)(tokenizer, images, N_IMAGES, BATCH_SIZE, weights="ema"),
    }


def measure_and_fail(processes: Processes, folder: Path) -> None:
    torch.save(measure(folder), folder / f"{processes.rank} of {processes.world}.pt")
    if processes.world == WORLDS[-1]:
        torch.save(failures(processes), folder / f"refused by {processes.rank}.pt")


def failures(processes: Processes) -> dict[str, str]:
    """Error messages where something fails on process 1 alone."""
    tokenizer, images = tokenizer_and_images()
    if processes.rank == 1:
        Distances.update = fail  # type: ignore[method-assign]
    _, protocol, _ = evaluate(tokenizer, images, N_IMAGES, BATCH_SIZE, weights="ema")
    refusals = {"evaluate": protocol["distances[fashion-cnn]"]}
    try:
        PerceptualEvaluation("fashion-cnn", CPU)(tokenizer, images, N_IMAGES, BATCH_SIZE, weights="ema")
    except UnfitError as error:
        refusals["perceptual"] = str(error)
    if processes.rank == 1:
        torch.nn.init.constant_(tokenizer.quant_conv.weight, float("nan"))
    try:
        evaluate(tokenizer, images, N_IMAGES, BATCH_SIZE, weights="ema")
    except NonFiniteInputError as error:
        refusals["features"] = str(error)
    return refusals


def fail(*_: object) -> None:
    raise RuntimeError("out of\nmemory.")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQ_CACHE", os.environ.get("IBQ_CACHE", ""))  # so that what `measure` sets is undone
        if not os.environ["IBQ_CACHE"]:
            patch.delenv("IBQ_CACHE")
        return measure(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    run_processes(measure_and_fail, folder, *WORLDS)
    return folder


def measured(together: Path, what: str, world: int) -> list[Any]:
    return [torch.load(together / f"{rank} of {world}.pt")[what] for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("what", ["whole", "one batch"])
def test_several_processes_measure_what_one_does(alone: dict[str, Any], together: Path, what: str, world: int) -> None:
    metrics, protocol, tensors = alone[what]
    first, *others = measured(together, what, world)
    assert torch.equal(first[2]["counts_K"], tensors["counts_K"])
    assert int(tensors["counts_K"].sum()) == metrics["tokens"] == protocol["n_images"] * 64
    assert torch.equal(first[2]["images_BCHW"], tensors["images_BCHW"])
    assert torch.equal(first[2]["reconstructions_BCHW"], tensors["reconstructions_BCHW"])
    of_features = {name: value for name, value in metrics.items() if "[" in name}
    assert first[1] == protocol
    assert first[0].keys() == metrics.keys()
    assert first[0] == pytest.approx(metrics | {name: first[0][name] for name in of_features}, rel=1e-12)
    # features are extracted in batches of 64 of each process, and so are rounded otherwise
    assert {name: first[0][name] for name in of_features} == pytest.approx(of_features, rel=1e-5, abs=1e-6)
    assert bool(of_features) == (what == "whole")
    for other in others:
        assert other[:2] == first[:2]
        assert other[2].keys() == {"counts_K"}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("what", "rel"), [("lpips", 1e-12), ("fashion-cnn", 1e-5)])
def test_several_processes_agree_on_a_networks_numbers(
    alone: dict[str, Any], together: Path, what: str, rel: float, world: int
) -> None:
    metrics, protocol = alone[what]
    first, *others = measured(together, what, world)
    assert first[1] == protocol
    assert first[0] == pytest.approx(metrics, rel=rel, abs=1e-6 if what == "fashion-cnn" else 0)
    assert all(other == first for other in others)


def test_what_fails_on_one_process_is_absent_or_refused_on_all(together: Path) -> None:
    first, *others = (torch.load(together / f"refused by {rank}.pt") for rank in range(WORLDS[-1]))
    assert first["evaluate"] == "absent: out of memory"
    assert first["perceptual"] == "fashion-cnn is absent: out of memory"
    assert "values of features are NaN or infinite" in first["features"]
    assert all(other == first for other in others)
