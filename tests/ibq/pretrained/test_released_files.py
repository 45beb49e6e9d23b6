"""Files that are no released checkpoint, or a hostile one: cut off, with code, with tensors that are not what they
seem."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from released_layout import sentence, tokenizer_state, write

from ibq import load_released


class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "t.ckpt"
    torch.save({"state_dict": tokenizer_state(), "callbacks": Harmful(tmp_path / "made")}, path)
    assert sentence(path) == (
        "FILE holds more than tensors and plain containers, and is not unpickled because that could run code (it asks "
        "for posix.mkdir); "
        "take a file whose state_dict was saved alone"
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    data = write(tmp_path / "t.ckpt", tokenizer_state()).read_bytes()
    (tmp_path / "t.ckpt").write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert (
        sentence(tmp_path / "t.ckpt") == "FILE is empty, truncated or no zip archive of torch.save; download it again"
    )


def archive() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("a.txt", "text")
    return buffer.getvalue()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.ckpt").write_bytes(b"no archive at all\n")
    assert "FILE is empty, truncated or no zip archive of torch.save" in sentence(tmp_path / "t.ckpt")
    (tmp_path / "t.ckpt").write_bytes(archive())
    assert re.search(
        r"^FILE is damaged or no checkpoint of torch.save \(.+\); download it again$", sentence(tmp_path / "t.ckpt")
    )


KEY = "quantize.embedding.weight"
NO_PLAIN_TENSORS = {
    "expanded": (torch.zeros(1, 1).expand(2**40, 6), "6,597,069,766,656 numbers, of which the file holds 4 bytes"),
    "sparse": (
        torch.eye(12, 6).to_sparse(),
        "a tensor of layout torch.sparse_coo on device 'cpu', which is no plain tensor",
    ),
    "meta": (
        torch.zeros(12, 6, device="meta"),
        "a tensor of layout torch.strided on device 'meta', which is no plain tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("kind", NO_PLAIN_TENSORS)
@pytest.mark.parametrize("key", [KEY, "loss.discriminator.main.0.weight"])
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, kind: str, key: str) -> None:
    tensor, what = NO_PLAIN_TENSORS[kind]
    path = write(tmp_path / "t.ckpt", tokenizer_state() | {key: tensor})
    assert sentence(path, weights="raw") == f"FILE has {key!r} as {what}; take the file as it was released"


def test_views_of_one_storage_are_plain_tensors(tmp_path: Path) -> None:
    state = tokenizer_state()
    state["quant_conv.bias"] = torch.arange(60.0)[10:16]
    load_released(write(tmp_path / "t.ckpt", state), weights="raw")


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [torch.ones(2)],
        {"weight": torch.ones(2), "epoch": 3},
        {"state_dict": {"a": 3}},
        {"state_dict": {3: torch.ones(1)}},
    ],
)
def test_content_that_is_no_lightning_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "t.ckpt")
    assert (
        sentence(tmp_path / "t.ckpt")
        == "FILE is no Lightning checkpoint: it holds no dictionary of tensors under 'state_dict', and is none itself"
    )
