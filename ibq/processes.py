"""What a process that was started by another owes to it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading


def exit_with_parent() -> None:
    """Watch the process that started this one by multiprocessing, and end this one, without ceremony, once it has ended."""
    threading.Thread(target=_exit_once_it_has_ended, daemon=True).start()


def _exit_once_it_has_ended() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
