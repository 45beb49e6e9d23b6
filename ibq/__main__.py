"""python -m ibq: the command line of the method."""

from __future__ import annotations

from ibq.cli.app import app

if __name__ == "__main__":
    app(prog_name="python -m ibq")
