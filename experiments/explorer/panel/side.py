"""Controls beside the settings of a new run: changing a run while it trains, loading one, taking its settings
elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets as widgets

from experiments.explorer.export import command_text, recipe_text
from experiments.explorer.panel.card import CHANGEABLE, RunCard
from experiments.explorer.panel.fields import STYLE, WIDE, field_at, field_widget, value_of
from experiments.explorer.panel.parts import heading, note, problem
from experiments.explorer.run import explore_folder
from experiments.explorer.view import QUANTIZE, describe, in_words, short_name
from experiments.study import Study
from ibq.errors import ConfigError
from ibq.training.interventions import Intervention, live_fields

Cards = Callable[[], Sequence[RunCard]]


def _wide_button(description: str, tooltip: str, icon: str = "", style: str = "") -> widgets.Button:
    return widgets.Button(
        description=description, tooltip=tooltip, icon=icon, button_style=style, layout={"width": "auto"}
    )


def _offer(choice: widgets.Dropdown, options: list[tuple[str, str]]) -> None:
    """New options, of which the one that was chosen stays so where it is still there."""
    before, letters = choice.value, [letter for _, letter in options]
    choice.options = options
    choice.value = before if before in letters else letters[0] if letters else None


class ChangeForm:
    """The weights and rates of a run that trains, each of which takes effect at its next step and leaves a mark on the
    curves.

    Args:
        cards: the runs that are shown.
    """

    def __init__(self, cards: Cards) -> None:
        self._cards = cards
        self._shown: tuple[str, int] | None = None
        self.run = widgets.Dropdown(
            description="run", tooltip="the run to change", options=[], style=STYLE, layout=WIDE
        )
        self.fields: dict[str, widgets.ValueWidget] = {}
        self.apply = _wide_button("Apply changes", "Change the run from its next step on", "check", "primary")
        self.restart = _wide_button(
            "Restart dead codes", "Put codes without a token on features of the next batch", "refresh"
        )
        self.quantize = _wide_button("Quantize from here", "Switch the quantizer of a late run on", "th")
        self.message = widgets.HTML()
        self._form = widgets.VBox()
        self._form.add_class("ibq-form")
        self.widget = widgets.VBox([self.run, self._form, self.message, self.apply, self.restart, self.quantize])
        self.run.observe(lambda _: self._show(), "value")
        self.apply.on_click(lambda _: self._apply())
        self.restart.on_click(lambda _: self._intervene({}, restart_dead=True))
        self.quantize.on_click(lambda _: self._intervene({QUANTIZE: 0.0}))
        self._show()
        self.refresh()

    def refresh(self) -> None:
        """Offer the runs that train or are paused."""
        offered = [
            (f"{card.letter}  {describe(card.run.config)}", card.letter)
            for card in self._cards()
            if card.state in CHANGEABLE
        ]
        if tuple(offered) != tuple(self.run.options):
            _offer(self.run, offered)
            self._show()
        card = self._chosen()
        self.quantize.disabled = card is None or card.run.quantizes
        if card and self._shown != (card.run.name, len(card.run.interventions)):
            self._show()

    def _chosen(self) -> RunCard | None:
        return next((card for card in self._cards() if card.letter == self.run.value), None)

    def _show(self) -> None:
        card = self._chosen()
        self.apply.disabled = self.restart.disabled = card is None
        self.quantize.disabled = card is None or card.run.quantizes
        if card is None:
            self._shown, self.fields = None, {}
            self._form.children = (widgets.HTML(note("No run trains or is paused, so there is nothing to change.")),)
            return
        self._shown = (card.run.name, len(card.run.interventions))
        config = card.run.amended_config
        self.fields = {
            path: field_widget(path, *field_at(config, path), short_name(path))
            for path in live_fields(config)
            if path != QUANTIZE
        }
        self._form.children = tuple(self.fields.values())

    def _apply(self) -> None:
        if (card := self._chosen()) is None:
            return
        config = card.run.amended_config
        given = {path: value_of(widget) for path, widget in self.fields.items()}
        changed = {path: value for path, value in given.items() if value != field_at(config, path)[1]}
        if not changed:
            self.message.value = note("Nothing is different from what the run has.")
            return
        self._intervene(changed)

    def _intervene(self, fields: dict[str, float | bool | str], restart_dead: bool = False) -> None:
        if (card := self._chosen()) is None:
            return
        try:
            card.run.intervene(fields, restart_dead)
        except ConfigError as error:
            self.message.value = problem(str(error))
        else:
            change = in_words(Intervention(fields=fields, restart_dead=restart_dead))
            self.message.value = note(f"Run {card.letter}, from its next step: {change}.")


class LoadForm:
    """Any run of the study or of the explorer, by its id.

    Args:
        load: shows the run of an id; raises ConfigError.
    """

    def __init__(self, load: Callable[[str], None]) -> None:
        self._load = load
        self.name = widgets.Combobox(
            description="run id",
            options=[],
            placeholder="vq-s0-…",
            tooltip="the id of a run, or its beginning",
            style=STYLE,
            layout=WIDE,
        )
        self.button = _wide_button("Load", "Show this run beside the others", "folder-open", "primary")
        self.message = widgets.HTML()
        self.hint = widgets.HTML()
        self.widget = widgets.VBox([heading("A run by its id"), self.name, self.message, self.button, self.hint])
        self.button.on_click(lambda _: self._press())

    def refresh(self) -> None:
        """Read the folders of runs."""
        study = sorted(
            path.parent.name
            for path in Study().runs_folder.glob("*/config.json")
            if not path.parent.name.startswith("transformer-")
        )
        explored = sorted((path.parent.name for path in explore_folder().glob("*/config.json")), reverse=True)
        self.name.options = (*explored, *study)
        self.hint.value = note(
            f"{len(study)} tokenizers of the study and {len(explored)} runs of the explorer are there. The study's are "
            f"only shown; the "
            "explorer's go on where they were."
        )

    def _press(self) -> None:
        try:
            self._load(self.name.value.strip())
        except ConfigError as error:
            self.message.value = problem(str(error))
        else:
            self.message.value = ""


class ExportForm:
    """A run's settings as a recipe, a Python file that trains it again with all changes, and as the command for a
    headless study.

    Args:
        cards: the runs that are shown.
    """

    def __init__(self, cards: Cards) -> None:
        self._cards = cards
        self.run = widgets.Dropdown(
            description="run", tooltip="the run to export", options=[], style=STYLE, layout=WIDE
        )
        self.recipe = _wide_button(
            "As recipe", "A Python file that trains this run again, changes included", "file-code-o"
        )
        self.command = _wide_button("As command", "The command that trains these settings headless", "terminal")
        self.text = widgets.Textarea(
            tooltip="select and copy", layout={"width": "auto", "height": "440px"}, placeholder="the text to copy"
        )
        self.message = widgets.HTML()
        self.widget = widgets.VBox([self.run, widgets.HBox([self.recipe, self.command]), self.message, self.text])
        self.recipe.on_click(lambda _: self._show(self._recipe))
        self.command.on_click(lambda _: self._show(self._command))
        self.refresh()

    def refresh(self) -> None:
        shown = [(f"{card.letter}  {card.run.name}", card.letter) for card in self._cards()]
        if tuple(shown) != tuple(self.run.options):
            _offer(self.run, shown)
        self.recipe.disabled = self.command.disabled = not shown
        if not shown:
            self.message.value = note("No run is shown, so there is nothing to export.")

    def _recipe(self, card: RunCard) -> tuple[str, str]:
        return recipe_text(
            card.run.config, card.run.interventions
        ), f"A Python file for run {card.letter}, changes included."

    def _command(self, card: RunCard) -> tuple[str, str]:
        changed = (
            " What was changed while it trained is not in it, but in the recipe." if card.run.interventions else ""
        )
        return command_text(card.run.config), f"A command that trains the settings of run {card.letter}.{changed}"

    def _show(self, of: Callable[[RunCard], tuple[str, str]]) -> None:
        card = next(card for card in self._cards() if card.letter == self.run.value)
        try:
            self.text.value, said = of(card)
        except ConfigError as error:
            self.message.value = problem(str(error))
        else:
            self.message.value = note(said)
