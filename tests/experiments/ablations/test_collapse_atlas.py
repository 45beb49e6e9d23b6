"""The collapse atlas: what its arms are, and what map, lines, table and sentences say of a study whose runs are
pretended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import rows
from experiments.ablations import ABLATIONS, Arm
from experiments.ablations.collapse_atlas import collapse_map
from experiments.ablations.collapse_atlas.arms import LENGTHS, METHODS, NONE, name
from experiments.ablations.collapse_atlas.remedies import TRIED
from experiments.analysis.findings import findings
from experiments.cells import Cell, unique_runs
from experiments.report import figures, tables
from experiments.report.figures.collapse import BORDER
from experiments.study import Study, advance
from ibq.schema import flatten

ABLATION = ABLATIONS["collapse_atlas"]
OUTSIDE = name("outside", "fast", 256)


def alive(arm: Arm) -> bool:
    """A world in which VQ is dead, VQ from features lives, IBQ needs 64 dimensions, and what is outside dies beyond 64
    at the full rate."""
    method, D = arm.levels["method"], int(arm.levels["D"])
    if method == "IBQ outside its recipe":
        long = math.sqrt(D) * LENGTHS[arm.levels["initial length"]] > 10
        return arm.levels["rate"] != "×3" or not long or arm.levels["remedy"] != NONE
    return method == "VQ, features" or (method == "IBQ" and D >= 64)


def pretend(cell: Cell, state: bool | None) -> None:
    """A finished run of a codebook that lives or not, or whose loss was not finite."""
    quantizer = cell.config.quantizer
    share = 0.5 if state else 0.02
    metrics = {
        "perplexity_share": share,
        "perplexity": share * quantizer.codebook_size,
        "usage": share,
        "bits": 5.0,
        "l1": 0.2 - share / 10,
    }
    facts = {
        "run": cell.run.path.name,
        "method": quantizer.method,
        "seed": cell.seed,
        "codebook_size": quantizer.codebook_size,
    }
    facts |= {"code_dim": quantizer.code_dim, "train_seconds": 40.0, "fid[fashion-cnn]": 20 * (1 - share), "gap": 3.0}
    lost = {"status": "nan", "reason": "loss is nan at step 40"}
    cell.run.path.mkdir(parents=True)
    line = {"logit_spread": 1.0, "max_probability": 0.1 if state else 0.9, "usage": share, "uniform_usage": 1.0}
    line |= {"perplexity": metrics["perplexity"], "uniform_perplexity": 900.0}
    cell.run.history.write_text("".join(json.dumps({"step": step, **line}) + "\n" for step in (10, 300)))
    cell.run.row.write_text(json.dumps(facts | (lost if state is None else {"status": "ok", **metrics})))


def played(folder: Path, patch: pytest.MonkeyPatch, state: Callable[[Arm], bool | None]) -> Study:
    """A quick study whose runs are pretended until nothing waits."""
    patch.setenv("IBQ_RUNS", str(folder))
    study = Study("quick", ("collapse_atlas",))
    new = unique_runs(study.cells)
    while new:
        for cell in new:
            pretend(cell, state(cell.arm))
        study, joined = advance(study)
        new = unique_runs(joined)
    return study


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, pd.DataFrame]]:
    with pytest.MonkeyPatch.context() as patch:
        study = played(tmp_path_factory.mktemp("atlas"), patch, alive)
        yield study, rows.load(study)


@pytest.fixture(scope="module")
def map_(world: tuple[Study, pd.DataFrame]) -> Iterator[Figure]:
    figure = drawn(figures.draw("collapse_map", world[0], ABLATION, world[1]))
    yield figure
    figures.plt.close(figure)


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def borders(axis: Axes) -> set[tuple[tuple[float, float], tuple[float, float]]]:
    """The ends of the border's pieces in a map."""
    mine = [line for line in axis.lines if line.get_color() == BORDER["color"]]
    return {tuple(map(tuple, line.get_xydata().tolist())) for line in mine}  # type: ignore[misc]


def configs() -> dict[str, dict[str, object]]:
    study = Study("quick", ("collapse_atlas",))
    return {cell.arm.name: flatten(cell.config.to_json_dict()) for cell in [*study.cells, *study.waiting]}


def test_the_lengths_that_test_the_mechanism_are_those_of_the_other_dimension() -> None:
    lengths = {
        arm.name: LENGTHS[arm.levels["initial length"]] * math.sqrt(int(arm.levels["D"])) for arm in ABLATION.arms
    }
    assert lengths[OUTSIDE + "_short"] == pytest.approx(lengths[name("outside", "fast", 32)])
    assert lengths[name("outside", "fast", 32) + "_longer"] == pytest.approx(lengths[OUTSIDE])


