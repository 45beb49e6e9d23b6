"""Figures of effective dimension over training, from histories that are known."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.ablations.vq_vs_ibq import ABLATION
from experiments.report import figures
from experiments.report.figures import training

STEPS = (10, 20, 30)


def cell(arm: str, history: list[dict[str, Any]], seed: int = 0) -> SimpleNamespace:
    config = SimpleNamespace(quantizer=SimpleNamespace(codebook_size=1024), steps=30)
    run = SimpleNamespace(read_history=lambda: history)
    return SimpleNamespace(arm=ABLATION.arm(arm), seed=seed, config=config, run=run)


def lines(used: float | None, features: float) -> list[dict[str, Any]]:
    line = {"dimension_features": features} | ({} if used is None else {"dimension_used": used})
    return [line | {"step": step} for step in STEPS]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Figure] = []

    def draw(name: str, cells: list[SimpleNamespace]) -> Figure | None:
        monkeypatch.setattr(training, "finished_cells", lambda study, ablation: cells)
        figure: Figure | None = figures.FIGURES[name][0](None, ABLATION, pd.DataFrame())  # type: ignore[arg-type]
        made.extend([figure] if figure else [])
        return figure

    yield draw
    for figure in made:
        figures.plt.close(figure)


def test_a_panel_an_arm_with_its_codes_in_use_and_its_features(drawn: Any) -> None:
    cells = [cell("vq_published", lines(2.0, 5.0)), cell("ibq_published", lines(40.0, 20.0))]
    cells += [cell("ibq_published", lines(41.0, 21.0), seed=1), cell("vq_fair", [{"step": 10, "usage": 0.5}])]
    figure = drawn("dimension_of_each", cells)
    assert [axis.get_title() for axis in figure.axes if axis.lines] == ["A  vq_published", "B  ibq_published"]
    for axis, used, features in zip(figure.axes, (2.0, 40.0), (5.0, 20.0), strict=False):
        assert [list(line.get_ydata()) for line in axis.lines[-2:]] == [[features] * 3, [used] * 3]
        assert axis.get_ylim() == (0, pytest.approx(1.03 * 40))


def test_codebooks_that_are_not_counted_show_their_features(drawn: Any) -> None:
    figure = drawn("dimension_of_each", [cell("vq_published", lines(None, 5.0))])
    assert list(figure.axes[0].lines[-2].get_ydata()) == [5.0] * 3
    over_training = drawn("dimension_over_training", [cell("vq_published", lines(None, 5.0))])
    assert [axis.get_title() for axis in over_training.axes] == ["Dimension, features"]


@pytest.mark.parametrize("name", ["dimension_of_each", "dimension_over_training"])
def test_histories_that_have_none_draw_nothing(drawn: Any, name: str) -> None:
    assert drawn(name, [cell("vq_published", [{"step": 10, "usage": 0.5, "perplexity": 3.0}])]) is None
    assert drawn(name, []) is None
