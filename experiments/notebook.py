"""Display of ablations in their notebooks; figures and tables themselves are those of the report."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, get_args

import pandas as pd
from IPython.display import Markdown, display

from experiments.ablations import Ablation
from experiments.analysis.findings import findings
from experiments.report import continuation, figures, tables
from experiments.runner.plan import expected_cost, plan_table
from experiments.study import Study
from ibq.errors import ConfigError, nearest


def show_plan(study: Study, ablation: Ablation, slots: int | None) -> None:
    """Arms, and what training them costs."""
    display(Markdown(tables.markdown(plan_table(study, ablation))))
    display(Markdown(expected_cost(study, slots)))


def show_figure(name: str, study: Study, ablation: Ablation, rows: pd.DataFrame) -> None:
    """A figure below its caption, or the word that there is no data yet."""
    figure = figures.draw(name, study, ablation, rows)
    display(Markdown(f"*{figures.caption(name, study, ablation)}*" if figure else f"*No data yet for {name}.*"))
    if figure:
        display(figure)
        figures.plt.close(figure)


def show_table(name: str, ablation: Ablation, rows: pd.DataFrame) -> None:
    """A table below its caption."""
    display(Markdown(f"*{tables.TABLES[name][1]}*\n\n{tables.markdown(tables.build(name, ablation, rows))}"))


def show_finding(ablation: Ablation, rows: pd.DataFrame) -> None:
    """The verdicts, and the finding in words."""
    show_table("verdicts", ablation, rows)
    display(Markdown("\n".join(f"- {sentence}" for sentence in findings(ablation, rows))))


def show_continuation(study: Study, ablation: Ablation) -> None:
    """The half of the question that another ablation answers, from its rows; where it is not trained, the command that
    trains it."""
    other = continuation.other_half(study, ablation)
    if other is None:
        return
    if other.note:
        display(Markdown(other.note))
    if other.has_result:
        display(Markdown(f"*{tables.TABLES['arms'][1]}*\n\n{tables.markdown(other.arms_table())}"))
        show_finding(other.ablation, other.rows)


PARAMETERS: dict[str, Any] = {"preset": str, "seeds": int | None, "overrides": dict, "slots": int | None}
"""Name and type of every parameter that an ablation's notebook takes."""

_OF_IPYTHON = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def check(namespace: Mapping[str, Any], parameters: Mapping[str, Any] = PARAMETERS) -> None:
    """Refuse unknown names and wrong types among a notebook's variables; call it with globals() right after the
    parameters.

    Args:
        namespace: the notebook's globals().
        parameters: name and type of each parameter, where they are not those of an ablation's notebook.

    Raises:
        ConfigError: a variable that is no parameter (the nearest one is named), or a value of another type.
    """
    given = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in _OF_IPYTHON and not isinstance(value, types.ModuleType)
    }
    for name, value in given.items():
        if name not in parameters:
            raise ConfigError(f"notebook parameter {name!r} does not exist; {nearest(name, parameters)}")
        allowed = get_args(parameters[name]) or (parameters[name],)
        if type(value) not in allowed:
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ConfigError(
                f"notebook parameter {name}={value!r} is of type {type(value).__name__}; it must be {names}"
            )