def test_remedies_change_what_they_say_and_nothing_else() -> None:
    flat = configs()
    changed = {
        "root": {"quantizer.logit_scale"},
        "quarter_logits": {"quantizer.logit_scale"},
        "warm_entropy": {"quantizer.entropy_temperature"},
        "strong_entropy": {"quantizer.entropy_weight"},
        "double": {"quantizer.double"},
        "short": {"quantizer.init_scale"},
    }
    for word, fields in changed.items():
        assert {
            field for field in flat[OUTSIDE] if flat[OUTSIDE][field] != flat[f"{OUTSIDE}_{word}"][field]
        } == fields, word
    assert {field for field in flat[OUTSIDE] if flat[OUTSIDE][field] != flat["outside_usual_256"][field]} == {
        "optim.lr"
    }
    order = {field for field in flat[OUTSIDE] if flat[OUTSIDE][field] != flat["ibq_single_fast_256"][field]}
    assert order == {"quantizer.beta_on"}
    means = {
        field
        for field in flat["ibq_usual_64"]
        if flat["ibq_usual_64"][field] != flat["ibq_usual_64_small_means"][field]
    }
    assert means == {"accumulate"}


def test_every_remedy_and_claim_is_of_an_arm_that_is_certain() -> None:
    certain = {arm.name for arm in ABLATION.arms if arm.between is None}
    assert {remedy.arm for remedy in TRIED} <= certain
    assert {arm for contrast in ABLATION.contrasts for arm in (contrast.without, contrast.with_)} <= certain
    assert {row.arm for row in ABLATION.paper_rows} <= certain


def test_points_that_equal_arms_of_other_ablations_share_their_runs() -> None:
    others = Study("quick", ("vq_vs_ibq", "code_dimension", "codebook_size", "double_quant_loss"), seeds=1).cells
    runs = {f"{cell.ablation.name}/{cell.arm.name}": cell.run.path for cell in others}
    study = Study("quick", ("collapse_atlas",))
    mine = {cell.arm.name: cell.run.path for cell in [*study.cells, *study.waiting]}
    assert mine["ibq_usual_64"] == runs["vq_vs_ibq/ibq_published"]
    assert mine["vq_usual_64"] == runs["vq_vs_ibq/vq_published"]
    assert mine["vq_features_usual_64"] == runs["vq_vs_ibq/vq_features"]
    assert mine["ibq_usual_256"] == runs["code_dimension/ibq_256"]
    assert mine["ibq_usual_64_fourfold"] == runs["codebook_size/ibq_fourfold"]
    assert mine["ibq_single_slow_64"] == runs["double_quant_loss/single_slow"]


def test_cells_go_where_the_border_is(world: tuple[Study, pd.DataFrame]) -> None:
    study, table = world
    trained = set(table["arm"])
    assert set(table["status"]) == {"ok"}
    assert study.waiting == []
    assert len(trained) <= 60
    assert {"ibq_slow_64", "ibq_fast_64", "outside_fast_64", "outside_fast_128", "ibq_slow_32"} <= trained
    assert not trained & {
        "ibq_slow_128",
        "ibq_usual_16",
        "vq_slow_256",
        "vq_fast_64",
        "vq_features_slow_64",
        "ibq_uniform_fast_16",
    }
    absent = collapse_map.left_out(ABLATION, table)
    assert all(absent.values())
    assert sorted(absent) == sorted(arm.partition("/")[2] for arm in study.agreeing)


def test_the_border_runs_between_cells_that_differ_and_hatching_covers_what_was_left_out(
    world: tuple[Study, pd.DataFrame], map_: Figure
) -> None:
    _, table = world
    maps = dict(zip(METHODS, [axis for axis in map_.axes if axis.get_subplotspec() is not None][::4], strict=True))
    assert borders(maps["VQ"]) == borders(maps["VQ, features"]) == set()
    at_16 = {
        ((1.5, y - 0.5), (1.5, y + 0.5)) for y in (0, 2)
    }  # D = 32 is dead at the slow rate and was inferred at the fast one
    assert at_16 & borders(maps["IBQ"])
    assert ((3.5, 1.5), (3.5, 2.5)) not in borders(maps["IBQ outside its recipe"])  # D = 128 is dead there
    assert ((2.5, 1.5), (2.5, 2.5)) in borders(maps["IBQ outside its recipe"])
    assert ((3.5, 1.5), (4.5, 1.5)) in borders(maps["IBQ outside its recipe"])  # lives at the usual rate
    hatched = [patch for patch in maps["VQ"].patches if getattr(patch, "get_hatch", lambda: None)()]
    assert len(hatched) == sum(
        arm.name not in set(table["arm"]) for arm in collapse_map.on_map(ABLATION, "VQ").values()
    )


