"""Claim of a directory by a run: its config, its row, the newest checkpoint; what all processes agree on."""

from __future__ import annotations

import shutil
from typing import Any

from ibq.config import RunConfig
from ibq.distributed import gather_objects, is_writer, shared_errors
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory
from ibq.schema import flatten
from ibq.training.checkpoint import Checkpoint, load_checkpoint, remove_checkpoint


def check_config(run: RunDirectory, config: RunConfig) -> None:
    """Refuse a directory whose config.json is another config."""
    if run.config.is_file():
        theirs = run.read_config().identity()
        if differing := first_difference(theirs, config.identity()):
            raise ConfigError(f"{run.path} holds a run with {differing}; pass another directory")


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first field, in the order of their names, in which two configs' identities differ, and both values; None
    where none does."""
    theirs, mine = flatten(found), flatten(wanted)
    differing = (name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name))
    return next((f"{name}={theirs.get(name)!r}, not {mine.get(name)!r}" for name in differing), None)


def already_finished(run: RunDirectory, config: RunConfig) -> bool:
    """True if the directory, which must not hold another config, has its row; a collective.

    Raises:
        ConfigError: on all processes, where one sees another config, other files, or a row that is damaged.
    """
    with shared_errors(ConfigError):
        check_config(run, config)
    if agreed(run, "row", "there" if run.finished else "absent") == "absent":
        return False
    with shared_errors(ConfigError):
        status = run.read_row()["status"]
    if (
        is_writer() and status == "ok"
    ):  # a kill may have come between the row and this; of a run that was lost the last state is kept
        tidy(run)
    return True


def tidy(run: RunDirectory) -> None:
    """Remove what a run needs as long as it has no row: its checkpoint, and parts of its evaluation."""
    remove_checkpoint(run.checkpoint)
    shutil.rmtree(run.samples, ignore_errors=True)


def newest_checkpoint(run: RunDirectory, belongs_to: dict[str, str]) -> tuple[Checkpoint | None, list[str]]:
    """`load_checkpoint`, with what all processes agree on; a collective.

    Args:
        belongs_to: hashes of what the run learns from, by their names in the checkpoint's meta: `data_hash`,
            `tokenizer_sha256`.

    Raises:
        ConfigError: on all processes, where they see different checkpoints, or theirs belongs to something else.
    """
    checkpoint, damaged = load_checkpoint(run.checkpoint)
    agreed(
        run,
        "checkpoint",
        f"of step {checkpoint.meta['step']} ({checkpoint.meta['sha256'][:8]})" if checkpoint else "absent",
    )
    meta = checkpoint.meta if checkpoint else belongs_to
    for name, given in belongs_to.items():
        if (trained_on := meta.get(name, given)) != given:
            what, remedy = name.partition("_")[0], "pass the one of before, or forget the run and train it again"
            raise ConfigError(f"{run.path} was trained on {what} {trained_on[:12]}, not {given[:12]}; {remedy}")
    return checkpoint, damaged


def agreed(run: RunDirectory, what: str, seen: str) -> str:
    """State of a run's files as this process sees it, if all see the same; a collective.

    Raises:
        ConfigError: on all processes, where one sees something else.
    """
    first, *others = gather_objects(seen)
    for number, other in enumerate(others, 1):
        if other != first:
            raise ConfigError(
                f"process {number} finds the {what} of {run.path} {other[:40]}, process 0 {first[:40]}; "
                "all processes need the same folders of runs and data"
            )
    return seen
