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
        title: of the other half.
        ablation: the other one, with the contrasts that belong here alone.
        rows: its rows of the arms that belong here, under the same preset, seeds and fields.
        note: what is missing, and the command that trains it; empty where nothing is.
    """

    title: str
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
    link = ablation.continued
    if link is None or study.grid:
        return None
    other = ABLATIONS[link.ablation]
    other = replace(other, contrasts=tuple(contrast for contrast in other.contrasts if contrast.name in link.contrasts))
    try:
        its_study = replace(study, ablation_names=(other.name,))
        rows = rows_module.load(its_study)
    except ConfigError as error:  # a changed field that its arms differ in
        return Continued(
            link.title,
            other,
            pd.DataFrame(columns=["ablation", "arm", "status"]),
            f"{link.title}: none, since {error}.",
        )
    rows = rows[(rows["ablation"] == other.name) & rows["arm"].isin(link.arms)]
    trains = f"{link.title} is trained by the ablation {other.name}: {command(its_study, other.name)}"
    note = "" if rows["status"].isin(["ok", "nan"]).all() else trains
    return Continued(link.title, other, rows, note)
