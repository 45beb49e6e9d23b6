"""The command line: python -m experiments COMMAND.

list | plan | train | run | status | report | register | evaluate | bench | rerun | forget | compare | playground
"""

from experiments.cli import benchmarks, playground, runs, studies, train
from experiments.cli.base import app

__all__ = ["app", "benchmarks", "playground", "runs", "studies", "train"]


def main() -> None:
    """Entry point of the command `ibq-study`."""
    app(prog_name="ibq-study")
