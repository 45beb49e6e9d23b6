"""Tokens of a split: what they are, that no finished file is made again, what can break; and the batches that a
transformer learns from."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import draw
from training_runs import stop_after

import ibq.data.tokens as module
from ibq.config import DataConfig, TrainConfig, TransformerTrainConfig
from ibq.data import Images, load_images
from ibq.data.loader import TrainingBatches, batch_indices, images_seen
from ibq.data.shards import Parts
from ibq.data.tokens import TokenBatches, Tokens, decode, encode_split, labels_of
from ibq.errors import ConfigError, DataError, NonFiniteInputError
from ibq.evaluation.tokenizer import measuring
from ibq.models.tokenizer import Tokenizer
from ibq.training.runtime import StopRequested

CPU = torch.device("cpu")
N, SHARD = 45, 16
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def images() -> Images:
    noise = torch.Generator().manual_seed(1)
    pixels_NCHW = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=noise)
    return Images("photos", "train", pixels_NCHW, torch.randint(0, 5, (N,), generator=noise))


@pytest.fixture
def tokenizer(tiny: MakeConfig) -> Tokenizer:
    return Tokenizer(tiny(**{"data.name": "photos", "data.resolution": 16}))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SHARD", SHARD)
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 8)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that tokenizers have been asked to encode, call by call."""
    counts: list[int] = []
    whole = Tokenizer.encode

    def counted(self: Tokenizer, images_BCHW: torch.Tensor) -> torch.Tensor:
        counts.append(len(images_BCHW))
        return whole(self, images_BCHW)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    return counts


