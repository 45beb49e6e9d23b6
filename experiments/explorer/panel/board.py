"""Whole interface: settings at the left; at the right runs side by side, and the figures that compare them.

The kernel never draws and never waits: a task looks at the directories of runs twice a second and has the figure that
is on the screen drawn by another process when there is something new.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import ipywidgets as widgets

from experiments.explorer.background import Background
from experiments.explorer.drawing import Drawn, Shown, draw_png
from experiments.explorer.live import project_runs
from experiments.explorer.panel.card import RunCard
from experiments.explorer.panel.parts import CSS, note, problem
from experiments.explorer.panel.settings import SettingsForm
from experiments.explorer.panel.side import ChangeForm, ExportForm, LoadForm
from experiments.explorer.presence import UNWATCHED, Presence
from experiments.explorer.run import WORKERS, ExplorerRun, Workers, load_run, new_run
from experiments.explorer.tabs import TABS
from experiments.explorer.view import LETTERS, SHORT_NAMES, fields_that_differ
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.schema import flatten

PLACES = len(LETTERS)
TICK_S, LOOK_S = 0.1, 0.4
FAILURE_S = 5.0
"""So long a failure of the interface itself is shown after it has gone."""
FIGURE_SIZE = (8.3, 5.0)
TRIES = 2
"""How often a figure is drawn when the process dies over it."""
DEAD = "the process that {} has ended"
WELCOME = "No run yet. Choose settings at the left and press Train, or load a run."
LOADING = "What training needs is being loaded, which takes some seconds; a run that is started now begins after that."
SIDES = ("New run", "Change", "Load", "Export")


class Panel:
    """The explorer; `widget` is what to display, `start` sets it going.

    Args:
        config: what the form begins with.
        workers: who trains.
    """

    def __init__(self, config: TrainConfig, workers: Workers = WORKERS) -> None:
        self.workers, self.background, self.cards = workers, Background(), list[RunCard]()
        self._task: asyncio.Task[None] | None = None
        self._presence: Presence | None = None
        self._asleep = False
        """Nobody looks, so nothing is drawn until somebody does something."""
        self._looked = self._failed = -1e9
        self._drawing: Future[Drawn] | None = None
        self._tries_left = TRIES
        self._drawn_at, self._pause_s = -1e9, 0.0
        self._wanted = True
        self._projecting: Future[dict[str, str]] | None = None
        self._pictures: dict[str, bytes] = {}
        self._said = {"failure": "", "figure": "", "UMAP": ""}
        """Sentences that `message` shows, by their subject."""
        self.settings = SettingsForm(config, train=self.train)
        self.change, self.load, self.export = ChangeForm(self._cards), LoadForm(self.show_run), ExportForm(self._cards)
        self.side = _toggles(SIDES, "what to do", "ibq-sides")
        forms = [self.settings.widget, self.change.widget, self.load.widget, self.export.widget]
        self._stack = widgets.Stack(forms, selected_index=0)
        self.tabs = _toggles([(tab.title, name) for name, tab in TABS.items()], "which figure", "ibq-tabs")
        self.umap = widgets.Button(
            description="UMAP", icon="map-o", tooltip="Project codes and features of all runs by UMAP, as they are now"
        )
        self.picture = widgets.Image(format="png", layout={"width": "100%"})
        self.drawn = widgets.HTML()
        self.caption, self.message, self.difference = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._row = widgets.HBox(layout={"width": "100%", "grid_gap": "6px"})
        self.widget = self._arranged()
        self._welcome = widgets.HTML(note(LOADING), layout={"margin": "6px"})
        self.side.observe(lambda _: self._turn(), "value")
        self.tabs.observe(lambda _: self._show_tab(), "value")
        self.umap.on_click(lambda _: self._project())
        self._show_cards()
        self._show_tab()

    # ---------------------------------------------------------------- what a user does

    def train(self, config: TrainConfig) -> RunCard:
        """A new run, begun at once.

        Raises:
            ConfigError: all places are taken.
        """
        self.wake()
        self._free_slot()
        run = new_run(config, self.workers)
        run.train()
        return self.add(run)

    def show_run(self, run_id: str) -> None:
        """A run by its id, beside the others.

        Raises:
            ConfigError: there is no such run, it is shown already, or all places are taken.
        """
        self.wake()
        self._free_slot()
        run = load_run(run_id, self.workers)
        if any(card.run.directory.path == run.directory.path for card in self.cards):
            raise ConfigError(f"run {run.name} is shown already; choose another one")
        self.add(run)

    def start(self) -> None:
        """Begin to load what training and drawing need, and to look at runs; needs a running event loop, as a notebook
        has."""
        self.workers.warm()
        self.background.submit(draw_png, next(iter(TABS)), (), FIGURE_SIZE)  # which loads libraries and fonts
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run())
        self._presence = Presence(_Processes(loop, self.sleep))

    def sleep(self) -> None:
        """End all processes, since nobody looks; runs stop with a checkpoint, and the next thing that somebody does
        wakes this up."""
        self._asleep = True
        self.background.close()
        self.workers.close()

    def wake(self) -> None:
        """Somebody is there."""
        if self._asleep:
            self._asleep, self._wanted = False, True
            self.workers.warm()

    def close(self) -> None:
        """End the task and the processes that draw. Runs that train go on, since another interface may show them."""
        if self._presence is not None:
            self._presence.end()
        if self._task is not None:
            self._task.cancel()
        self.background.close()

    # ---------------------------------------------------------------- what happens by itself

    async def _run(self) -> None:
        while True:
            try:
                self.tick()
            except Exception as error:  # one run that cannot be looked at must not freeze the others
                self._failed = time.monotonic()
                words = f"the runs could not be looked at and are looked at again: {type(error).__name__}: {error}"
                self._say("failure", problem(words))
            if time.monotonic() - self._failed > FAILURE_S:
                self._say("failure", "")
            await asyncio.sleep(TICK_S)

    def tick(self) -> None:
        """Look at the runs if it is time, show a figure that has come, have one drawn if there is something new. Takes
        milliseconds."""
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        if self._drawing is not None and self._drawing.done():
            done, self._drawing = self._drawing, None
            self._take(done)
        if self._wanted and not (self._asleep or self._drawing) and now - self._drawn_at >= self._pause_s:
            self._wanted = False
            shown = tuple(Shown(str(card.run.directory.path), card.slot) for card in self.cards)
            self._drawing = self.background.submit(draw_png, self.tabs.value, shown, FIGURE_SIZE)

    def _look(self) -> None:
        if not self.cards:
            watched = f" The browser is {UNWATCHED}." if self._presence and self._presence.state == UNWATCHED else ""
            self._welcome.value = note(WELCOME + watched if self.workers.is_warm or self._asleep else LOADING)
        states = [card.state for card in self.cards]
        for card in self.cards:
            self._wanted |= card.refresh()
        if states != [card.state for card in self.cards] or self._stack.selected_index == 1:
            self.change.refresh()
        self._look_for_umaps()

    def _take(self, done: Future[Drawn]) -> None:
        """Show a figure, or have it drawn once more where the process died over it."""
        if done.cancelled():
            return
        if isinstance(done.exception(), BrokenProcessPool):
            self._tries_left -= 1
            self._wanted |= self._tries_left > 0
            if not self._tries_left:
                self._tries_left = TRIES
                words = f"the figure could not be drawn: {DEAD.format('draws')}; it is tried again when a run has more"
                self._say("figure", problem(words))
            return
        self._tries_left = TRIES
        self.show(done.result())

    def show(self, drawn: Drawn) -> None:
        """Show a figure and the diagnosis of its runs."""
        self._drawn_at, self._pause_s = time.monotonic(), drawn.seconds  # half of the time is left to training
        self._say("figure", problem(drawn.problem))
        for card in self.cards:
            if (seen := drawn.seen.get(str(card.run.directory.path))) is not None:
                card.diagnose(seen.findings)
        if drawn.problem:
            return
        self._pictures[drawn.name] = drawn.png
        if drawn.name != self.tabs.value:
            self._wanted = True
            return
        self.picture.value = drawn.png
        letters = {str(card.run.directory.path): card.letter for card in self.cards}
        steps = [f"{letters[folder]} at step {seen.step}" for folder, seen in drawn.seen.items() if folder in letters]
        words = f"{TABS[drawn.name].title}: {', '.join(steps) or 'no run'}"
        self.drawn.value = f'<div class="ibq-drawn" aria-label="what the picture shows">{words}</div>'

    def _look_for_umaps(self) -> None:
        """Say that projections are still awaited, or which could not be made."""
        letters = {str(card.run.directory.path): card.letter for card in self.cards}
        if self._projecting is None or self._projecting.cancelled():
            said = ""
        elif not self._projecting.done():
            said = note(
                f"UMAP of {', '.join(letters.values())} is being computed; the first one takes most of a minute."
            )
        elif self._projecting.exception() is not None:
            said = problem(f"UMAP could not be made: {DEAD.format('computes it')}; press UMAP again")
        else:
            failed = [(folder, words) for folder, words in self._projecting.result().items() if words]
            said = "".join(
                problem(f"UMAP of {letters[folder]} could not be made: {words}")
                for folder, words in failed
                if folder in letters
            )
        self._say("UMAP", said)

    # ---------------------------------------------------------------- parts

    def _say(self, about: str, words: str) -> None:
        self._said[about] = words
        self.message.value = "".join(self._said.values())

    def _cards(self) -> list[RunCard]:
        return self.cards

    def _free_slot(self) -> int:
        free = [slot for slot in range(PLACES) if slot not in {card.slot for card in self.cards}]
        if not free:
            raise ConfigError(
                f"{PLACES} runs are shown, which is all there is room for; hide one first (stop it if it trains)"
            )
        return free[0]

    def add(self, run: ExplorerRun) -> RunCard:
        """Show a run in the first free place; ConfigError where there is none."""
        card = RunCard(run, self._free_slot(), copied=self._copy, closed=self._remove, pressed=self.wake)
        self.cards = sorted([*self.cards, card], key=lambda each: each.slot)
        self._show_cards()
        return card

    def _remove(self, card: RunCard) -> None:
        self.cards.remove(card)
        self._show_cards()

    def _copy(self, config: TrainConfig) -> None:
        self.settings.fill(config)
        self.side.value = SIDES[0]

    def _show_cards(self) -> None:
        self._row.children = tuple(card.widget for card in self.cards) or (self._welcome,)
        self._wanted = True
        self._pictures.clear()
        self.umap.disabled = not self.cards
        self.change.refresh()
        self.export.refresh()
        self.difference.value = note(difference_in_words(self.cards))

    def _turn(self) -> None:
        self.wake()
        self._stack.selected_index = SIDES.index(self.side.value)
        if self.side.value == "Load":
            self.load.refresh()
        self.change.refresh()

    def _show_tab(self) -> None:
        self.wake()
        name = self.tabs.value
        self.caption.value = f'<div class="ibq-caption">{TABS[name].caption}</div>'
        self.umap.layout.display = None if name == "map" else "none"
        self._wanted, self._pause_s = True, 0.0
        if name in self._pictures:  # as it was, until it is drawn anew
            self.picture.value = self._pictures[name]

    def _project(self) -> None:
        self.wake()
        if self._projecting is None or self._projecting.done():
            folders = [str(card.run.directory.path) for card in self.cards]
            self._projecting = self.background.submit(project_runs, folders)
        self._look_for_umaps()

    def _arranged(self) -> widgets.Box:
        left = widgets.VBox(
            [self.side, self._stack], layout={"width": "290px", "flex": "0 0 290px", "margin": "0 8px 0 0"}
        )
        tabs = widgets.HBox([self.tabs, self.umap])
        right = widgets.VBox(
            [self._row, self.difference, self.message, tabs, self.picture, self.drawn, self.caption],
            layout={"flex": "1 1 0", "min_width": "0"},
        )
        whole = widgets.HBox([left, right], layout={"width": "100%"})
        box = widgets.VBox([widgets.HTML(CSS, layout={"display": "none"}), whole])
        box.add_class("ibq-explorer")
        return box


class _Processes:
    """Adapter of `Presence`, which calls from its thread, to the kernel's own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, close: Callable[[], None]) -> None:
        self._loop, self._close = loop, close

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._close)


def difference_in_words(cards: list[RunCard]) -> str:
    """In which settings runs differ, and how."""
    if len(cards) < 2:
        return ""
    configs = [card.run.config for card in cards]
    flat = [flatten(config.to_json_dict()) for config in configs]
    paths = [
        path for path in fields_that_differ(configs) if all(path in each for each in flat)
    ]  # not a method's own options
    shown = [f"{_short(path)} {' | '.join(str(each[path]) for each in flat)}" for path in paths[:6]]
    if not shown:
        return f"Runs {', '.join(card.letter for card in cards)} have the same settings."
    more = f", and {len(paths) - 6} more" if len(paths) > 6 else ""
    return f"{' | '.join(card.letter for card in cards)} differ in: {'; '.join(shown)}{more}."


def _short(path: str) -> str:
    return SHORT_NAMES.get(path, path.rpartition(".")[2].replace("_", " "))


def _toggles(options: Any, tooltip: str, name: str) -> widgets.ToggleButtons:
    toggles = widgets.ToggleButtons(options=options, tooltip=tooltip, style={"button_width": "auto"})
    toggles.add_class(name)
    return toggles
