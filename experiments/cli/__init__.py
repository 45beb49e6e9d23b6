"""The command line: python -m experiments list | plan | train | run | status | report | evaluate | bench | rerun | forget | compare."""

from experiments.cli import benchmarks, runs, studies, train
from experiments.cli.base import app

__all__ = ["app", "benchmarks", "runs", "studies", "train"]