@torch.no_grad()
def by_hand(tokenizer: Tokenizer, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Encoder, then the largest logit, image by image and row by row."""
    tokenizer.eval()
    tokens = [
        tokenizer.quantize.logits(tokenizer.features(x_1CHW)[0].flatten(1).T).argmax(1) for x_1CHW in x_BCHW.split(1)
    ]
    return torch.stack(tokens)


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


# --- What is encoded --------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_encoder_row_by_row(tokenizer: Tokenizer, images: Images) -> None:
    tokenizer.train()
    tokens = encode_split(tokenizer, images, classes=5)
    assert tokenizer.training, "its mode is what it was"
    x_NCHW = images.batch(torch.arange(N), "cpu")
    assert tokens.tokens_NT.dtype == torch.int32
    assert tokens.tokens_NT.tolist() == by_hand(tokenizer, x_NCHW).tolist()
    assert tokens.labels_N is images.labels_N
    with torch.no_grad():
        expected_NCHW = tokenizer.decode(tokenizer.encode(x_NCHW))
        assert torch.allclose(decode(tokenizer, tokens.tokens_NT), expected_NCHW, atol=1e-5)


def test_a_precision_switched_on_outside_changes_nothing(
    tokenizer: Tokenizer, images: Images, encoded: list[int]
) -> None:
    inside: list[torch.dtype] = []
    tokenizer.quant_conv.register_forward_hook(lambda *arguments: inside.append(arguments[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encode_split(tokenizer, images, classes=5)
    assert set(inside) == {torch.float32}
    assert encoded == [8, 8, 8, 8, 8, 5], "batches of the module's own size"


def test_labels_have_to_fit_the_classes(images: Images) -> None:
    with pytest.raises(ConfigError, match=r"^labels of photos train go up to 4 and classes=4; set classes=5 or more$"):
        labels_of(images, 4)
    bare = Images("photos", "train", images.images_NCHW)
    with pytest.raises(
        ConfigError,
        match=r"^photos has no labels and classes=3; set classes=1, or sort the images into a folder a class$",
    ):
        labels_of(bare, 3)
    assert labels_of(bare, 1).tolist() == [0] * N
    assert labels_of(images, 7) is images.labels_N


def test_a_short_run_encodes_what_it_sees_and_keeps_it_apart(
    tokenizer: Tokenizer, images: Images, encoded: list[int], cache: Path
) -> None:
    seen_M = images_seen(3, 2, N, 10)
    assert seen_M is not None
    assert seen_M.tolist() == sorted(torch.cat([batch_indices(3, step, N, 10) for step in (0, 1)]).tolist())
    assert images_seen(3, 5, N, 10) is None
    few = encode_split(tokenizer, images, classes=5, wanted=seen_M)
    assert sum(encoded) == 20
    whole = encode_split(tokenizer, images, classes=5)
    assert sum(encoded) == 20 + N
    assert torch.equal(few.tokens_NT[seen_M], whole.tokens_NT[seen_M])
    assert set(few.tokens_NT.flatten()[(few.tokens_NT < 0).flatten()].tolist()) == {-1}
    assert int((few.tokens_NT[:, 0] < 0).sum()) == N - 20
    encode_split(tokenizer, images, classes=5, wanted=torch.arange(N))
    encode_split(tokenizer, images, classes=5, wanted=seen_M)
    assert sum(encoded) == 20 + N
    assert len(shards(cache)) == 2 + 3


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_a_second_run_encodes_nothing(tokenizer: Tokenizer, images: Images, encoded: list[int], cache: Path) -> None:
    first = encode_split(tokenizer, images, classes=5)
    assert [path.name for path in shards(cache)] == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    encoded.clear()
    second = encode_split(tokenizer, images, classes=9)
    assert encoded == []
    assert torch.equal(second.tokens_NT, first.tokens_NT)


def test_other_weights_other_images_or_another_size_share_nothing(
    tokenizer: Tokenizer, images: Images, encoded: list[int]
) -> None:
    encode_split(tokenizer, images, classes=5)
    with torch.no_grad():
        tokenizer.quant_conv.bias[0] += 1e-3
    encode_split(tokenizer, images, classes=5)
    changed_NCHW = images.images_NCHW.clone()
    changed_NCHW[0, 0, 0, 0] ^= 1
    encode_split(tokenizer, Images("photos", "train", changed_NCHW, images.labels_N), classes=5)
    assert sum(encoded) == 3 * N


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
def test_what_is_finished_when_a_run_is_stopped_is_not_done_again(
    batches: int, tokenizer: Tokenizer, images: Images, encoded: list[int]
) -> None:
    """After so many of the six batches, two of which make a file."""
    with pytest.raises(StopRequested, match=r"^asked to stop while encoding photos train; finished parts are kept$"):
        encode_split(
            tokenizer, images, classes=5, beat=stop_after(1 + batches)
        )  # asked once before anything is encoded
    assert len(encoded) == batches
    encode_split(tokenizer, images, classes=5)
    assert sum(encoded) == N + batches % 2 * 8


def test_what_is_finished_when_a_run_fails_is_not_done_again(
    tokenizer: Tokenizer, images: Images, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, calls = Images.batch, itertools.count()

    def failing(self: Images, *arguments: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise DataError("the disk is gone")
        return batch(self, *arguments)

    monkeypatch.setattr(Images, "batch", failing)
    with pytest.raises(DataError, match=r"^the disk is gone$"):
        encode_split(tokenizer, images, classes=5)
    encode_split(tokenizer, images, classes=5)
    assert sum(encoded) == N + 8


def test_damaged_files_are_made_again(tokenizer: Tokenizer, images: Images, encoded: list[int], cache: Path) -> None:
    whole = encode_split(tokenizer, images, classes=5)
    first, second, last = shards(cache)
    contents = {path: path.read_bytes() for path in (first, second, last)}

    def damage(path: Path, content: bytes) -> None:
        encoded.clear()
        path.write_bytes(content)
        assert torch.equal(encode_split(tokenizer, images, classes=5).tokens_NT, whole.tokens_NT)
        assert sum(encoded) == (N - 2 * SHARD if path == last else SHARD)
        assert path.read_bytes() == contents[path], "mended"

    damage(first, contents[first][:-3])
    damage(first, b"")
    damage(last, contents[last][:-1] + bytes([contents[last][-1] ^ 1]))
    damage(second, contents[first])  # of other images
    damage(last, contents[first])  # of another number of them


def test_a_folder_that_cannot_be_written_costs_time_alone(
    tokenizer: Tokenizer, images: Images, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "file"))
    first, second = (encode_split(tokenizer, images, classes=5) for _ in range(2))
    assert torch.equal(first.tokens_NT, second.tokens_NT)
    assert sum(encoded) == 2 * N


@pytest.mark.parametrize(("codebook_size", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_files_hold_two_bytes_a_token_where_these_are_enough(
    codebook_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    expected_NT = torch.tensor([[0, codebook_size - 1], [7, codebook_size // 2]])
    parts = Parts(tmp_path, "key", 2, 1, 2, codebook_size, "trying")
    for make in (lambda numbers_B: expected_NT[numbers_B], lambda _: pytest.fail("it lies there")):
        tokens_NT = parts.collect(make, 1, lambda: False)
        assert tokens_NT.dtype == torch.int32
        assert tokens_NT.tolist() == expected_NT.tolist()
    assert load_file(tmp_path / "000001.safetensors")["tokens_PT"].dtype == dtype


def test_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 45)
    monkeypatch.setattr("ibq.data.shards.time.monotonic", lambda: float(next(clock)))
    Parts(None, "key", 5000, 1000, 1, 4, "trying").collect(
        lambda numbers_B: numbers_B[:, None] % 4, 1000, lambda: False
    )
    assert capsys.readouterr().err.splitlines() == [
        "trying: 2,000 of 5,000 images, about 2 min left",
        "trying: 4,000 of 5,000 images, about 1 min left",
    ]


def test_what_is_not_finite_is_said_and_not_kept(tokenizer: Tokenizer, images: Images, cache: Path) -> None:
    torch.nn.init.constant_(tokenizer.quant_conv.weight, float("nan"))
    with pytest.raises(NonFiniteInputError, match="of features are NaN or infinite"):
        encode_split(tokenizer, images, classes=5)
    assert shards(cache) == []


# --- Another run at the same tokens -----------------------------------------------------------------------------------

HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print(flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tokenizer: Tokenizer, images: Images, cache: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which holds the lock of these tokens and does not get on."""
    folder = cache / module._key(tokenizer, images, images.images_NCHW.shape[1:], torch.arange(N))
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder / ".lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_another_run_is_waited_for_and_its_work_taken_over_when_it_dies(
    tokenizer: Tokenizer,
    images: Images,
    encoded: list[int],
    holder: subprocess.Popen[bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.05)
    beats = []

    def beat() -> bool:
        beats.append(list(encoded))
        if len(beats) == 5:
            os.kill(holder.pid, 9)
        return False

    encode_split(tokenizer, images, classes=5, beat=beat)
    assert all(counts == [] for counts in beats[:5]), "nothing is encoded as long as the other lives"
    assert sum(encoded) == N
    said = capsys.readouterr().err
    assert said == "another run is encoding the same images with the same tokenizer; waiting for it\n"


def test_who_waits_can_be_stopped(tokenizer: Tokenizer, images: Images, holder: subprocess.Popen[bytes]) -> None:
    assert holder.poll() is None
    with pytest.raises(StopRequested, match=r"^asked to stop before anything was encoded$"):
        encode_split(tokenizer, images, classes=5, beat=stop_after(1))


def test_two_runs_at_once_encode_each_image_once(tokenizer: Tokenizer, images: Images, encoded: list[int]) -> None:
    found: list[Tokens] = []

    def run() -> None:
        found.append(encode_split(tokenizer, images, classes=5, beat=lambda: time.sleep(0.01) is not None))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0].tokens_NT, found[1].tokens_NT)
    assert sum(encoded) == N


