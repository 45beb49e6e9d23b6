"""Watch on the browsers of this kernel: closing a tab leaves its kernel running, which cannot see that, but the Jupyter
server can.

The server's REST API says how many connections a kernel has. Where this kernel is no server's (papermill, VS Code, a
script), nothing is watched: whoever started it then ends it.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from experiments.explorer.workers import WORKERS

ASK_EVERY_S = 3.0
ABSENT_S = 20.0
"""So long nobody may be connected: reloading a page takes seconds."""
TIMEOUT_S = 3.0
UNWATCHED = "not watched: no Jupyter server knows this process as its kernel, so whoever started it ends it"


class Closes(Protocol):
    """An owner of processes that can end them, called from another thread."""

    def close(self) -> None: ...


class Presence:
    """A thread that stops all runs, resumably, and closes what has processes, once a kernel that had a connection has
    had none for ABSENT_S; then it waits for the next one.

    Args:
        workers: what has processes: the workers, or an interface that has some beside them.
    """

    def __init__(self, workers: Closes = WORKERS) -> None:
        self._workers = workers
        self._ended = threading.Event()
        self._state = UNWATCHED
        self._thread = threading.Thread(target=self._watch, daemon=True, name="presence")
        self._thread.start()

    @property
    def state(self) -> str:
        """Phrase that says what is watched, or why nothing is."""
        return self._state

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join(2 * TIMEOUT_S)

    def _watch(self) -> None:
        kernel, seen, absent_since = _own_kernel(), False, time.monotonic()
        while True:
            self._state = f"watched: runs stop {ABSENT_S:g} s after the last browser has gone" if kernel else UNWATCHED
            connections = kernel.connections() if kernel else None
            if connections:
                seen, absent_since = True, time.monotonic()
            elif connections == 0 and seen and time.monotonic() - absent_since > ABSENT_S:
                self._workers.close()
                seen = False
            if self._ended.wait(ASK_EVERY_S):
                return
            kernel = kernel or _own_kernel()  # a busy server may not have answered


class _Kernel:
    """A kernel as a Jupyter server knows it."""

    def __init__(self, server: dict[str, Any], kernel_id: str) -> None:
        url = f"{server['url'].rstrip('/')}/api/kernels/{kernel_id}"
        headers = {"Authorization": f"token {server['token']}"} if server.get("token") else {}
        self._request = urllib.request.Request(url, headers=headers)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine

    def connections(self) -> int | None:
        """Number of browsers that are connected; None where the server does not say."""
        try:
            with self._opener.open(self._request, timeout=TIMEOUT_S) as answer:
                return int(json.load(answer)["connections"])
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            return None


def _own_kernel() -> _Kernel | None:
    """This process, as one of the running servers knows it."""
    candidates = (_Kernel(server, kernel_id) for kernel_id in _own_id() for server in _running_servers())
    return next((kernel for kernel in candidates if kernel.connections() is not None), None)


def _own_id() -> Iterator[str]:
    """The id of this kernel, if this process is one."""
    from ipykernel.connect import get_connection_file

    try:
        name = Path(get_connection_file()).stem
    except (RuntimeError, OSError):
        return
    yield name.removeprefix("kernel-")


def _running_servers() -> list[dict[str, Any]]:
    from jupyter_server.serverapp import list_running_servers

    try:
        return [server for server in list_running_servers() if "url" in server]
    except (OSError, ValueError, KeyError):  # a server's file went, or is being written; it is asked for again
        return []
