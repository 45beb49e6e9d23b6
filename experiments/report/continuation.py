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
        ablation: the other one, with the contrasts that belong here alone.
        rows: its rows of the arms that belong here, under the same preset, seeds and fields.
        note: what is missing, and the command that trains it; empty where nothing is.
    """

    ablation: Ablation
    rows: pd.DataFrame
    note: str

    @property
    def has_result(self) -> bool:
        return bool((self.rows["status"] == "ok").any())

    def arms_table(self) -> pd.DataFrame:
        return tables.build("arms", self.ablation, self.rows)


def other_half(study: Study, ablation: Ablation) -> Continued | None:
    """The other half of an ablation of a study, None where it has none."""
    if not ablation.shows_too or study.grid:
        return None
    name = ablation.shows_too[0].partition("/")[0]
    title = ABLATIONS[name].title
    contrasts = [each for each in ABLATIONS[name].contrasts if f"{name}/{each.name}" in ablation.shows_too]
    other = replace(ABLATIONS[name], contrasts=tuple(contrasts))
    try:
        its_study = study.of(name)
        rows = rows_module.load(its_study)
    except ConfigError as error:  # a changed field that its arms differ in
        return Continued(other, pd.DataFrame(columns=["ablation", "arm", "status"]), f"{title}: none, since {error}.")
    arms = {arm for contrast in contrasts for arm in (contrast.without, contrast.with_)}
    rows = rows[(rows["ablation"] == name) & rows["arm"].isin(arms)]
    trains = f"{title} is trained by the ablation {name}: {command(its_study, name)}"
    return Continued(other, rows, "" if rows["status"].isin(["ok", "nan"]).all() else trains)
