"""The figures of transformers, drawn from rows that are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from transformer_rows import ABLATION, GUIDANCES, QUALITY, arms, finish, known, study

from experiments import rows
from experiments.analysis.transformers import FID
from experiments.report import figures
from experiments.report.figures.labels import Labels
from experiments.study import Study
from ibq.run_directory import write_json

pytestmark = pytest.mark.usefixtures("own_folders")


def change(of: Study, pending: tuple[str, ...], changes: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Finish every arm but those that are pending, and change entries of the rows; those set to None are gone."""
    for cell in arms(of):
        if cell.arm.name not in pending:
            finish(cell)
            row = cell.run.read_row()
            changed = row | changes(row)
            write_json(cell.run.row, {name: value for name, value in changed.items() if value is not None})


def draw(name: str, of: Study) -> Figure:
    figure = figures.draw(name, of, ABLATION, rows.load(of))
    assert figure is not None
    figure.canvas.draw()  # with the layout, so that places are final
    return figure


def foot(figure: Figure) -> str:
    return re.sub(r"\s+", " ", figure.get_supxlabel())


def assert_within(figure: Figure) -> None:
    """No text reaches beyond the figure's edge."""
    whole = figure.bbox
    texts = [text for axis in figure.axes for text in (axis.xaxis.label, axis.yaxis.label, axis.title, *axis.texts)]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for text in texts:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
        assert inside or not text.get_text(), text.get_text()


@pytest.mark.parametrize("name", ABLATION.figures)
def test_every_figure_is_drawn_within_its_edges(name: str) -> None:
    figure = draw(name, known(seeds=2))
    assert_within(figure)
    assert foot(figure) == ""
    figures.plt.close(figure)


@pytest.mark.parametrize("name", ABLATION.figures)
def test_every_figure_of_points_and_samples_names_what_is_missing(name: str) -> None:
    figure = draw(name, known(lost=("vq_features_tokens",), pending=("ibq_deep", "lfq_halves")))
    assert_within(figure)
    said = "No result: B vq_features_tokens (nan), C ibq_deep (waiting), D lfq_halves (waiting)"
    assert (said in foot(figure)) == (name != "loss_over_training")  # whose legend has those that are there
    figures.plt.close(figure)


@pytest.mark.parametrize("name", ABLATION.figures)
def test_without_rows_there_is_no_figure(name: str) -> None:
    assert figures.draw(name, study(), ABLATION, rows.load(study())) is None


def test_samples_are_those_of_the_best_guidance_a_row_a_class() -> None:
    figure = draw("samples", known(best=3.0))
    assert [axis.get_title() for axis in figure.axes] == [
        f"{ABLATION.letter(name)}  {name}\nguidance 3" for name in QUALITY
    ]
    panel = figure.axes[0]
    names = [label.get_text() for label in panel.get_yticklabels()]
    classes = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    assert sorted(names) == sorted(classes)
    picture = np.asarray(panel.images[0].get_array())
    for i, name in enumerate(names):
        row = picture[32 * i : 32 * (i + 1), :, 0]
        assert set(np.unique(row[:, :64])) == {10 * classes.index(name) + 3}  # each class has two samples or three
        assert set(np.unique(row[:, 64:])) <= {0, 10 * classes.index(name) + 3}
    figures.plt.close(figure)


def test_the_sweep_has_a_line_a_run_along_guidance_and_a_ring_at_the_lowest_fid() -> None:
    figure = draw("guidance_sweep", known(seeds=2))
    for axis in figure.axes:
        assert len(axis.lines) == len(axis.collections) == 2 * len(QUALITY)
    sweep = figure.axes[0]
    line, ring = sweep.lines[0], sweep.collections[0]
    assert list(line.get_xdata()) == [6.0, 7.0, 8.0]
    assert list(line.get_ydata()) == [80.0, 40.0, 80.0]
    assert ring.get_offsets().tolist() == [[7.0, 40.0]]
    named = {text.get_text() for text in sweep.texts}
    assert {f"{ABLATION.letter(name)}: 1" for name in QUALITY} <= named
    assert {"2", "3"} <= named
    figures.plt.close(figure)


