"""Pretrained weights of other people's networks: where they are sought, that they are the right ones, and how they are
fetched.

A file is known by its name, which holds the beginning of its SHA-256, as torch hub's convention has it: `name-<8 or
more hex digits>.pth`. It is sought in the folder IBQ_WEIGHTS, then where torch hub keeps downloads (`checkpoints` in
its folder, which TORCH_HOME moves). Where there is a network it is downloaded to the latter, from the address that the
library which uses it holds. Nothing else is ever unpickled from it than tensors.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ibq.data.images import one_line
from ibq.errors import DataError

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
_TIMEOUT_S = 10
_DOWNLOADING = threading.Lock()


def pretrained_file(url: str, of: str) -> Path:
    """The file that a library would download from `url`, sought on this machine first, and verified.

    Args:
        url: its last part is the file's name.
        of: whose weights they are, for messages.

    Raises:
        DataError: the file is nowhere and cannot be downloaded, or one of that name has another content; one sentence
            that names the file.
    """
    name = url.rsplit("/", 1)[-1]
    given = os.environ.get("IBQ_WEIGHTS")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [Path(given).expanduser(), hub] if given else [hub]
    for folder in folders:
        if (folder / name).is_file():
            return _verified(folder / name, of)
    print(f"Fetching {name}, the weights of {of}, into {hub}", file=sys.stderr)
    try:
        _download(url, hub / name)
    except (
        OSError,
        RuntimeError,
        http.client.HTTPException,
    ) as error:  # torch hub's word for a wrong hash is RuntimeError
        unset = "" if given else " (or in a folder that IBQ_WEIGHTS names)"
        raise DataError(
            f"the weights of {of} are absent: {name} is not in {' or '.join(map(str, folders))}, and its download "
            f"failed "
            f"({one_line(error)}); put that file there{unset}"
        ) from None
    return hub / name


def load_pretrained(url: str, of: str) -> dict[str, torch.Tensor]:
    """The tensors of `pretrained_file`, by name, on the CPU. DataError: see there, or the file holds something else
    than tensors."""
    return read_tensors(pretrained_file(url, of), of)


def read_tensors(path: Path, of: str) -> dict[str, torch.Tensor]:
    """A state dict written by torch.save; nothing but tensors is unpickled, whatever the file holds.

    Raises:
        DataError: it holds something else.
    """
    wrong = f"{path} does not hold the weights of {of} alone"
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{wrong} ({one_line(str(error).partition('.')[0])}); delete it") from None
    if not (isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise DataError(f"{wrong} (it is no dictionary of tensors); delete it")
    return dict(state)


def hash_in_name(name: str) -> str:
    """The beginning of the SHA-256 that a file's name promises. ValueError: it promises none."""
    found = _HASH_IN_NAME.search(name)
    if found is None:
        raise ValueError(
            f"{name!r} names no hash of at least 8 hex digits before its ending; such a file cannot be verified"
        )
    return found.group(1)


def _verified(path: Path, of: str) -> Path:
    expected = hash_in_name(path.name)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise DataError(
            f"{path} does not hold the weights of {of}: its sha256 begins with {digest[: len(expected)]} where its "
            f"name says {expected}; "
            "replace it or delete it"
        )
    return path


def _download(url: str, path: Path) -> None:
    """Whole and verified, or not at all: torch hub writes to a name of its own first, so that several processes may
    fetch at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _DOWNLOADING
    ):  # the timeout is the whole process's, so that of two threads one would restore what the other has set
        timeout_before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT_S)  # torch hub sets none, and a firewall that drops packets would hang it
        try:
            torch.hub.download_url_to_file(url, str(path), hash_in_name(path.name), progress=sys.stderr.isatty())
        finally:
            socket.setdefaulttimeout(timeout_before)
