"""Folders for libraries that keep something in a user's home, where there is none or it cannot be written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

VARIABLES = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "IPYTHONDIR",
    "MPLCONFIGDIR",
    "NUMBA_CACHE_DIR",
)
"""Of Jupyter, IPython, matplotlib and numba, some of which look for a home as soon as they are imported."""


@cache
def provide() -> None:
    """Point these libraries, here and in processes started from here, at a temporary folder if the home is of no use.

    What the user has named stays, and so does the cache of a home that can only be read. The folder goes with this
    process.
    """
    home = os.path.expanduser("~")  # "~" itself where there is none
    if os.path.isabs(home) and os.access(home, os.W_OK | os.X_OK):
        return
    folder = tempfile.mkdtemp(prefix="ibq-home-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if os.path.isabs(home):
        os.environ.setdefault("XDG_CACHE_HOME", str(Path(home, ".cache")))
    os.environ["HOME"] = folder
    for name in VARIABLES:
        os.environ.setdefault(name, str(Path(folder, name.lower())))
