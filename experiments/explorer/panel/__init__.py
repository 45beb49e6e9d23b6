"""The interface of the explorer, in ipywidgets."""

from experiments.explorer.panel.board import FIGURE_SIZE, Panel

__all__ = ["FIGURE_SIZE", "Panel"]
