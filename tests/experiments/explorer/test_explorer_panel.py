"""The interface without a browser: its buttons drive real, tiny runs, and what does not fit is one sentence beside the
controls."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ipywidgets as widgets
import pytest

from experiments.explorer import show
from experiments.explorer.drawing import Drawn, Seen
from experiments.explorer.panel import Panel, board
from experiments.explorer.panel.board import TRIES
from experiments.explorer.panel.card import ALLOWED, BUTTONS
from experiments.explorer.panel.fields import field_at, field_widget, value_of
from experiments.explorer.panel.parts import CSS, problem
from experiments.explorer.run import Workers, explore_folder, new_run
from experiments.explorer.tabs import TABS
from experiments.recipes import get_preset, tokenizer
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.quantizers import Quantizer
from ibq.schema import flatten

LONG = 100_000
PATIENCE_S = 240.0


@pytest.fixture
def panel(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Panel]:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    panel = Panel(tokenizer(get_preset("smoke"), {"method": "ibq"}).with_fields(steps=LONG), workers)
    yield panel
    for card in panel.cards:
        workers.remove(card.run.directory)
        assert card.run.wait(PATIENCE_S)
    panel.close()


def until(panel: Panel, holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        panel.tick()
        time.sleep(0.02)


def shown_buttons(panel: Panel, card: int = 0) -> set[str]:
    return {name for name, button in panel.cards[card].buttons.items() if button.layout.display != "none"}


# --- The way of a run through its buttons -----------------------------------------------------------------------------


def test_buttons_drive_a_run(panel: Panel) -> None:
    panel.settings.button.click()
    (card,) = panel.cards
    until(panel, lambda: card.state == "training" and card.last, "a first point")
    assert "% at step " in card.status.value
    assert shown_buttons(panel) == {"Pause", "Stop", "Reset"}
    assert card.close.layout.display == "none"
    card.buttons["Pause"].click()
    assert ">paused<" in card.status.value  # at once
    assert shown_buttons(panel) == {"Resume", "Stop", "Reset"}
    card.buttons["Resume"].click()
    assert ">training<" in card.status.value
    card.buttons["Stop"].click()
    assert ">stopping<" in card.status.value or ">stopped<" in card.status.value
    until(panel, lambda: card.state == "stopped", "a stop")
    assert shown_buttons(panel) == {"Resume", "Reset"}
    assert card.close.layout.display is None
    step = card.last["step"]
    card.buttons["Resume"].click()
    until(panel, lambda: card.state == "training" and card.last["step"] > step, "it goes on")
    card.buttons["Reset"].click()
    until(panel, lambda: card.state == "new" and not card.recent, "a reset")
    assert not card.run.directory.path.exists()
    assert shown_buttons(panel) == {"Train", "Reset"}
    card.close.click()
    assert panel.cards == []


@pytest.mark.parametrize("paused", [False, True])
def test_a_stop_is_shown_until_it_has_come_true(panel: Panel, paused: bool) -> None:
    """Of a run that is starting, and of one that is paused."""
    panel.settings.button.click()
    (card,) = panel.cards
    if paused:
        until(panel, lambda: card.state == "training", "a run that trains")
        card.buttons["Pause"].click()
    seen = []
    card.buttons["Stop"].click()
    while card.state != "stopped":
        seen.append(card.status.value)
        assert shown_buttons(panel) == {"Resume", "Reset"}
        assert card.close.layout.display == "none"
        until(panel, lambda: card.status.value != seen[-1], "something new")
    assert seen
    assert all(">stopping<" in words for words in seen)


@pytest.mark.processes
def test_the_figure_follows_the_run(panel: Panel) -> None:
    until(panel, lambda: "no run" in panel.drawn.value, "a figure without runs")
    panel.settings.button.click()
    until(
        panel, lambda: "A at step" in panel.drawn.value and "step 0" not in panel.drawn.value, "a figure with a point"
    )
    first = bytes(panel.picture.value)
    assert first.startswith(b"\x89PNG")
    until(panel, lambda: bytes(panel.picture.value) != first, "a newer figure")
    panel.tabs.value = "map"
    assert panel.umap.layout.display is None
    assert TABS["map"].caption in panel.caption.value
    until(panel, lambda: ">Map: A" in panel.drawn.value, "the other figure")
    overview = panel._pictures["overview"]
    panel.tabs.value = "overview"
    assert bytes(panel.picture.value) == overview  # at once, as it was
    panel.sleep()  # nobody looks: no process is left, and none is started
    assert panel.background.pids == []
    for _ in range(20):
        panel.tick()
    assert panel.background.pids == []
    panel.tabs.value = "losses"  # somebody does
    until(panel, lambda: ">Losses: A" in panel.drawn.value, "it wakes up")


@pytest.mark.processes
def test_a_umap_that_cannot_be_made_is_said(panel: Panel) -> None:
    assert panel.umap.disabled
    panel.add(new_run(panel.settings.config(), panel.workers))
    assert not panel.umap.disabled
    panel.umap.click()
    assert "UMAP of A is being computed" in panel.message.value
    until(
        panel,
        lambda: "UMAP of A could not be made: it has no codes yet; press UMAP again" in panel.message.value,
        "a sentence",
    )
    assert "is being computed" not in panel.message.value
    panel.umap.click()
    assert "could not be made" not in panel.message.value


@pytest.mark.processes
def test_the_quantizer_is_switched_on_while_a_run_trains(panel: Panel) -> None:
    panel.side.value = "Change"
    panel.settings.others["quantize_from"].value = "0.9"
    panel.settings.button.click()
    (card,) = panel.cards
    until(panel, lambda: card.state == "training", "a run that trains")
    assert "perplexity" not in card.run.directory.read_history()[-1]
    assert not panel.change.quantize.disabled
    panel.change.quantize.click()
    assert "from its next step: quantizer on" in panel.change.message.value
    panel.change.refresh()
    assert panel.change.quantize.disabled
    until(panel, lambda: "perplexity" in card.run.directory.read_history()[-1], "tokens are counted")
    (change,) = card.run.interventions
    assert change.fields == {"quantize_from": 0.0}
    assert change.step < 0.9 * card.run.steps


@pytest.mark.processes
def test_a_run_is_changed_while_it_trains(panel: Panel) -> None:
    panel.side.value = "Change"
    assert panel.change.apply.disabled
    assert "No run trains or is paused" in panel.change._form.children[0].value
    panel.settings.button.click()
    (card,) = panel.cards
    until(panel, lambda: card.state == "training", "a run that trains")
    assert panel.change.run.value == "A"
    panel.change.apply.click()
    assert "Nothing is different" in panel.change.message.value
    panel.change.fields["optim.lr"].value = "-1"
    panel.change.apply.click()
    assert "optim.lr: Input should be greater than 0" in panel.change.message.value
    panel.change.fields["optim.lr"].value = "1e-4"
    panel.change.fields["quantizer.double"].value = False
    panel.change.apply.click()
    assert "from its next step: learning rate 0.0001, double term off" in panel.change.message.value
    panel.change.restart.click()
    until(panel, lambda: len(card.run.interventions) == 2, "two changes")
    assert card.run.interventions[0].fields == {"optim.lr": 1e-4, "quantizer.double": False}
    assert card.run.interventions[1].restart_dead
    until(panel, lambda: panel.change.fields["optim.lr"].value == "0.0001", "the form shows what the run has now")
    panel.side.value = "Export"
    panel.export.recipe.click()
    assert "restart_dead=True" in panel.export.text.value
    compile(panel.export.text.value, "recipe", "exec")
    panel.export.command.click()
    assert panel.export.text.value.startswith("python -m experiments run")
    assert "What was changed while it trained is not in it" in panel.export.message.value


def test_up_to_four_runs_side_by_side(panel: Panel) -> None:
    for _ in range(4):
        panel.add(new_run(panel.settings.config(), panel.workers))
    assert [card.letter for card in panel.cards] == list("ABCD")
    panel.settings.button.click()
    assert "4 runs are shown, which is all there is room for; hide one first" in panel.settings.problem.value
    panel.cards[1].close.click()
    assert [card.letter for card in panel.cards] == list("ACD")
    assert "have the same settings" in panel.difference.value
    panel.settings.method.value = "vq"
    panel.settings.others["optim.lr"].value = "0.01"
    panel.add(new_run(panel.settings.config(), panel.workers))
    assert [card.letter for card in panel.cards] == list("ABCD")  # each keeps its colour
    assert "learning rate 0.001 | 0.01 | 0.001 | 0.001" in panel.difference.value
    panel.settings.others["optim.lr"].value = "3"
    panel.side.value = "Load"
    panel.cards[1].copy.click()
    assert panel.settings.config() == panel.cards[1].run.config
    assert panel.side.value == "New run"


def test_runs_are_loaded_by_id(panel: Panel, trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    study = trained[0]
    cell = next(cell for cell in study.cells if cell.stage == "tokenizer" and cell.run.finished)
    monkeypatch.setenv("IBQ_RUNS", str(cell.run.path.parent))
    panel.side.value = "Load"
    assert cell.run.path.name in panel.load.name.options
    panel.load.name.value = "absent-s0-0"
    panel.load.button.click()
    assert "run &#x27;absent-s0-0&#x27; cannot be chosen: no run has that id" in panel.load.message.value
    panel.load.name.value = cell.run.path.name
    panel.load.button.click()
    (card,) = panel.cards
    assert (card.state, panel.load.message.value) == ("loaded", "")
    assert shown_buttons(panel) == set()
    assert f"at step {cell.config.steps} of {cell.config.steps}" in card.status.value
    panel.load.button.click()
    assert "is shown already; choose another one" in panel.load.message.value
    assert explore_folder().parent == cell.run.path.parent


# --- The form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(Quantizer.registry))
def test_the_form_gives_back_what_it_was_filled_with(panel: Panel, method: str) -> None:
    config = show.settings("quick", method)
    panel.settings.fill(config)
    assert panel.settings.config() == config
    assert panel.settings.problem.value == ""


@pytest.mark.parametrize("method", sorted(Quantizer.registry))
def test_every_method_can_be_chosen_as_it_is(panel: Panel, method: str) -> None:
    panel.settings.fill(tokenizer(get_preset("quick"), {"method": "vq", "codebook_size": 256}))
    panel.settings.method.value = method
    config = panel.settings.config()
    assert config.quantizer.method == method
    panel.settings.method.value = "vq" if method != "vq" else "ibq"
    assert panel.settings.config().quantizer.codebook_size == 256  # comes back


def test_what_does_not_fit_is_said_in_one_sentence_beside_the_controls(panel: Panel) -> None:
    form = panel.settings
    form.sizes["codebook_size"].value = "many"
    assert "codebook_size" in form.problem.value
    assert 'role="alert"' in form.problem.value
    assert form.button.disabled
    form.sizes["codebook_size"].value = "64"
    assert form.problem.value == ""
    assert not form.button.disabled
    form.options["top_m"].value = "128"
    assert "top_m=128 exceeds codebook_size=64; lower it, or set None for all codes" in form.problem.value
    form.options["top_m"].value = "none"
    form.options["logit_scale"].value = "inverse_sqrt_dim"
    assert form.config().quantizer.model_dump()["logit_scale"] == "inverse_sqrt_dim"
    form.data.value = "fashion"
    assert "no data set has this name; did you mean" in form.problem.value
    form.data.value = "photos"
    assert form.config().data.channels == 3
    form.method.value = "fsq"
    form.options["levels"].value = "8, 8"
    assert "is not the product 64" in form.problem.value


def test_text_boxes_hold_every_kind_of_value(tiny: Callable[..., TrainConfig]) -> None:
    config = tiny("ibq", **{"quantizer.top_m": 4, "optim.clip_norm": 0.5})
    for path in flatten(config.to_json_dict()):
        info, value = field_at(config, path)
        read = value_of(field_widget(path, info, value))
        if value != ():  # which no form shows
            assert read == (list(value) if isinstance(value, tuple) else value), path
    assert problem("a < b") == '<div class="ibq-problem" role="alert">a &lt; b</div>'


# --- The whole --------------------------------------------------------------------------------------------------------


def test_every_control_has_a_name(panel: Panel) -> None:
    panel.add(new_run(panel.settings.config(), panel.workers))
    panel.side.value = "Change"
    panel.side.value = "Load"
    nameless, waiting = [], [panel.widget]
    while waiting:
        widget = waiting.pop()
        waiting += getattr(widget, "children", ())
        if isinstance(widget, (widgets.Button, widgets.ValueWidget)) and not isinstance(
            widget, (widgets.HTML, widgets.Image)
        ):
            name = getattr(widget, "description", "") or widget.tooltip
            nameless += [] if name and widget.tooltip else [repr(widget)]
    assert nameless == []
    assert ".ibq-explorer" in CSS


def test_states_have_buttons_that_exist() -> None:
    assert {name for names in ALLOWED.values() for name in names} == set(BUTTONS)


@pytest.mark.processes
def test_in_a_loop_it_goes_by_itself_and_the_kernel_stays_free(panel: Panel) -> None:
    async def look() -> tuple[str, float]:
        panel.start()
        longest, deadline = 0.0, time.monotonic() + PATIENCE_S
        panel.settings.button.click()
        while "A at step" not in panel.drawn.value or "step 0" in panel.drawn.value:
            assert time.monotonic() < deadline
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)
        panel.close()
        return panel.drawn.value, longest

    drawn, longest = asyncio.run(look())
    assert "Overview: A at step" in drawn
    assert longest < 2.0  # milliseconds, on cores that have nothing else to do


def test_a_look_that_fails_is_said_and_does_not_freeze_the_interface(
    panel: Panel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "FAILURE_S", 0.5)
    look, failures = panel._look, [FileNotFoundError("interventions.jsonl")]
    monkeypatch.setattr(panel, "_look", lambda: look() if not failures else raise_(failures.pop()))

    async def watch() -> None:
        panel.start()
        for holds in (
            lambda: "FileNotFoundError: interventions.jsonl" in panel.message.value,
            lambda: panel.message.value == "",
        ):
            deadline = time.monotonic() + PATIENCE_S
            while not holds():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
        panel.close()

    asyncio.run(watch())
    assert failures == []
    panel._asleep = True  # what is loaded does not matter then
    panel._look()
    assert "The browser is not watched: no Jupyter server knows this process" in panel._welcome.value


def raise_(error: Exception) -> None:
    raise error


def test_a_figure_that_fails_is_said_until_the_next_one(panel: Panel) -> None:
    panel.show(Drawn("overview", b"", {}, "it could not be drawn", 0.0))
    assert "it could not be drawn" in panel.message.value
    panel.show(Drawn("overview", b"png", {}, "", 0.0))
    assert panel.message.value == ""


def test_a_figure_brings_the_diagnosis_of_its_runs(panel: Panel) -> None:
    card = panel.add(new_run(panel.settings.config(), panel.workers))
    assert "nothing to judge yet" in card.findings.value
    folder = str(card.run.directory.path)
    panel.show(Drawn("overview", b"png", {folder: Seen(7, ["too < few"]), "hidden": Seen(9, [])}, "", 0.0))
    assert "too &lt; few" in card.findings.value
    assert "Overview: A at step 7<" in panel.drawn.value


@pytest.mark.processes
def test_a_drawing_process_that_dies_is_replaced_and_said_where_it_dies_again(panel: Panel) -> None:
    until(panel, lambda: "no run" in panel.drawn.value, "a figure without runs")
    for _ in range(TRIES):
        assert "has ended" not in panel.message.value
        panel.tabs.value = "losses" if panel.tabs.value == "overview" else "overview"
        until(panel, lambda: panel._drawing is not None, "a figure that is being drawn")
        panel._drawing = panel.background.submit(os._exit, 1)  # in place of a figure that kills its process
        until(panel, lambda: panel._drawing is None or panel._drawing.done(), "its end")
        panel._wanted = False
        panel.tick()
    assert "the figure could not be drawn: the process that draws has ended; it is tried again" in panel.message.value
    panel.tabs.value = "geometry"
    until(panel, lambda: "Geometry: no run" in panel.drawn.value, "another process's figure")
    assert panel.message.value == ""


@pytest.mark.processes
def test_a_umap_whose_process_dies_is_said(panel: Panel) -> None:
    panel.add(new_run(panel.settings.config(), panel.workers))
    panel._projecting = panel.background.submit(os._exit, 1)
    until(panel, lambda: "UMAP could not be made" in panel.message.value, "a sentence")
    assert "the process that computes it has ended; press UMAP again" in panel.message.value


def test_explore_refuses_what_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="preset 'quik' does not exist; did you mean 'quick'"):
        show.explore("quik")
    with pytest.raises(ConfigError, match="method='vqq' is not a quantizer"):
        show.explore("quick", ["vqq"], headless=True)
    with pytest.raises(ConfigError, match="5 runs were asked for and 4 have room side by side; train fewer at a time"):
        show.explore("quick", ["vq"] * 5, headless=True)
