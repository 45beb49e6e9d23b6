"""Metrics of rows (`ibq.metrics.METRICS`) as numbers and as text."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ibq.metrics import METRICS

NOT_MEASURED = "not measured"


def values(rows: pd.DataFrame, name: str) -> pd.Series:
    """A metric of every row as it is shown; not a number where rows lack it."""
    metric = METRICS[name]
    if metric.column not in rows:
        return pd.Series(math.nan, rows.index)
    shown = metric.scale * rows[metric.column].astype(float)
    return shown / rows[metric.per].astype(float) if metric.per else shown


def compared(rows: pd.DataFrame, name: str) -> pd.Series:
    """A metric on the scale that differences are taken on: as it is shown, or its log2 where ratios count."""
    shown = values(rows, name)
    return np.log2(shown.where(shown > 0)) if METRICS[name].ratio else shown


def measured(rows: pd.DataFrame, name: str) -> bool:
    return bool(values(rows, name).notna().any())


def in_words(rows: pd.DataFrame, name: str) -> str:
    """'12.3 ± 0.4' (mean and sample standard deviation), '12.3' where all values are the same one, or that none was
    measured."""
    shown, digits = values(rows, name), METRICS[name].digits
    if shown.isna().all():
        return NOT_MEASURED
    mean = f"{shown.mean():.{digits}f}"
    return f"{mean} ± {shown.std(ddof=1):.{digits}f}" if shown.nunique() > 1 else mean
