"""The command that samples, run in this process, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq.cli.app import app


def run(*arguments: object) -> None:
    if code := app(["sample", *map(str, arguments)], standalone_mode=False):
        raise SystemExit(code)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one sentence of a command that ends with this exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        app(["sample", *map(str, arguments)])
    assert left.value.code == code
    words = ("error: ", "Error: ", "stopped; ")
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(words)]
    return sentence


def files(out: Path) -> dict[str, bytes]:
    """All there is in a folder, hidden files too, but for the lock."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
