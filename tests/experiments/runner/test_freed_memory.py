"""Trainers keep the memory that they free: what is allocated again is not mapped anew by the system."""

from __future__ import annotations

import platform
import subprocess
import sys

from experiments.study import ROOT

SCRIPT = """
import resource, torch
from experiments.runner.worker import keep_freed_memory

def mapped():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(1 << 20).fill_(1.0) for _ in range(40)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
mapped()
print(mapped())
"""


def test_memory_that_is_allocated_again_is_not_mapped_anew() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = 40 * 4 * (1 << 20) // 4096
    if platform.libc_ver()[0] == "glibc":
        assert int(done.stdout) < pages / 10