# --- Batches ----------------------------------------------------------------------------------------------------------


def config_for(tokenizer: Tokenizer, **fields: Any) -> TransformerTrainConfig:
    data = fields.pop("data", tokenizer.config.data)
    return TransformerTrainConfig(
        tokenizer=tokenizer.config, data=data, classes=5, **({"batch_size": 8, "seed": 3} | fields)
    )


def test_kept_batches_are_the_tokens_and_classes_of_the_steps_images(
    tokenizer: Tokenizer, images: Images, encoded: list[int]
) -> None:
    config, tokens = config_for(tokenizer), encode_split(tokenizer, images, classes=5)
    assert images.labels_N is not None
    encoded.clear()
    for first_step in (0, 4, 100):
        with TokenBatches(config, tokenizer, images, tokens, CPU, first_step=first_step) as batches:
            for step in range(first_step, first_step + 7):
                tokens_BT, classes_B = batches.next()
                indices_B = batch_indices(3, step, N, 8)
                assert tokens_BT.dtype == classes_B.dtype == torch.int64
                assert tokens_BT.tolist() == tokens.tokens_NT[indices_B].tolist()
                assert classes_B.tolist() == images.labels_N[indices_B].tolist()
    assert encoded == []


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_share_a_batch_as_training_batches_do(
    kept: bool, accumulate: int, tokenizer: Tokenizer, images: Images
) -> None:
    config = config_for(tokenizer, accumulate=accumulate)
    tokens = encode_split(tokenizer, images, classes=5)
    alone = TokenBatches(config, tokenizer, images, tokens, CPU, first_step=2)
    ranks = [
        TokenBatches(config, tokenizer, images, tokens if kept else None, CPU, first_step=2, rank=r, world=2)
        for r in range(2)
    ]
    for _ in range(5):
        shares = [rank.next() for rank in ranks]
        for part, whole in zip(zip(*shares, strict=True), alone.next(), strict=True):
            micro_batches = zip(*(share.chunk(accumulate) for share in part), strict=True)
            assert torch.equal(torch.cat([each for parts in micro_batches for each in parts]), whole)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of pictures of several sizes; one file in each is none."""
    for number in range(27):
        draw(
            tmp_path / "folder" / "train" / f"class {number % 3}" / f"{number:02d}.png",
            16 + number,
            40 - number,
            seed=number,
        )
    for number in range(3):
        (tmp_path / "folder" / "train" / f"class {number}" / "broken.png").write_text("I am no picture")
        draw(tmp_path / "folder" / "val" / f"class {number}" / "0.png", 20, 30)
    return tmp_path / "folder"


def test_fresh_tokens_are_those_of_the_squares_and_the_classes_those_of_the_files(
    tiny: MakeConfig, folder: Path
) -> None:
    data = DataConfig(name=f"imagefolder:{folder}", resolution=16, crop="random", flip=True)
    tokenizer = Tokenizer(tiny(**{"data.name": "photos", "data.resolution": 16})).train()
    config = config_for(tokenizer, data=data)
    images = load_images(data, "train")
    assert images.labels_N is not None
    seen = []
    with (
        TrainingBatches(images, config, CPU, first_step=1, workers=0) as squares,
        TokenBatches(config, tokenizer, images, None, CPU, first_step=1, workers=0) as batches,
    ):
        for step in range(1, 8):
            tokens_BT, classes_B = batches.next()
            x_BCHW = squares.next()
            with measuring(tokenizer):
                assert tokens_BT.tolist() == by_hand(tokenizer, x_BCHW).tolist()
            tokenizer.train()
            assert classes_B.tolist() == images.labels_N[batch_indices(3, step, 30, 8)].tolist()
            seen.append(tokens_BT)
        assert 0 < batches.waited_s < 60
    assert len(images.skipped) == 3, "broken files were among them"
    with TokenBatches(config, tokenizer, images, None, CPU, first_step=4, workers=0) as resumed:
        assert torch.equal(resumed.next()[0], seen[3])


def test_batches_that_do_not_fit_are_refused(tokenizer: Tokenizer, images: Images) -> None:
    tokens = Tokens(torch.zeros(N, 16, dtype=torch.int32), torch.zeros(N, dtype=torch.int64))
    for given in (tokens, None):
        with pytest.raises(
            ConfigError, match=r"^batch_size=8 cannot be shared out evenly over 3 processes with accumulate=1; .* of 3$"
        ):
            TokenBatches(config_for(tokenizer), tokenizer, images, given, CPU, first_step=0, world=3)
    with pytest.raises(ConfigError, match="labels of photos train go up to 4 and classes=2"):
        TokenBatches(config_for(tokenizer).with_fields(classes=2), tokenizer, images, None, CPU, first_step=0)
