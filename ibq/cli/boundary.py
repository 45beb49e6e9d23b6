"""Error boundary of the command lines: what a user can mend is one sentence on stderr and exit code 2."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from ibq.errors import ConfigError, DataError, PeerLostError

USER_ERROR, INTERRUPTED, CLOSED = 2, 130, 141
"""Exit codes; the last is that of a program which whoever reads its output has left, as `head` does."""
FOLDERS = ("IBQ_RUNS", "IBQ_REPORTS", "IBQ_DATA", "IBQ_CACHE", "IBQ_WEIGHTS", "IBQ_IMAGENET")
"""Environment variables that name folders."""


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's error is one line on stderr and exit code 2, never a traceback; Ctrl-C and SIGTERM stop resumably, code
    130.

    Of the processes that torchrun has started on a node, the first one says it.
    """

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        for name in FOLDERS:  # made absolute, since notebooks run in a folder of their own
            if os.environ.get(name):
                os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())
        for stream in (sys.stdout, sys.stderr):  # a console of ASCII alone gets "?" for the rest
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            with terminable():
                command(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, since at exit nobody would catch what it raises
        except (ConfigError, DataError, PeerLostError) as error:
            raise _ended(f"error: {error}", USER_ERROR) from None
        except OSError as error:
            what = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
            where = error.filename or "while reading or writing"
            if isinstance(error, BrokenPipeError) and _is_left():
                raise typer.Exit(CLOSED) from None
            raise _ended(f"error: {what}: {where}; nothing finished is lost", USER_ERROR) from None
        except KeyboardInterrupt:
            raise _ended("stopped; the same command goes on from here", INTERRUPTED) from None
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # its module is loaded only where tensors are read
                raise
            sentence = f"error: a run's tensors cannot be read ({error}); forget that run and train it again"
            raise _ended(sentence, USER_ERROR) from None

    return guarded


def _is_left() -> bool:
    """True if nobody reads standard output any more; it is given up then, so that nothing complains at exit."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


@contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM means what Ctrl-C means, so that a command under a scheduler stops as cleanly as by hand."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(sentence: str, code: int) -> typer.Exit:
    from ibq.distributed import last_words  # torch, which `--help` does without

    last_words(sentence, interrupted=code == INTERRUPTED)
    return typer.Exit(code)
