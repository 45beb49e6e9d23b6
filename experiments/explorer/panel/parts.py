"""Small parts of the interface: its looks, headings, sentences."""

from __future__ import annotations

from html import escape

import ipywidgets as widgets

from experiments.explorer.colors import RUN_HEX

CSS = """<style>
.ibq-explorer { font-size: 13px; --jp-widgets-font-size: 12px; --jp-widgets-inline-height: 24px;
--jp-widgets-inline-label-width: 128px; }
.ibq-explorer .widget-label, .ibq-explorer .jupyter-widgets label { font-size: 12px; }
.ibq-explorer .ibq-form { max-height: 590px; overflow-y: auto; overflow-x: hidden; padding-right: 4px; }
.ibq-heading { font-weight: 600; margin-top: 6px; line-height: 18px; color: #333; border-bottom: 1px solid #ddd; }
.ibq-problem { color: #9c2a00; background: #fff3ec; border-left: 3px solid #d55e00; padding: 3px 6px; line-height:
16px; margin: 3px 0;
  overflow-wrap: anywhere; }
.ibq-note { color: #444; line-height: 16px; }
.ibq-explorer .ibq-card { border: 1px solid #d5d5d5; border-radius: 4px; padding: 3px 6px 4px; min-width: 0;
background: #fff; }
.ibq-title { font-weight: 600; line-height: 18px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
color: #222; }
.ibq-title .letter { color: #fff; border-radius: 3px; padding: 0 5px; margin-right: 4px; }
.ibq-status { line-height: 16px; color: #222; font-variant-numeric: tabular-nums; }
.ibq-bar { height: 5px; background: #e6e6e6; border-radius: 3px; margin: 2px 0; overflow: hidden; }
.ibq-bar div { height: 5px; }
.ibq-explorer .ibq-card .widget-html { min-height: 0; height: auto; margin: 1px 2px; flex: 0 0 auto; }
.ibq-explorer .ibq-card .widget-html-content { min-height: 0; line-height: 16px; }
.ibq-state { font-weight: 600; }
.ibq-findings { line-height: 15px; font-size: 11.5px; color: #444; max-height: 75px; overflow-y: auto; }
.ibq-findings .bad { color: #9c2a00; }
.ibq-explorer .ibq-card button { padding: 0 7px; width: auto; height: 22px; line-height: 22px; margin: 2px 3px 0 0;
font-size: 12px; }
.ibq-explorer .ibq-tabs button { height: 26px; line-height: 26px; font-size: 12.5px; }
.ibq-drawn { color: #777; font-size: 11.5px; line-height: 14px; }
.ibq-caption { color: #555; font-size: 12px; line-height: 15px; }
.ibq-explorer textarea { font-family: monospace; font-size: 11px; line-height: 14px; }
.ibq-explorer .widget-image { max-width: 100%; object-fit: contain; }
</style>"""


def heading(text: str) -> widgets.HTML:
    return widgets.HTML(f'<div class="ibq-heading">{escape(text)}</div>')


def problem(sentence: str) -> str:
    """An error as it stands beside the controls."""
    return f'<div class="ibq-problem" role="alert">{escape(sentence)}</div>' if sentence else ""


def note(sentence: str) -> str:
    """Status, in one sentence."""
    return f'<div class="ibq-note" role="status">{escape(sentence)}</div>' if sentence else ""


def badge(letter: str, slot: int) -> str:
    """The letter of a run on its colour."""
    return f'<span class="letter" style="background:{RUN_HEX[slot]}">{letter}</span>'


def bar(share: float, slot: int, name: str) -> str:
    """Progress bar of a run, in its colour."""
    percent = f"{100 * share:.1f}"
    value = (
        f'role="progressbar" aria-label="{escape(name)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}"'
    )
    return f'<div class="ibq-bar" {value}><div style="width:{percent}%;background:{RUN_HEX[slot]}"></div></div>'
