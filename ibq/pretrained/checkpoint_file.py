"""Checkpoint file of torch.save: its tensors and nothing else, mapped into memory."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ibq.data.images import one_line, quoted
from ibq.errors import ConfigError, DataError
from ibq.models.weights import unwrapped


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The file's `state_dict`, or all of it where it has none, mapped into memory, under the networks' own names.

    Raises:
        DataError: there is no such file, it is damaged, or it holds something else than plain tensors.
    """
    if not path.is_file():
        raise DataError(f"there is no file {quoted(path)}; pass the path of a released checkpoint")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{quoted(path)} is empty, truncated or no zip archive of torch.save; download it again")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{quoted(path)} holds more than tensors and plain containers, and is not unpickled because that could run "
            f"code "
            f"({_refused(error)}); take a file whose state_dict was saved alone"
        ) from None
    except Exception as error:  # a pickle can make its reader stumble over anything
        first = one_line(one_line(error).partition(". ")[0])
        raise DataError(
            f"{quoted(path)} is damaged or no checkpoint of torch.save ({first}); download it again"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise DataError(
            f"{quoted(path)} is no Lightning checkpoint: it holds no dictionary of tensors under 'state_dict', and is "
            f"none itself"
        )
    for name, tensor in state.items():
        if reason := _not_plain(tensor):
            raise DataError(f"{quoted(path)} has {name!r} as {reason}; take the file as it was released")
    try:
        return unwrapped(path, state)
    except ConfigError as error:
        raise DataError(str(error)) from None


def _refused(error: pickle.UnpicklingError) -> str:
    """Name of the global that torch would not unpickle, where its message has one, else its words after "error:"."""
    message = one_line(error)
    if found := re.search(r"GLOBAL (\S+)", message):
        return f"it asks for {found[1]}"
    return one_line(message.rpartition("rror: ")[2].partition(". ")[0])


def _not_plain(tensor: torch.Tensor) -> str | None:
    """Kind of a tensor that is not plain numbers in the CPU's memory, all of which the file holds."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"a tensor of layout {tensor.layout} on device {str(tensor.device)!r}, which is no plain tensor"
    if tensor.numel() * tensor.element_size() > (held := tensor.untyped_storage().nbytes()):
        return f"{tensor.numel():,} numbers, of which the file holds {held:,} bytes"
    return None
