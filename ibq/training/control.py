"""Commands to a run that trains, through control.jsonl in its directory: pause, resume, stop, interventions.

Whoever steers a run (the explorer, a script, an editor) appends lines; the trainer reads them before each step, and
obeys each once, whatever becomes of its process.

    {"command": "pause"}      {"command": "resume"}      {"command": "stop"}
    {"fields": {"optim.lr": 1e-4}, "restart_dead": true}

The trainer's own lines say what has been obeyed, and why a line was refused:

    {"obeyed": 3, "step": 120}      {"refused": 4, "reason": "..."}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, get_args

from pydantic import ValidationError

from ibq.distributed import is_writer, world_size
from ibq.errors import nearest, one_sentence
from ibq.run_directory import RunDirectory, append_line, read_lines
from ibq.training.interventions import Intervention, read_interventions

Command = Literal["pause", "resume", "stop"]
POLL_S = 0.02
"""Between two looks at the file while a run is paused."""


def send(run: RunDirectory, command: Command | Intervention) -> None:
    """Ask something of whoever trains a run, now or next."""
    if isinstance(command, Intervention):
        append_line(run.control, {"fields": command.fields, "restart_dead": command.restart_dead})
    else:
        append_line(run.control, {"command": command})


class ControlFile:
    """Lines of a control.jsonl, each read once; what the trainer has obeyed or refused is not pending."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._offset = self._number = 0
        self._done = 0  # commands up to this line have been obeyed

    def read(self) -> list[tuple[int, dict[str, Any]]]:
        """New lines, by their numbers from 1; those obeyed are left out."""
        try:
            if os.stat(self.run.control).st_size <= self._offset:
                return []
        except FileNotFoundError:
            return []
        with open(self.run.control, "rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = whole.split(b"\n") if newline else []
        numbered = [(number, parsed(line)) for number, line in enumerate(lines, self._number + 1) if line.strip()]
        self._number += len(lines)
        self._done = max([self._done, *(record.get("obeyed", 0) for _, record in numbered)])
        refused = {record.get("refused") for _, record in numbered}
        said = [(number, record) for number, record in numbered if not record.keys() & {"obeyed", "refused"}]
        return [(number, record) for number, record in said if number > self._done and number not in refused]


def parsed(line: bytes) -> dict[str, Any]:
    """A line's JSON object; for anything else a command that is refused."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {"command": line.decode(errors="replace")[:40]}


def last_command(run: RunDirectory) -> str:
    """The last of "pause", "resume" and "stop" that a run has been sent, "" if there is none."""
    commands = [record.get("command") for record in read_lines(run.control)]
    return next((command for command in reversed(commands) if command in get_args(Command)), "")


def on_their_way(run: RunDirectory) -> list[Intervention]:
    """Interventions that a run has been sent and has neither recorded nor refused."""
    recorded = {each.line for each in read_interventions(run)}
    sent = [(number, record) for number, record in ControlFile(run).read() if "command" not in record]
    waiting = []
    for number, record in sent:
        if number not in recorded:
            with suppress(ValidationError):  # the trainer refuses it
                waiting.append(Intervention.model_validate(record | {"step": 0, "line": number}))
    return waiting


class Control:
    """Commands of a run's control.jsonl as its trainer obeys them. Of several processes the first one reads.

    Args:
        run: its directory.
        should_stop: the trainer's other reason to stop, which ends a pause as well.
        refusal: why no intervention can be taken; "": it can.
    """

    def __init__(self, run: RunDirectory, should_stop: Callable[[], bool], refusal: str = "") -> None:
        self._run, self._should_stop, self._file = run, should_stop, ControlFile(run)
        self._refusal = refusal
        if world_size() > 1 and not refusal:
            self._refusal = f"a run with interventions is trained by one process, not by {world_size()}"
        self._recorded = {each.line for each in read_interventions(run)} if is_writer() and not refusal else set()
        self._interventions: list[Intervention] = []
        self._command, self._command_line = "resume", 0
        self._first = True

    def should_stop(self) -> bool:
        """True where the run is to stop before its next step; returns only once the run is not paused."""
        while True:
            if self._should_stop():
                return True
            if not is_writer():
                return False
            self._read()
            if self._command == "stop":
                return not self._interventions  # what was asked before the stop is done, and recorded, first
            if self._command == "resume":
                return False
            time.sleep(POLL_S)

    def stopped(self, step: int) -> None:
        """Record that a stop has been obeyed, so that the next attempt does not."""
        if is_writer() and self._command == "stop" and not self._interventions:
            append_line(self._run.control, {"obeyed": self._command_line, "step": step})

    def take(self) -> list[Intervention]:
        """Interventions since the last time, to be recorded under their `line`."""
        taken, self._interventions = self._interventions, []
        return taken

    def refuse(self, line: int, reason: str) -> None:
        """Record why a line is not obeyed; training goes on without."""
        append_line(self._run.control, {"refused": line, "reason": reason})

    def _read(self) -> None:
        """Take in new lines. Of those that were sent before this attempt the last command counts; later a stop ends the
        attempt, and what follows it is for the next one."""
        for number, record in self._file.read():
            if self._command == "stop" and not self._first:
                return
            if "command" in record:
                if (command := record["command"]) in get_args(Command):
                    self._command, self._command_line = command, number
                else:
                    self.refuse(number, f"command {command!r} is not known; {nearest(str(command), get_args(Command))}")
            elif self._refusal:
                self.refuse(number, self._refusal)
            elif number not in self._recorded:
                try:
                    self._interventions.append(Intervention.model_validate(record | {"step": 0, "line": number}))
                except ValidationError as error:
                    self.refuse(number, one_sentence(error))
        self._first = False
