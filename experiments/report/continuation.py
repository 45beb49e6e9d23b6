"""The half of an ablation's question that another ablation answers, shown beside its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from experiments import rows as rows_module
from experiments.ablations import ABLATIONS, Ablation
from experiments.report import tables
from experiments.runner.plan import command
from experiments.study import Study
from ibq.errors import ConfigError


@dataclass(frozen=True)
class Continued:
    """Rows of the other ablation, and what is shown of them.

    Args:
        ablation: the other one, of whose contrasts those that belong here are shown.
        rows: its rows, under the same preset, seeds and fields.
        note: what is missing, and the command that trains it; empty where nothing is.
    """

    ablation: Ablation
    rows: pd.DataFrame
    note: str

    @property
    def has_result(self) -> bool:
        return bool((self.of_shown_arms["status"] == "ok").any())

    @property
    def of_shown_arms(self) -> pd.DataFrame:
        """The rows of the arms that belong here."""
        arms = {arm for contrast in self.ablation.contrasts for arm in (contrast.without, contrast.with_)}
        return self.rows[self.rows["arm"].isin(arms)]

    def arms_table(self) -> pd.DataFrame:
        return tables.build("arms", self.ablation, self.of_shown_arms)


def other_half(study: Study, ablation: Ablation) -> Continued | None:
    """The other half of an ablation of a study, None where it has none."""
    if not ablation.shows_too or study.grid:
        return None
    name = ablation.shows_too[0].partition("/")[0]
    title = ABLATIONS[name].title
    shown = tuple(each for each in ABLATIONS[name].contrasts if f"{name}/{each.name}" in ablation.shows_too)
    elsewhere = tuple(each for each in ABLATIONS[name].contrasts if each not in shown)
    other = replace(ABLATIONS[name], contrasts=shown, shown_elsewhere=elsewhere)
    try:
        its_study = study.of(name)
        rows = rows_module.load(its_study)
    except ConfigError as error:  # a changed field that its arms differ in
        return Continued(other, pd.DataFrame(columns=["ablation", "arm", "status"]), f"{title}: none, since {error}.")
    its_half = Continued(other, rows[rows["ablation"] == name], "")
    if its_half.of_shown_arms["status"].isin(["ok", "nan"]).all():
        return its_half
    return replace(its_half, note=f"{title} is trained by the ablation {name}: {command(its_study, name)}")
