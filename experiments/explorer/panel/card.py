"""Card of a run among those side by side: its progress, its diagnosis, and the buttons that its state allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from experiments import status
from experiments.explorer.live import LIVE_UMAP
from experiments.explorer.panel.parts import badge, bar, problem
from experiments.explorer.run import ExplorerRun
from experiments.explorer.trainer import LIVE
from experiments.explorer.view import LETTERS, describe
from ibq.config import TrainConfig
from ibq.errors import ConfigError

ALLOWED = {
    "new": ("Train", "Reset"),
    "starting": ("Stop", "Reset"),
    "training": ("Pause", "Stop", "Reset"),
    "paused": ("Resume", "Stop", "Reset"),
    "stopping": ("Resume", "Reset"),
    "stopped": ("Resume", "Reset"),
    "failed": ("Resume", "Reset"),
    "finished": ("Reset",),
    "loaded": (),
}
"""The buttons of every state; those that cannot be used are not shown."""
BUTTONS = {
    "Train": "Train this run from the beginning",
    "Pause": "Hold this run before its next step; its process stays",
    "Resume": "Go on with this run where it was",
    "Stop": "Write a checkpoint and end this run's process; Resume goes on from there, bit for bit",
    "Reset": "End this run at once and remove all that it has written",
}
CHANGEABLE = ("starting", "training", "paused")
ACTIVE = (*CHANGEABLE, "stopping")
"""A run that has a process is not hidden."""


class RunCard:
    """Widgets of one run.

    Args:
        run: what is shown.
        slot: its place, 0 to 3, which gives it letter and colour.
        copied: called with the run's config when its settings are to be copied into the form.
        closed: called with this card when the run is no longer to be shown.
        pressed: called before what a button asks of the run.
    """

    def __init__(
        self,
        run: ExplorerRun,
        slot: int,
        copied: Callable[[TrainConfig], None],
        closed: Callable[[RunCard], None],
        pressed: Callable[[], None],
    ) -> None:
        self._pressed = pressed
        self.run, self.slot = run, slot
        self.recent: list[dict[str, Any]] = []
        """The newest lines of the history."""
        self._asked = ""
        self._stamps: list[tuple[int, int]] = []
        self.title = widgets.HTML(
            f'<div class="ibq-title" '
            f'title="{escape(run.name)}">{badge(self.letter, slot)}{escape(describe(run.config))}</div>'
        )
        self.progress = widgets.HTML()
        self.status, self.findings, self.problem = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.buttons = {
            name: widgets.Button(description=name, tooltip=f"{text} ({self.letter})") for name, text in BUTTONS.items()
        }
        self.copy = widgets.Button(
            description="Copy", tooltip=f"Copy the settings of run {self.letter} into the form of a new run"
        )
        self.close = widgets.Button(
            description="Hide", tooltip=f"Show run {self.letter} no longer; its folder stays and can be loaded again"
        )
        actions = {"Train": run.train, "Pause": run.pause, "Resume": run.resume, "Stop": run.stop, "Reset": run.reset}
        for name, button in self.buttons.items():
            button.on_click(lambda _, name=name: self._press(name, actions[name]))
        self.copy.on_click(lambda _: copied(run.config))
        self.close.on_click(lambda _: closed(self))
        row = widgets.HBox([*self.buttons.values(), self.copy, self.close], layout={"flex_flow": "row wrap"})
        parts = [self.title, self.progress, self.status, self.findings, self.problem, row]
        self.widget = widgets.VBox(parts, layout={"flex": "1 1 0", "max_width": "480px", "border_top": ""})
        self.widget.add_class("ibq-card")
        self.state = ""
        self.refresh()
        self.diagnose(())

    @property
    def letter(self) -> str:
        return LETTERS[self.slot]

    @property
    def last(self) -> dict[str, Any]:
        """The newest line of the history, {} before the first."""
        return self.recent[-1] if self.recent else {}

    def refresh(self) -> bool:
        """Look at the run and show what is new; whether a figure of it would change."""
        run, state = self.run.directory, self.run.state
        shown = (run.history, run.path / LIVE, run.interventions, run.path / LIVE_UMAP, run.evaluation)
        stamps = [_stamp(path) for path in shown]
        changed, self._stamps = stamps != self._stamps, stamps
        if changed:
            self.recent = run.read_recent(status.SPEED_LINES)
        if self._asked and state != self.state:
            self._asked = ""
        if changed or state != self.state or self._asked:
            self.state = state
            self._show()
        return changed

    def diagnose(self, findings: Sequence[str]) -> None:
        """Show the diagnosis of the run as far as the newest figure goes."""
        sentences = "".join(f'<div class="bad">{escape(sentence)}</div>' for sentence in findings)
        nothing = "nothing wrong is seen" if self.recent else "nothing to judge yet"
        said = sentences or f"Diagnosis: {nothing}."
        self.findings.value = (
            f'<div class="ibq-findings" role="status" aria-label="diagnosis of run {self.letter}">{said}</div>'
        )

    def _press(self, name: str, action: Callable[[], None]) -> None:
        self.problem.value = ""
        self._pressed()
        try:
            action()
        except ConfigError as error:
            self.problem.value = problem(str(error))
            return
        self._asked = {
            "Stop": "stopping",
            "Reset": "resetting",
            "Train": "starting",
            "Resume": "resuming",
            "Pause": "pausing",
        }[name]
        self._show()
        self.refresh()

    def _show(self) -> None:
        last, steps = self.last, self.run.steps
        step = last.get("step", 0)
        words = [f'<span class="ibq-state">{escape(self._asked or self.state)}</span>']
        if last:
            usage = f"usage {100 * last['usage']:.1f}%" if "usage" in last else "no tokens counted"
            words.append(f'<span class="ibq-usage">{usage} at step {step} of {steps}</span>')
            words += [f"perplexity {last['perplexity']:,.1f}"] if "perplexity" in last else []
            if "dimension_used" in last and "code_dim" in last:
                words.append(f"{last['dimension_used']:.1f} of {last['code_dim']:,.0f} dimensions")
        else:
            words.append(f"no point yet, {steps} steps to go" if self.state != "loaded" else "it has no history")
        if self.state in ("training", "paused") and (left := status.seconds_left(self.recent, steps)) is not None:
            words.append(status.time_left(left) if step < steps else "evaluating")
        self.status.value = (
            f'<div class="ibq-status" role="status" aria-label="status of run {self.letter}">{" · ".join(words)}</div>'
        )
        self.progress.value = bar(step / steps, self.slot, f"progress of run {self.letter}")
        for name, button in self.buttons.items():
            button.layout.display = None if name in ALLOWED[self.state] else "none"
        self.close.layout.display = "none" if self.state in ACTIVE else None
        if self.state == "failed" and not self.problem.value:
            self.problem.value = problem(self.run.reason)


def _stamp(path: Path) -> tuple[int, int]:
    """Time and size of a file, which change with it; (0, 0) where it is absent."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
