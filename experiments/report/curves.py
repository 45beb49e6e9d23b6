"""Every run's curves as CSV: one file an ablation, a line per arm, seed and log step."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments import rows as rows_module
from experiments.ablations import Ablation
from experiments.study import Study, file_name
from ibq.run_directory import write_text

DIGITS = "%.5g"


def curves(study: Study, ablation: Ablation) -> pd.DataFrame:
    """All that the runs of an ablation logged, whether they finished or not; runs of a search have arms of their own.

    Returns:
        Columns arm, seed, run, status, then those of history.jsonl, `step` first; empty while nothing was logged.
    """
    frames = []
    for cell in study.cells:
        if cell.ablation.name == ablation.name and (history := cell.run.read_history()):
            frame = pd.DataFrame(history)
            for name, value in (
                ("status", rows_module.state(cell)),
                ("run", cell.run.path.name),
                ("seed", cell.seed),
                ("arm", cell.arm.name),
            ):
                frame.insert(0, name, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def write(study: Study, ablation: Ablation, folder: Path) -> str | None:
    """Write curves/<ablation>.csv; returns its address within the report, None while there is nothing to write."""
    table, address = curves(study, ablation), f"curves/{file_name(ablation.name)}.csv"
    if table.empty:
        return None
    write_text(folder / address, table.to_csv(index=False, float_format=DIGITS))
    return address
