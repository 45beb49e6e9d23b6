"""Names of saved tensors: without those of wrappers, and whether they fit a network."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ibq.errors import ConfigError

WRAPPERS = {"module": "DistributedDataParallel", "_orig_mod": "torch.compile", "_fsdp_wrapped_module": "FSDP"}
"""Parts of names that a wrapped network's tensors have more, and what wraps so."""


def unwrapped(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file under the names of the network itself; a line on stderr where these were other ones.

    Raises:
        ConfigError: two tensors would have one name.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    found = [wrapper for part, wrapper in WRAPPERS.items() if any(part in name.split(".") for name in names)]
    if not found:
        return dict(tensors)
    if len(set(names.values())) < len(names):
        raise ConfigError(f"{path} holds weights both of a network wrapped by {' and '.join(found)} and of a plain one")
    print(f"{path}: weights of a network wrapped by {' and '.join(found)}, read as the network's own", file=sys.stderr)
    return {names[name]: tensor for name, tensor in tensors.items()}


def misfit(tensors: Mapping[str, torch.Tensor], network: nn.Module) -> str:
    """The first tensor that a network lacks, has not, or has in another shape, and the number of all; empty where every
    one fits."""
    found, wanted = ({name: tuple(t.shape) for name, t in of.items()} for of in (tensors, network.state_dict()))
    wrong = [name for name in [*wanted, *sorted(found.keys() - wanted)] if found.get(name) != wanted.get(name)]
    if not wrong:
        return ""
    there, here = (f"has the shape {of[wrong[0]]}" if wrong[0] in of else "is absent" for of in (found, wanted))
    count = f" ({len(wrong)} of {len(found.keys() | wanted)} tensors do not fit)" if len(wrong) > 1 else ""
    return f"{wrong[0]!r} {there} there and {here} in the network{count}"
