"""Pretrained weights: where they are found, what is refused, and torch hub's real download, from file:// addresses."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from ibq.errors import DataError
from ibq.pretrained.weights import hash_in_name, load_pretrained, pretrained_file


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch hub's folder for checkpoints, empty and not yet made."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("IBQ_WEIGHTS", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


def saved(folder: Path, content: object) -> Path:
    """A file of torch.save, named by its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "unnamed")
    digest = hashlib.sha256((folder / "unnamed").read_bytes()).hexdigest()
    return (folder / "unnamed").rename(folder / f"net-{digest[:8]}.pth")


def test_weights_are_sought_in_the_given_folder_then_in_torch_hubs(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(hub, {"weight": torch.ones(2)})
    nowhere = f"nowhere/{file.name}"
    assert pretrained_file(nowhere, "a net") == file
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path / "mine"))
    assert pretrained_file(nowhere, "a net") == file
    mine = saved(tmp_path / "mine", {"weight": torch.ones(2)})
    assert mine.name == file.name
    assert pretrained_file(nowhere, "a net") == mine
    assert load_pretrained(nowhere, "a net")["weight"].tolist() == [1, 1]


def test_weights_are_downloaded_once_whole_and_by_several_at_a_time(tmp_path: Path, hub: Path) -> None:
    url = saved(tmp_path / "elsewhere", {"weight": torch.randn(1000)}).as_uri()
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: pretrained_file(url, "a net"), range(4)))
    assert set(files) == {hub / url.rsplit("/", 1)[-1]}
    assert os.listdir(hub) == [files[0].name]
    (tmp_path / "elsewhere" / files[0].name).unlink()
    assert load_pretrained(url, "a net").keys() == {"weight"}


def test_absent_weights_are_one_sentence_with_the_file_and_the_folders(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (tmp_path / "net-0123abcd.pth").as_uri()
    with pytest.raises(
        DataError, match=r"the weights of a net are absent: net-0123abcd.pth is not in .*, and its download failed"
    ) as caught:
        pretrained_file(url, "a net")
    assert f"is not in {hub}, and" in str(caught.value)
    assert str(caught.value).endswith("put that file there (or in a folder that IBQ_WEIGHTS names)")
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path / "mine"))
    with pytest.raises(DataError, match=re.escape(f"is not in {tmp_path / 'mine'} or {hub}, and")) as caught:
        pretrained_file(url, "a net")
    assert "\n" not in str(caught.value)
    assert os.listdir(hub) == []


def test_a_download_with_another_content_is_refused_and_leaves_nothing(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "net-0123abcd.pth").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"its download failed .*0123abcd"):
        pretrained_file((tmp_path / "net-0123abcd.pth").as_uri(), "a net")
    assert os.listdir(hub) == []


def test_a_file_with_another_content_than_its_name_says_is_refused_with_both_hashes(hub: Path) -> None:
    file = saved(hub, {"weight": torch.ones(2)})
    promised = hash_in_name(file.name)
    file.write_bytes(file.read_bytes() + b"x")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(
        DataError, match=f"its sha256 begins with {digest[:8]} where its name says {promised}; replace it or delete it"
    ):
        pretrained_file(f"nowhere/{file.name}", "a net")


class Harmful:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, hub: Path) -> None:
    file = saved(hub, {"weight": Harmful(tmp_path / "made")})
    with pytest.raises(DataError, match="does not hold the weights of a net alone") as caught:
        load_pretrained(f"nowhere/{file.name}", "a net")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    (text := hub / "text").write_text("no archive")
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    name = text.rename(hub / f"text-{digest[:12]}.pth").name
    with pytest.raises(DataError, match="does not hold the weights of a net alone"):
        load_pretrained(f"nowhere/{name}", "a net")


def test_a_name_without_a_hash_cannot_be_verified() -> None:
    assert hash_in_name("weights-inception-2015-12-05-0123abcd.pth") == "0123abcd"
    with pytest.raises(ValueError, match=r"'net-v2.pth' names no hash of at least 8 hex digits"):
        hash_in_name("net-v2.pth")


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], torch.ones(2), {"state_dict": {"weight": torch.ones(2)}}, {"weight": torch.ones(2), "epoch": 3}],
)
def test_tensors_that_are_no_state_dict_are_refused(hub: Path, content: object) -> None:
    file = saved(hub, content)
    with pytest.raises(
        DataError,
        match=rf"{file.name} does not hold the weights of a net alone \(it is no dictionary of tensors\); delete it$",
    ):
        load_pretrained(f"nowhere/{file.name}", "a net")


def test_threads_that_download_at_once_leave_the_timeout_of_sockets_as_it_was(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, all_started = [], Barrier(4)

    def slow_download(*_: object, **__: object) -> None:
        seen.append(socket.getdefaulttimeout())
        time.sleep(0.02)

    def fetch(i: int) -> None:
        all_started.wait()
        pretrained_file(f"nowhere/net-0123abc{i}.pth", "a net")

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow_download)
    before = socket.getdefaulttimeout()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(4)))
    assert seen == [10] * 4
    assert socket.getdefaulttimeout() == before
