"""Commands without root's leave to write everywhere: what is closed is refused, as to any user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AS_ANY_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def as_user(*command: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` in this checkout, to which file permissions apply; None takes a variable away."""
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [*AS_ANY_USER, sys.executable, *command],
        cwd=ROOT,
        env={name: value for name, value in given.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=900,
    )


@contextmanager
def closed(folder: Path) -> Iterator[Path]:
    """Within it nothing in the folder can be written."""
    inside = [folder, *folder.rglob("*")]
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in inside:
        path.chmod(0o755 if path.is_dir() else 0o644)
