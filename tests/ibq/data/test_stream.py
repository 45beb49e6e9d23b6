"""Folders that are read while they are used: which pixels come, that nothing but seed, epoch and image decides them,
and what can break."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from ibq.config import TrainConfig
from ibq.data import Images, data_hash, load_images
from ibq.data import stream as module
from ibq.data.loader import TrainingBatches, batch_indices
from ibq.data.stream import Draw, RandomSquares, StreamedImages
from ibq.errors import DataError

R, N = 16, 23
CPU = torch.device("cpu")
Make = Callable[..., TrainConfig]


def save(path: Path, pixels_HWC: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels_HWC).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG and JPEG of many sizes, upright and lying, one of them smaller than the resolution; two classes."""
    root, noise = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, count in (("train", N), ("val", 7)):
        for number in range(count):
            height, width = (9, 12) if number == 4 else noise.integers(R, 6 * R, 2)
            save(
                root / split / f"class {number % 2}" / f"{number:02d}.{('png', 'jpg')[number % 3 == 0]}",
                noise.integers(0, 256, (height, width, 3), np.uint8),
            )
    return root


@pytest.fixture
def make(tiny: Any, root: Path) -> Make:
    def made(folder: Path = root, **dotted: Any) -> TrainConfig:
        data = {"data.name": f"imagefolder:{folder}", "data.resolution": R, "data.crop": "random"}
        return tiny(**(data | {"batch_size": 8} | dotted))

    return made


def train_split(config: TrainConfig) -> StreamedImages:
    images = load_images(config.data, "train")
    assert isinstance(images, StreamedImages)
    return images


def taken(config: TrainConfig, steps: int, first_step: int = 0, **options: Any) -> torch.Tensor:
    """All images of some steps, in a row."""
    with TrainingBatches(
        train_split(config), config, CPU, first_step=first_step, **({"workers": 0} | options)
    ) as batches:
        return torch.cat([batches.next() for _ in range(steps)])


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]


# --- Which pixels -----------------------------------------------------------------------------------------------------


def square_of(path: Path, key: tuple[int, int, int], resolution: int = R, flip: bool = False) -> np.ndarray:
    squares_BCHW, missing = RandomSquares(path.parent, resolution, flip)[[Draw(path.name, key)]]
    assert missing == []
    return squares_BCHW[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (16, 24), (48, 48), (8, 12), (480, 16), (16, 16)], ids=str)
