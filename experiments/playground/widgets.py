"""The playground in a notebook: an image that is redrawn while an asyncio task of the kernel learns a few steps a
frame.

No thread and no process: between two frames the kernel is free for other cells. At most one interface is open in a
kernel; the next one closes it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, ClassVar

import ipywidgets as widgets

from experiments.playground.drawing import Board
from experiments.playground.simulation import DEFAULT_METHODS, METHODS, Playground, Settings
from ibq.errors import ConfigError

COLUMNS, PANEL = 4, 300
MOST_PANELS = 8
FRAMES_PER_SECOND = 15
"""At most."""
PAUSE_AFTER_STEPS = 10_000
"""Of one press of play, since nobody tells a kernel that its page was closed."""


class Interface:
    """Controls and picture; `show` gives the widget to display. It begins paused.

    Args:
        settings: what it begins with, and what reset goes back to, but for what the controls say.
    """

    _open: ClassVar[Interface | None] = None

    def __init__(self, settings: Settings = Settings()) -> None:
        if Interface._open is not None:
            Interface._open.close()
        Interface._open = self
        self._task: asyncio.Task[None] | None = None
        self._distance = settings.distance
        self.frames_per_second = 0.0
        """Of the last second of play; 0 before."""
        wide = {"description_width": "initial"}
        self.play = widgets.ToggleButton(description="Play", icon="play", button_style="primary")
        self.step = widgets.Button(description="Step", icon="step-forward", tooltip="one step of learning")
        self.reset = widgets.Button(
            description="Reset", icon="refresh", tooltip="begin anew, with the methods and the seed chosen here"
        )
        self.arrows = widgets.Checkbox(True, description="arrows", indent=False, layout={"width": "80px"})
        self.seed = widgets.BoundedIntText(
            settings.seed, min=0, max=10**6, description="seed", layout={"width": "150px"}
        )
        self.speed = widgets.FloatSlider(
            settings.speed, min=0, max=4, step=0.1, description="drift, rounds per 500 steps", style=wide
        )
        self.lr = widgets.FloatLogSlider(
            settings.lr, min=-4, max=-0.5, step=0.1, description="learning rate", readout_format=".4f", style=wide
        )
        self.distance = widgets.FloatSlider(
            settings.distance, min=0, max=2.5, step=0.1, description="distance from the origin", style=wide
        )
        self.steps_a_frame = widgets.IntSlider(3, min=1, max=20, description="steps a frame", style=wide)
        self.methods = widgets.SelectMultiple(
            options=list(METHODS), value=DEFAULT_METHODS, rows=8, layout={"width": "220px"}
        )
        self.image = widgets.Image(format="png")
        self.status = widgets.HTML()
        self.play.observe(self._played, "value")
        self.step.on_click(lambda _: self._forward(1))
        self.reset.on_click(lambda _: self.begin())
        for control in (self.speed, self.lr):
            control.observe(lambda _: self.playground.change(self.lr.value, self.speed.value), "value")
        self.arrows.observe(self._arrows_changed, "value")
        self.begin()

    def show(self) -> widgets.Widget:
        """The whole interface as one widget."""
        buttons = widgets.HBox([self.play, self.step, self.reset, self.arrows, self.seed])
        sliders = widgets.VBox([buttons, self.speed, self.lr, self.distance, self.steps_a_frame, self.status])
        chosen = widgets.VBox(
            [widgets.HTML(f"methods (Ctrl or Shift: several, at most {MOST_PANELS}; then Reset)"), self.methods]
        )
        return widgets.VBox([widgets.HBox([sliders, chosen]), self.image])

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def begin(self) -> None:
        """Stop, and begin anew with what the controls say."""
        self._stop()
        try:
            if len(self.methods.value) > MOST_PANELS:
                raise ConfigError(
                    f"{len(self.methods.value)} methods are too many for one screen; choose at most {MOST_PANELS}"
                )
            settings = Settings(self.seed.value, self.lr.value, self.speed.value, self.distance.value)
            self.playground = Playground(self.methods.value, settings)
        except ConfigError as error:
            self.status.value = str(error)
            return
        self._board = Board(self.playground, COLUMNS, PANEL, self.arrows.value)
        self._draw()

    def close(self) -> None:
        """Stop, and take the widgets from the page."""
        self._stop()
        for widget in vars(self).values():
            if isinstance(widget, widgets.Widget):
                widget.close()
        if Interface._open is self:
            Interface._open = None

    def _forward(self, steps: int) -> None:
        self.playground.advance(steps)
        self._draw()

    def _draw(self) -> None:
        self._observed = self.playground.observe()
        self._board.update(self._observed)
        self.image.value = self._board.png()
        rate = f" · {self.frames_per_second:.0f} frames/s" if self.running else ""
        self.status.value = f"step {self.playground.steps:,}{rate}"

    def _arrows_changed(self, change: dict[str, Any]) -> None:
        self._board.arrows = change["new"]
        self._board.redraw(self._observed)
        self.image.value = self._board.png()

    def _played(self, change: dict[str, Any]) -> None:
        self.play.description, self.play.icon = ("Pause", "pause") if change["new"] else ("Play", "play")
        if change["new"]:
            self._task = asyncio.get_running_loop().create_task(self._run())
        else:
            self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self.play.value = False

    async def _run(self) -> None:
        last = self.playground.steps + PAUSE_AFTER_STEPS
        ends = [time.monotonic()]
        try:
            while self.playground.steps < last:
                self._forward(self.steps_a_frame.value)
                await asyncio.sleep(max(ends[-1] + 1 / FRAMES_PER_SECOND - time.monotonic(), 0.01))
                ends = [*ends[-FRAMES_PER_SECOND:], time.monotonic()]
                self.frames_per_second = (len(ends) - 1) / (ends[-1] - ends[0])
        finally:
            if self._task is asyncio.current_task():  # not stopped from outside
                self._task = None
                self.play.value = False
