"""The interface of the explorer, in ipywidgets."""

from experiments.explorer.panel.board import Panel

__all__ = ["Panel"]