def test_squares_are_those_of_the_image_scaled_to_the_shorter_side(size: tuple[int, int], tmp_path: Path) -> None:
    """Against Pillow: the whole image (but for the rest of a pixel) scaled until its shorter side is R, then cut at
    whole pixels."""
    width, height = size
    pixels_HWC = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    save(tmp_path / "a.png", pixels_HWC)
    W, H = (length * R // min(size) for length in size)
    covered = (0, 0, W * min(size) / R, H * min(size) / R)
    scaled = PIL.Image.fromarray(pixels_HWC).resize((W, H), PIL.Image.Resampling.BICUBIC, box=covered)
    lefts, tops = range(scaled.width - R + 1), range(scaled.height - R + 1)
    possible = {
        (left, top): np.asarray(scaled.crop((left, top, left + R, top + R))).astype(int)
        for left, top in itertools.product(lefts, tops)
    }
    for index in range(20):
        square = square_of(tmp_path / "a.png", (0, 0, index))
        difference = min(int(abs(square - each).max()) for each in possible.values())
        assert difference <= (0 if min(size) == R else 1)


def test_squares_lie_everywhere_alike_and_half_of_them_are_mirrored(tmp_path: Path) -> None:
    columns_HWC = np.broadcast_to(np.arange(R + 9, dtype=np.uint8)[None, :, None] * 10, (R, R + 9, 3)).copy()
    save(tmp_path / "wide.png", columns_HWC)
    save(tmp_path / "high.png", columns_HWC.transpose(1, 0, 2).copy())
    count = 2000
    for name, line in (("wide.png", np.s_[0, :, 0]), ("high.png", np.s_[:, 0, 0])):
        lines = [square_of(tmp_path / name, (5, epoch, 3))[line] for epoch in range(count)]
        assert {int(each[-1]) - int(each[0]) for each in lines} == {10 * (R - 1)}, (
            "neighbouring columns of the image, in order"
        )
        places = np.bincount([each[0] // 10 for each in lines], minlength=10)
        assert len(places) == 10
        assert ((places - count / 10) ** 2 / (count / 10)).sum() < 27.9, (
            "chi-squared with 9 degrees of freedom, p = 0.001"
        )
    plain = [square_of(tmp_path / "wide.png", (5, 0, index)) for index in range(count)]
    flipped = [square_of(tmp_path / "wide.png", (5, 0, index), flip=True) for index in range(count)]
    mirrored = [not np.array_equal(one, other) for one, other in zip(plain, flipped, strict=True)]
    assert all(np.array_equal(a[:, ::-1] if m else a, b) for a, b, m in zip(plain, flipped, mirrored, strict=True)), (
        "at the same place"
    )
    assert 0.46 < np.mean(mirrored) < 0.54


def test_centre_squares_are_those_of_a_folder_in_memory(make: Make, root: Path) -> None:
    config = make()
    for split, small in (("train", True), ("test", True)):
        streamed, held = (
            load_images(config.data, split),
            load_images(config.data.model_copy(update={"crop": "center"}), split),
        )
        assert isinstance(held, Images)
        assert (len(streamed), streamed.name, streamed.split, streamed.source) == (
            len(held) + small,
            held.name,
            held.split,
            held.source,
        )
        large = [position for position, file in enumerate(streamed.listing.files) if "04." not in file]
        assert torch.equal(streamed.pixels(torch.tensor(large)), held.images_NCHW)
        assert torch.equal(streamed.batch(torch.tensor(large[2:4]), CPU), held.batch(torch.tensor([2, 3]), "cpu"))
        assert streamed.labels_N[large].tolist() == held.labels_N.tolist()
        assert streamed.skipped == ()
    (small_file,) = [position for position, file in enumerate(streamed.listing.files) if "04." in file]
    with PIL.Image.open(root / "val" / streamed.listing.files[small_file]) as image:
        enlarged = image.crop((1, 0, 10, 9)).resize((R, R), PIL.Image.Resampling.BICUBIC, box=(0, 0, 9, 9))
    difference = streamed.pixels(torch.tensor([small_file]))[0].permute(1, 2, 0).numpy()[:, 2:-2] - np.asarray(
        enlarged
    )[:, 2:-2].astype(int)
    assert abs(difference).max() <= 1, "what is smaller is scaled up"


def test_the_hash_of_a_streamed_folder_knows_names_and_sizes(make: Make, tmp_path: Path) -> None:
    for split, number in itertools.product(("train", "val"), range(3)):
        save(tmp_path / "a" / split / f"{number}.png", np.full((R, R, 3), number, np.uint8))

    def hashed(folder: str) -> str:
        data = make(tmp_path / folder).data
        return data_hash(load_images(data, "train"), load_images(data, "test"))

    first = hashed("a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert hashed("b") == first
    (tmp_path / "b" / "val" / "0.png").rename(tmp_path / "b" / "val" / "9.png")
    renamed = hashed("b")
    with open(tmp_path / "b" / "train" / "1.png", "ab") as file:
        file.write(b"x")
    resized = hashed("b")
    (tmp_path / "b" / "train" / "4.png").symlink_to("nowhere")
    assert len({first, renamed, resized, hashed("b")}) == 4


# --- Nothing but seed, epoch and image decides ------------------------------------------------------------------------


def test_batches_do_not_depend_on_where_training_goes_on_nor_on_how_many_processes_share_them(make: Make) -> None:
    config, steps = make(**{"data.flip": True}), 5  # two steps an epoch
    whole = taken(config, steps)
    assert whole.shape == (8 * steps, 3, R, R)
    for first_step in range(steps):
        assert torch.equal(taken(config, steps - first_step, first_step), whole[8 * first_step :])
    for world in (2, 4):
        shares = [taken(config, steps, rank=rank, world=world).unflatten(0, (steps, -1)) for rank in range(world)]
        assert torch.equal(torch.cat(shares, 1).flatten(0, 1), whole)
    images = train_split(config)
    squares = RandomSquares(images.listing.folder, R, True)
    for step in range(steps):
        draws = images.draws(batch_indices(0, step, N, 8), 0, step // 2)
        assert torch.equal(
            squares[draws[::-1]][0].flip(0), ((whole[8 * step : 8 * step + 8] + 1) * 127.5).round().to(torch.uint8)
        )


def test_epochs_and_seeds_cut_differently(make: Make) -> None:
    def of_each_image(**dotted: Any) -> list[bytes]:
        config = make(**{"batch_size": N} | dotted)
        epochs = []
        for epoch in range(2):
            order = batch_indices(config.seed, epoch, N, N)
            epochs += [taken(config, 1, epoch)[order.argsort()]]
        return [bytes(image.numpy().tobytes()) for image in torch.cat(epochs)]

    seen = of_each_image() + of_each_image(seed=1)
    assert len(set(seen)) > 2.5 * N, "of four; there are nearly square images, which hardly leave a choice"


def test_other_processes_decode_the_same_ahead_and_leave_when_told(make: Make) -> None:
    config, before, handler = make(**{"data.flip": True}), torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    others = children()
    with TrainingBatches(train_split(config), config, CPU, first_step=1, workers=2) as batches:
        workers = sorted(children() - others)
        assert len(workers) == 2
        x_BCHW = torch.cat([batches.next() for _ in range(6)])
        assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert batches.waited_s > 0
        assert {os.getpgid(pid) for pid in workers} == set(workers), (
            "what is sent to the trainer's group does not reach them"
        )
        for pid in workers:
            os.kill(pid, signal.SIGINT)
        x_BCHW = torch.cat([x_BCHW, batches.next()])
    wait_until_gone(workers, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert torch.equal(x_BCHW, taken(config, 7, 1))


# --- What can break ---------------------------------------------------------------------------------------------------


def broken_folder(folder: Path, sound: int, broken: int) -> Path:
    (folder / "train").mkdir(parents=True)
    for number in range(sound):
        save(folder / "train" / f"{number}.png", np.full((R, R, 3), number, np.uint8))
    for number in range(broken):
        (folder / "train" / f"broken {number}.jpg").write_text("I am no image")
    save(folder / "val" / "a.png", np.zeros((R, R, 3), np.uint8))
    return folder


def test_a_broken_image_is_replaced_counted_and_said_once(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(broken_folder(tmp_path, 6, 2), steps=8)
    images = train_split(config)
    with TrainingBatches(images, config, CPU, first_step=0, workers=0) as batches:
        x_BCHW = torch.cat([batches.next() for _ in range(3)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        f"has not the content of a PNG, JPEG, WEBP, BMP, TIFF or GIF image; another image of {tmp_path / 'train'} "
        f"stands in" in error
    )
    assert sorted(sentence.split(" has ")[0] for sentence in images.skipped) == ["broken 0.jpg", "broken 1.jpg"]
    assert set(((x_BCHW[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) == set(range(6))
    assert torch.equal(taken(config, 2, 1), x_BCHW[8:])
    assert torch.equal(torch.cat([taken(config, 1, rank=rank, world=2) for rank in range(2)]), x_BCHW[:8])
    centre = load_images(config.data, "train")
    assert torch.equal(centre.pixels(torch.arange(8)), centre.pixels(torch.arange(8)))
    assert len(centre.skipped) == 2


def test_an_image_of_the_same_class_stands_in(make: Make, tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "train" / f"class {number % 3}" / f"{number:02d}.png", np.full((R, R, 3), number % 3, np.uint8))
    for name in ("class 0", "class 2"):
        (tmp_path / "train" / name / "broken.png").write_text("I am no image")
    save(tmp_path / "val" / "class 0" / "a.png", np.zeros((R, R, 3), np.uint8))
    images = train_split(make(tmp_path, batch_size=14))
    assert images.pixels(torch.arange(14))[:, 0, 0, 0].tolist() == images.labels_N.tolist()
    assert len(images.skipped) == 2
    x_BCHW = taken(make(tmp_path, batch_size=14), 3)
    seen = ((x_BCHW[:, 0, 0, 0] + 1) * 127.5).round().long().unflatten(0, (3, 14))
    for epoch in range(3):
        assert torch.equal(seen[epoch], images.labels_N[batch_indices(0, epoch, 14, 14)])
    for file in (tmp_path / "train" / "class 2").iterdir():
        file.write_text("I am no image")
    with pytest.raises(DataError, match=r"^no image of .*/train/class 2 can be used for train, it seems: "):
        images.pixels(torch.arange(14))


def test_too_many_broken_images_are_one_sentence(make: Make, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"^11 of the \d+ images read so far of .*/train cannot be used, over the limit of 1%: .*and 8 more",
    ):
        taken(make(broken_folder(tmp_path / "some", 60, 20)), 10)
    with pytest.raises(DataError, match=r"^no image of .*/train can be used for train, it seems: .*broken"):
        taken(make(broken_folder(tmp_path / "all", 0, 9)), 1)
    with pytest.raises(DataError, match="can be used for train, it seems"):
        train_split(make(tmp_path / "all")).pixels(torch.arange(4))


def test_a_lost_process_is_one_sentence_and_takes_the_others_along(make: Make) -> None:
    config, others = make(), children()
    batches = TrainingBatches(train_split(config), config, CPU, first_step=0, workers=2)
    workers = sorted(children() - others)
    batches.next()
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(
        DataError, match=r"^a process that decodes images was lost, killed by hand or .* run again"
    ) as loss:
        list(iter(batches.next, None))
    assert "\n" not in str(loss.value)
    wait_until_gone(workers, 10)


def test_an_error_in_a_process_is_one_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("so many\nlines")

    monkeypatch.setattr(RandomSquares, "read", fail)
    with pytest.raises(DataError, match=r"^decoding images failed: lines$"):
        taken(make(), 1)
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "
        '"x"\nValueError: wrong.\n'
    )
    assert module._what_was_lost(ValueError(text)) == "decoding images failed: ValueError: wrong"


def test_a_daemonic_process_decodes_by_itself_and_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, others = taken(make(), 1), children()
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with TrainingBatches(train_split(make()), make(), CPU, first_step=0, workers=2) as batches:
        assert torch.equal(batches.next(), expected)
        assert children() == others
    assert "a daemonic process may start no others, so it decodes the images itself" in capsys.readouterr().err


TRAINER = """
import json, multiprocessing, os, sys, time, torch
from ibq.config import TrainConfig
from ibq.data import load_images
from ibq.data.loader import TrainingBatches
if __name__ == "__main__":
    config = TrainConfig.parse(json.loads(sys.argv[1]))
    batches = TrainingBatches(load_images(config.data, "train"), config, torch.device("cpu"), first_step=0, workers=2)
    for _ in range(2):
        batches.next()  # one of each worker: none is still being started
    print(json.dumps([process.pid for process in multiprocessing.active_children()]), flush=True)
    time.sleep(600 if sys.argv[2] == "wait" else 0)
"""


@pytest.mark.processes
@pytest.mark.parametrize("end", ["wait", "leave"])
def test_no_process_survives_the_trainer(end: str, make: Make, tmp_path: Path) -> None:
    """Killed, or at its end without having closed anything."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), json.dumps(make().to_json_dict()), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        workers = json.loads(trainer.stdout.readline())
        assert len(workers) == 2
        if end == "wait":
            trainer.kill()
        _, error = trainer.communicate(timeout=900)
    wait_until_gone(workers, 10)
    assert end == "wait" or (trainer.returncode, error) == (0, "")