def test_the_papers_setting_is_said_and_marked_at_the_edge(world: tuple[Study, pd.DataFrame], map_: Figure) -> None:
    _, table = world
    words = collapse_map.paper_in_words(ABLATION, table)
    assert (
        words
        == "the paper's setting (K = 16,384, D = 256, rate 0.0001): below the lowest rate (0.0003), with 16 times the "
        "codes"
    )
    assert words in [text.get_text() for text in map_.legends[0].get_texts()]
    markers = [line for line in map_.axes[0].lines if line.get_marker() == "v"]
    assert [tuple(line.get_xydata()[0]) for line in markers] == [(4, -0.5)]  # type: ignore[index]
    gpu = table.assign(**{"codebook_size": 16384, "config.optim.lr": 1e-4})
    assert collapse_map.paper_in_words(ABLATION, gpu).endswith("among its rates, with as many codes")


def test_lines_join_arms_that_differ_in_one_axis_alone(world: tuple[Study, pd.DataFrame]) -> None:
    study, table = world
    for factor in ("K", "tokens a mean", "initial length"):
        found = collapse_map.lines(ABLATION, factor)
        assert found
        for line in found:
            assert len({tuple(level for key, level in arm.levels.items() if key != factor) for arm in line.arms}) == 1
    figure = drawn(figures.draw("collapse_axes", study, ABLATION, table))
    lengths = [
        sorted(line.get_xdata()) for line in figure.axes[2].lines if len(line.get_xdata()) > 1 and line.get_ls() == "-"
    ]
    assert [pytest.approx([math.sqrt(32), 16]), pytest.approx([math.sqrt(32), 16])] == lengths[:2]
    figures.plt.close(figure)


def test_the_table_of_remedies_has_every_remedy_and_a_diagnosis_where_rows_have_one(
    world: tuple[Study, pd.DataFrame],
) -> None:
    _, table = world
    remedies = tables.build("remedies", ABLATION, table)
    assert len(remedies) == len(TRIED)
    states = dict(zip(remedies["arm"].str.split().str[1], remedies["codebook"], strict=True))
    assert states[OUTSIDE] == "collapsed"
    assert states[f"{OUTSIDE}_root"] == states[f"{OUTSIDE}_short"] == "lives"
    assert set(remedies["largest probability, first → last"]) == {"0.100 → 0.100", "0.900 → 0.900"}
    assert "diagnosis" not in remedies
    with_one = tables.build("remedies", ABLATION, table.assign(diagnosis="assignments saturated"))
    assert set(with_one["diagnosis"]) == {"assignments saturated"}
    pending = tables.build("remedies", ABLATION, table.assign(status="pending"))
    assert set(pending["codebook"]) == {"pending"}


def test_the_finding_says_where_each_method_lives_and_what_mends_it(world: tuple[Study, pd.DataFrame]) -> None:
    study, table = world
    said = " ".join(findings(ABLATION, table))
    assert f"{len(study.agreeing)} cells between agreeing neighbours were left out." in said
    assert "VQ: has collapsed at every point of rate and D that was trained (" in said
    assert "VQ, features: lives at every point" in said
    assert "IBQ outside its recipe: has collapsed at D = 128 (×3 2.0%), D = 256 (×3 2.0%); lives at D = 16" in said
    assert (
        "outside its recipe: of what was tried at D = 256, these bring it back: codes as long as at D = 32 (50.0%); "
        "logits over √D" in said
    )
    assert "outside its recipe: of what was tried at D = 256, these do not: 0.25 on the codebook term (2.0%)." in said
    assert "have no result" not in said
    assert "wait" not in said


def test_runs_that_are_not_finite_have_collapsed_and_say_so_on_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = played(tmp_path, monkeypatch, lambda arm: None if arm.levels["rate"] == "×3" else True)
    table = rows.load(study)
    assert "vq_fast_16" in set(table["arm"])  # between a live corner and one that was lost
    figure = drawn(figures.draw("collapse_map", study, ABLATION, table))
    assert "nan" in [text.get_text() for text in figure.axes[0].texts]
    figures.plt.close(figure)
    remedies = tables.build("remedies", ABLATION, table)
    assert "collapsed" in set(remedies["codebook"])
    assert "not finite" in " ".join(findings(ABLATION, table))


def test_without_runs_there_is_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("quick", ("collapse_atlas",))
    table = rows.load(study)
    assert [figures.draw(each, study, ABLATION, table) for each in ABLATION.figures] == [None] * len(ABLATION.figures)
    assert not any("collapsed if" in sentence for sentence in findings(ABLATION, table))
