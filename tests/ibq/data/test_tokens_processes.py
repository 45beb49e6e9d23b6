"""Two processes encode, sample and measure what one does, each image by one of them; what stops or fails on one ends
both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from tiny_transformer import CONFIG, build, fashion
from training_runs import stop_after

import ibq.data.tokens
import ibq.evaluation.transformer
from ibq.data import Images
from ibq.data.tokens import encode_split
from ibq.distributed import Processes, barrier
from ibq.errors import DataError, NonFiniteError
from ibq.evaluation.transformer import evaluate_transformer
from ibq.models.tokenizer import Tokenizer
from ibq.sampling import Sampler
from ibq.training.runtime import Runtime, StopRequested

pytestmark = pytest.mark.processes

N_IMAGES = 130
RUNTIME = Runtime(device="cpu", eval_images=N_IMAGES, eval_batch_size=40, samples=115, guidances=(1.0, 2.5))


def work(folder: Path, rank: int) -> dict[str, Any]:
    """Everything that a rank finds; images that it encoded and samples that it drew are counted."""
    images = fashion(N_IMAGES)  # before the cache that they may lie in is another
    ibq.data.tokens.SHARD, ibq.data.tokens.IMAGES_AT_ONCE, ibq.evaluation.transformer.PART = 16, 8, 25
    transformer, tokenizer = build()
    counts = {"encoded": 0, "drawn": 0}
    encode, draw = Tokenizer.encode, Sampler.__call__

    def counted_encode(self: Tokenizer, images_BCHW: torch.Tensor) -> torch.Tensor:
        counts["encoded"] += len(images_BCHW)
        return encode(self, images_BCHW)

    def counted_draw(self: Sampler, numbers_B: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        counts["drawn"] += len(numbers_B)
        return draw(self, numbers_B, classes_B)

    Tokenizer.encode, Sampler.__call__ = counted_encode, counted_draw  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    try:
        os.environ["IBQ_CACHE"] = str(folder / "cache")
        tokens = encode_split(tokenizer, images, classes=10)
        found["tokens"], found["encoded"] = tokens.tokens_NT, counts["encoded"]
        encode_split(tokenizer, images, classes=10)
        found["encoded again"] = counts["encoded"] - found["encoded"]
        os.environ["IBQ_CACHE"] = str(folder / f"cache of {rank}")  # as on nodes with disks of their own
        found["tokens apart"] = encode_split(tokenizer, images, classes=10).tokens_NT

        arguments = (CONFIG, transformer, tokenizer, images, tokens, RUNTIME, folder / "samples")
        found["evaluated"], found["drawn"] = evaluate_transformer(*arguments, lambda: False), counts["drawn"]
        found["evaluated again"] = evaluate_transformer(*arguments, lambda: False)
        found["drawn again"] = counts["drawn"] - found["drawn"]
    finally:
        Tokenizer.encode, Sampler.__call__ = encode, draw  # type: ignore[method-assign]
    return found


def work_together(processes: Processes, folder: Path) -> None:
    found = work(folder, processes.rank)
    found["refused"] = refusals(folder, processes.rank)
    torch.save(found, folder / f"{processes.rank}.pt")


def refusals(folder: Path, rank: int) -> dict[str, str]:
    """Error messages of this rank where something happens on rank 1 alone."""
    said, images = {}, fashion(N_IMAGES)
    transformer, tokenizer = build()
    tokens = encode_split(tokenizer, images, classes=10)

    def of_one(beat: Any) -> Any:
        return beat if rank == 1 else lambda: False

    os.environ["IBQ_CACHE"] = str(folder / "another cache")
    try:
        encode_split(tokenizer, images, classes=10, beat=of_one(stop_after(3)))
    except StopRequested as stopped:
        said["encoding"] = str(stopped)
    batch = Images.batch
    if rank == 1:
        Images.batch = failing  # type: ignore[method-assign]
    try:
        encode_split(tokenizer, images, classes=10)
    except DataError as error:
        said["reading"] = str(error)
    Images.batch = batch  # type: ignore[method-assign]
    arguments = (CONFIG, transformer, tokenizer, images, tokens, RUNTIME, folder / "other samples")
    for what, asked in (("likelihood", 1), ("sampling", 2), ("measuring", 6)):
        try:
            evaluate_transformer(*arguments, of_one(stop_after(asked)))
        except StopRequested as stopped:
            said[what] = str(stopped)
        barrier()
    if rank == 1:
        torch.nn.init.constant_(transformer.head.weight, float("nan"))
    try:
        evaluate_transformer(*arguments, lambda: False)
    except NonFiniteError as error:
        said["not finite"] = str(error)
    return said


def failing(*_: object) -> torch.Tensor:
    raise DataError("the disk is gone")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQ_CACHE", os.environ.get("IBQ_CACHE", ""))  # so that what `work` sets is undone
        for module, name in (
            (ibq.data.tokens, "SHARD"),
            (ibq.data.tokens, "IMAGES_AT_ONCE"),
            (ibq.evaluation.transformer, "PART"),
        ):
            patch.setattr(module, name, getattr(module, name))
        return work(tmp_path_factory.mktemp("alone"), 0)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("together")
    run_processes(work_together, folder, 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_tokens_are_those_of_one_process_and_each_image_is_encoded_once(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for found in together:
        assert torch.equal(found["tokens"], alone["tokens"])
        assert torch.equal(found["tokens apart"], alone["tokens"])
    assert sum(found["encoded"] for found in together) == alone["encoded"] == N_IMAGES
    assert min(found["encoded"] for found in together) == 4 * 16, "files are shared out in turn"
    assert [found["encoded again"] for found in (alone, *together)] == [0, 0, 0]


def test_an_evaluation_is_that_of_one_process_and_each_sample_is_drawn_once(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    metrics, protocol, tensors = alone["evaluated"]
    timed = {"sample_images_per_s"}
    for rank, found in enumerate(together):
        for which in ("evaluated", "evaluated again"):
            other_metrics, other_protocol, other_tensors = found[which]
            assert metrics.keys() - timed == other_metrics.keys() - timed
            assert other_metrics["cross_entropy"] == metrics["cross_entropy"]
            for name in metrics.keys() - timed:
                assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6), name
            assert {**other_protocol, "sample_images_per_s": ""} == {**protocol, "sample_images_per_s": ""}
            assert other_tensors.keys() == {
                name for name in tensors if rank == 0 or not name.startswith(("shown", "images"))
            }
            assert all(torch.equal(other_tensors[name], tensors[name]) for name in other_tensors)
    assert sum(found["drawn"] for found in together) == alone["drawn"] == 2 * 115
    assert min(found["drawn"] for found in together) == 2 * 50
    assert [found["drawn again"] for found in (alone, *together)] == [0, 0, 0]
    assert together[0]["evaluated"][0]["sample_images_per_s"] == together[1]["evaluated"][0]["sample_images_per_s"] > 0


def test_what_stops_or_fails_on_one_ends_both(together: list[dict[str, Any]]) -> None:
    for found in together:
        assert found["refused"] == {
            "encoding": "asked to stop while encoding fashion-mnist test; finished parts are kept",
            "reading": "the disk is gone",
            "likelihood": "asked to stop while measuring the cross-entropy",
            "sampling": "asked to stop while sampling at guidance 1; finished parts are kept",
            "measuring": "asked to stop while measuring samples; they are kept",
            "not finite": "the cross-entropy on the test split is nan",
        }
