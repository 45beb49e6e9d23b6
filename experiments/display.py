"""What the notebooks of ablations put on the screen; figures and tables themselves are those of the report."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown, display

from experiments import continuation, figures, tables
from experiments.ablations import Ablation
from experiments.findings import findings
from experiments.plan import expected_cost, plan_table
from experiments.study import Study


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
    """The half of the question that another ablation answers, from its rows; where it is not trained, the command that trains it."""
    other = continuation.other_half(study, ablation)
    if other is None:
        return
    if other.note:
        display(Markdown(other.note))
    if other.has_result:
        display(Markdown(f"*{tables.TABLES['arms'][1]}*\n\n{tables.markdown(other.arms_table())}"))
        show_finding(other.ablation, other.rows)
