"""Full float32 arithmetic for a while, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32: at a temperature of 0.01 an error of a logit is multiplied by a hundred."""
    with torch.autocast(device.type, enabled=False):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
