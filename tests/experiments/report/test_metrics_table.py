"""The one table of metrics: every number of a row is in it, and nobody else says what a metric is called."""

from __future__ import annotations

import ast

import pandas as pd
import pytest
import torch

from experiments import rows
from experiments.analysis import metrics
from experiments.runner.runs import EVALUATIONS
from experiments.study import ROOT
from ibq.evaluation.tokenizer import OF_PAIRS, PERCEPTUAL
from ibq.metrics import METRICS, NETWORKS, metric_of
from ibq.metrics.dimension import DIMENSIONS
from ibq.metrics.distances import NAMES
from ibq.metrics.quality import ImageQuality
from ibq.metrics.usage import usage_metrics

FACTS = ("config.", "protocol.", "factor.", "search.", "diagnosis", "tokenizer_")
"""Beginnings of columns that hold no metric."""
NUMBERS_OF_PROVENANCE = {"seed", "threads", "cores", "processes", "results_version", "tokens_per_mean"}
NUMBERS_OF_PROVENANCE |= {"generator_version", "transformer_version", "tokens_per_image", "encode_seconds"}


def without_entry(frame: pd.DataFrame) -> list[str]:
    """Columns of numbers that are neither facts nor in the table."""
    numbers = [name for name in frame.select_dtypes("number") if not name.startswith(FACTS)]
    plain = {name: name.removeprefix("tokenizer.") for name in numbers}
    return [
        name
        for name in numbers
        if plain[name] not in NUMBERS_OF_PROVENANCE and not plain[name].startswith(FACTS) and metric_of(name) is None
    ]


def test_every_number_that_a_metrics_function_gives_has_an_entry() -> None:
    quality = ImageQuality()
    quality.update(*torch.zeros(2, 1, 1, 16, 16))
    given = [*usage_metrics(torch.ones(4)), *DIMENSIONS, *quality.compute()]
    given += [f"{name}[fashion-cnn]" for name in (*NAMES, "label_agreement")] + [f"inception.{name}" for name in NAMES]
    given += [f"{name}[efficientnet-lite0]" for name in NAMES] + [*OF_PAIRS.values()]
    given += ["fid[fashion-cnn]@2.5", "tokenizer.fid[fashion-cnn]", "full_test.usage", "first.logit_spread"]
    assert [name for name in given if metric_of(name) is None] == []
    assert metric_of("commit") is None


def test_every_number_of_published_rows_has_an_entry() -> None:
    files = sorted((ROOT / "reports" / "published").glob("*/rows.csv"))
    assert files
    for file in files:
        assert without_entry(pd.read_csv(file, low_memory=False)) == [], file


def test_every_number_of_a_smoke_study_has_an_entry(trained: tuple) -> None:
    frame = rows.load(trained[0])
    assert without_entry(frame.drop(columns=[name for name in frame if ".protocol." in name])) == []


def test_names_are_told_apart_and_every_network_is_an_evaluation() -> None:
    headings = [metric.heading for metric in METRICS.values()]
    assert len(set(headings)) == len(headings)
    assert tuple(NETWORKS) == PERCEPTUAL
    assert NETWORKS.items() <= EVALUATIONS.items()
    assert {metric.network for metric in METRICS.values()} - {""} == set(NETWORKS)


def test_nobody_else_lists_what_metrics_are_called() -> None:
    """Words that are a label and nothing else: with a unit, a network or several words."""
    said = {name for metric in METRICS.values() for name in (metric.heading, metric.axis, metric.change)}
    labels = {name for name in said | {metric.label for metric in METRICS.values()} if any(c in name for c in " [,")}
    labels -= {"usage %"}  # so the paper's own rows name theirs, which are not of the table
    found = []
    for file in sorted([*(ROOT / "experiments").rglob("*.py"), *(ROOT / "ibq").rglob("*.py")]):
        if file != ROOT / "ibq" / "metrics" / "__init__.py":
            nodes = ast.walk(ast.parse(file.read_text()))
            words = [(node.lineno, node.value) for node in nodes if isinstance(node, ast.Constant)]
            found += [f"{file.relative_to(ROOT)}:{line}: {word}" for line, word in words if word in labels]
    assert found == []


@pytest.mark.parametrize(
    ("name", "row", "value"),
    [
        ("usage", {"usage": 0.5}, 50.0),
        ("step_ms", {"train_seconds": 3.0, "config.steps": 60}, 50.0),
        ("fid", {"fid[fashion-cnn]": 8.0}, 8.0),
    ],
)
def test_values_are_those_that_are_shown(name: str, row: dict[str, float], value: float) -> None:
    frame = pd.DataFrame([row])
    assert metrics.values(frame, name).tolist() == [pytest.approx(value)]
    assert metrics.compared(frame, name).tolist() == [pytest.approx(3.0 if name == "fid" else value)]
    assert not metrics.measured(pd.DataFrame({"other": [1.0]}), name)