def test_depths_of_one_method_are_joined_and_fewer_than_two_are_said() -> None:
    figure = draw("depth_scaling", known())
    joined = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in joined] == [[250_000, 1_000_000, 2_250_000]]
    assert foot(figure) == ""
    figures.plt.close(figure)
    for cell in arms(study()):
        if cell.arm.name in ("ibq_shallow", "ibq_deep"):
            cell.run.row.unlink()
    alone = draw("depth_scaling", study())
    assert foot(alone).startswith(
        "Fewer than two depths of one method have a result, so there is no line yet. No result: C"
    )
    figures.plt.close(alone)


def test_bits_stand_against_the_tokenizers_error_and_against_what_is_generated() -> None:
    figure = draw("bits_and_distortion", known())
    for axis, of_arm in zip(figure.axes, (2, 1), strict=True):
        drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if len(line.get_xdata()) == 1}
        assert drawn == {(bits_fid_l1[0], bits_fid_l1[of_arm]) for bits_fid_l1 in QUALITY.values()}
    figures.plt.close(figure)


@pytest.mark.parametrize("times", [1.0, 0.1, 3.0])
@pytest.mark.parametrize(
    "without", [(), ("vq_tokens",), ("vq_tokens", "lfq_tokens", "lfq_halves", "ibq_shallow", "vq_features_tokens")]
)
def test_an_axis_of_distances_has_ticks_where_most_points_lie(without: tuple[str, ...], times: float) -> None:
    change(study(), without, lambda row: {FID: times * row[FID]})
    for name in ("bits_and_distortion", "depth_scaling"):
        figure = draw(name, study())
        axis = figure.axes[1]
        low, high = axis.get_ylim()
        ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
        points = [float(line.get_ydata()[0]) for line in axis.lines if line.get_marker() not in ("None", None, "")]
        assert len(ticks) >= 2
        assert min(ticks) <= np.median(points)
        figures.plt.close(figure)


def test_a_sweep_of_one_guidance_and_an_arm_without_its_first_seed() -> None:
    known(seeds=2)
    others = [f"@{guidance:g}" for guidance in GUIDANCES[1:]]
    change(study(2), (), lambda row: {name: None for name in row if name.endswith(tuple(others))})
    lost = next(cell for cell in arms(study(2)) if cell.arm.name == "ibq_tokens" and cell.seed == 0)
    lost.run.row.unlink()
    figure = draw("guidance_sweep", study(2))
    named = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(named) == sorted(f"{ABLATION.letter(name)}: 1" for name in QUALITY)
    figures.plt.close(figure)


def test_more_bits_than_uniform_tokens_have_are_within_the_figure() -> None:
    change(study(), (), lambda row: {"bits_per_image": 2 * row["bits_per_image"]})
    figure = draw("bits_and_distortion", study())
    most = 2 * max(bits for bits, _, _ in QUALITY.values())
    assert all(axis.get_xlim()[1] > most > 640 for axis in figure.axes)
    figures.plt.close(figure)


def test_labels_keep_apart_while_there_is_room() -> None:
    figure, axis = figures.plt.subplots(figsize=(4, 4))
    axis.set(xlim=(0, 1), ylim=(0, 1))
    labels = Labels(axis, 7)
    for x, y in np.random.default_rng(0).uniform(0.1, 0.9, (60, 2)):
        labels.put("abc", x, y, must=False)
    figure.canvas.draw()
    boxes = [text.get_window_extent().padded(-0.5) for text in axis.texts]  # which are rounded to pixels
    assert len(boxes) > 30
    assert not [(one, other) for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]
    labels.put("must", 0.5, 0.5)
    assert axis.texts[-1].get_text() == "must"
    figures.plt.close(figure)
