"""python -m experiments: the command line, or one sentence where the environment lacks a package."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from experiments.cli import app
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name!r} is missing; install the project with pip install -e '.[study]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="python -m experiments")
