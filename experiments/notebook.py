"""Display of ablations in their notebooks; figures and tables themselves are those of the report."""

from __future__ import annotations

import ast
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
        show_table("verdicts", other.ablation, other.rows)


PARAMETERS: dict[str, Any] = {"preset": str, "seeds": int | None, "overrides": dict, "slots": int | None}
"""Name and type of every parameter that an ablation's notebook takes."""
INJECTED = "# Parameters"
"""First line of the cell that papermill injects."""


def check(namespace: Mapping[str, Any], parameters: Mapping[str, Any] = PARAMETERS) -> None:
    """Refuse unknown names and wrong types among a notebook's parameters; call it with globals() right after them.

    Args:
        namespace: the notebook's globals().
        parameters: name and type of each parameter, where they are not those of an ablation's notebook.

    Raises:
        ConfigError: a parameter that the notebook has not (the nearest one is named), a value of another type, or none.
    """
    for name in _given(namespace, parameters):
        if name not in parameters:
            raise ConfigError(f"notebook parameter {name!r} does not exist; {nearest(name, parameters)}")
    for name, kind in parameters.items():
        if name not in namespace:
            raise ConfigError(f"notebook parameter {name!r} has no value; run the cell of the parameters first")
        value, allowed = namespace[name], get_args(kind) or (kind,)
        if type(value) not in allowed:
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ConfigError(
                f"notebook parameter {name}={value!r} is of type {type(value).__name__}; it must be {names}"
            )


def _given(namespace: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Names that the newest run of the parameters' cell assigned, or the cell that papermill injects behind it.

    The kernel has other names as well: of its startup files, of cells run by hand, and of this notebook's own cells
    where it is run again. In a plain script, which has no cells, every variable is a parameter.
    """
    if "In" not in namespace:
        return [
            name
            for name, value in namespace.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)
        ]
    given: list[str] = []
    for source in reversed(namespace["In"]):
        names = _assigned(source)
        if source.lstrip().startswith(INJECTED):
            given = names + given
        elif 2 * len(parameters.keys() & names) >= len(parameters):  # at least half: one may be misspelt
            return names + given
    return given


def _assigned(source: str) -> list[str]:
    """Names that the statements of a cell assign, [] where it is no Python."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    targets: list[ast.expr] = []
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value:
            targets.append(statement.target)
    return [target.id for target in targets if isinstance(target, ast.Name)]
