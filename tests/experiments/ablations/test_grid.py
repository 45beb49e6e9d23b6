"""Grids from the command line: points that equal an arm share its run, maps show what is missing, every wrong grid is
one sentence."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from typer.testing import CliRunner

import experiments
from experiments import rows
from experiments.ablations import ABLATIONS
from experiments.ablations.grid import MOST_ARMS
from experiments.analysis.findings import findings
from experiments.cli import app
from experiments.report import figures, pages, tables
from experiments.study import Study
from ibq.errors import ConfigError

runner = CliRunner()
K, RATE, BETA = "quantizer.codebook_size", "optim.lr", "quantizer.beta"


def grid_rows(study: Study) -> pd.DataFrame:
    """The rows of a study as if it had finished, with numbers that grow from arm to arm."""
    frame = rows.load(study).assign(status="ok", reason="")
    n = len(frame)
    numbers = {
        "perplexity_share": np.linspace(0.1, 0.9, n),
        "bits": np.linspace(2, 8, n),
        "l1": np.linspace(0.1, 0.2, n),
    }
    others = ("perplexity", "usage", "dead_codes", "psnr_db", "ssim", "quantization_error", "train_seconds")
    return frame.assign(**numbers, **dict.fromkeys(others, 1.0))


def lose(frame: pd.DataFrame, line: int, status: str, reason: str = "") -> None:
    frame.loc[line, ["status", "reason"]] = [status, reason]
    frame.loc[line, ["perplexity_share", "bits", "l1"]] = np.nan


def drawn(study: Study, frame: pd.DataFrame) -> Figure:
    figure = figures.draw("heat_map", study, study.ablations[0], frame)
    assert figure is not None
    figure.canvas.draw()
    plt.close(figure)
    return figure


def words(axis: plt.Axes) -> list[str]:
    """Texts in the cells."""
    return [text.get_text() for text in axis.texts if not isinstance(text, Annotation)]


def titles(figure: Figure) -> list[str]:
    """Titles above each row of maps."""
    return [text.get_text() for axis in figure.axes for text in axis.texts if isinstance(text, Annotation)]


def test_a_point_that_equals_an_arm_is_that_arms_run() -> None:
    arms = {cell.arm.name: cell for cell in Study("quick", ("vq_vs_ibq",)).cells if cell.seed == 0}
    grid = {cell.arm.name: cell for cell in Study("quick", grid={K: [256, 1024], RATE: [1e-4, 1e-3]}).cells}
    assert len(grid) == 8
    for base in ("vq_published", "ibq_published"):
        assert grid[f"{base} codebook_size=1024 lr=0.001"].run.path == arms[base].run.path
    assert len({cell.run.path for cell in grid.values()}) == 8
    point = grid["vq_published codebook_size=256 lr=0.0001"].config
    assert (point.quantizer.codebook_size, point.optim.lr) == (256, 1e-4)


def test_a_base_that_scales_or_derives_fields_meets_the_grid() -> None:
    slow = Study("quick", grid={RATE: [1e-3], "steps": [80]}, bases=("single_slow",)).cells[0].config
    assert (slow.optim.lr, slow.steps) == (1e-3, 80)  # as they stand, not times 0.3
    half = Study("quick", grid={"optim.ema_decay": [0.5]}, bases=("quantizers/vq",)).cells[0].config
    assert (half.steps, half.optim.ema_decay) == (150, 0.5)
    binary = [cell.config.quantizer for cell in Study("quick", grid={K: [256, 1024]}, bases=("lfq", "fsq")).cells]
    assert [(q.method, q.codebook_size, q.code_dim) for q in binary] == [
        ("lfq", 256, 8),
        ("lfq", 1024, 10),
        ("fsq", 256, 3),
        ("fsq", 1024, 4),
    ]


def test_a_base_above_the_presets_largest_codebook_was_asked_for() -> None:
    study = Study("quick", grid={RATE: [1e-3]}, bases=("vq_sixteenfold",))
    assert [cell.config.quantizer.codebook_size for cell in study.cells] == [16384]


def test_fields_that_only_fit_together_are_set_together() -> None:
    study = Study("quick", overrides={"model.base_channels": 4}, grid={"model.norm_groups": [2, 4]})
    assert {cell.config.model.norm_groups for cell in study.cells} == {2, 4}


def test_the_same_grid_is_the_same_study() -> None:
    one = Study("quick", grid={K: [1024, 256], RATE: [1e-3, 1e-4]})
    other = Study(
        "quick", grid={RATE: (0.0001, 0.001), K: (256, 1024)}, bases=("vq_published", "vq_vs_ibq/ibq_published")
    )
    assert one.name == other.name
    assert one.name.startswith("quick+grid+optim.lr=0.0001_0.001+quantizer.codebook_size=256_1024-")
    names = {
        Study("quick", grid={RATE: [1e-3]}).name,
        Study("quick", grid={RATE: [1e-3]}, bases=("vq_fair",)).name,
        Study("quick", grid={RATE: [1e-4]}).name,
        Study("quick", overrides={RATE: 1e-4}).name,
        Study("quick", grid={"data.name": ["imagefolder:a,b"]}).name,
        Study("quick", grid={"data.name": ["imagefolder:a", "b"]}).name,
        Study("quick", grid={RATE: [i / 1e4 for i in range(1, 100)]}).name,
    }
    assert len(names) == 7
    assert max(map(len, names)) < 120


def test_values_and_seeds_and_bases() -> None:
    study = Study(
        "quick",
        seeds=2,
        grid={"quantizer.entropy_weight": [0.1, 0]},
        bases=("vq_vs_ibq/vq_entropy", "quantizers/vq_entropy"),
    )
    base, weight = study.ablations[0].factors
    assert base.levels == ("vq_vs_ibq/vq_entropy", "quantizers/vq_entropy")
    assert weight.levels == ("0", "0.1")
    assert base.meaning.endswith(": vq_vs_ibq/vq_entropy, quantizers/vq_entropy (steps ×0.5, optim.lr not searched)")
    assert [cell.seed for cell in study.cells] == [0, 0, 0, 0, 1, 1, 1, 1]
    lists = Study("quick", grid={"model.channel_multipliers": [[1, 2, 4], [1, 2]]})
    assert [cell.config.model.downsampling for cell in lists.cells] == [4, 2, 4, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--grid optim.rl=1,2", ["'optim.rl'", "'optim.lr'"]),
        ("--grid quantizer=1,2", ["'quantizer'"]),
        ("--grid optim.lr", ["--grid 'optim.lr'", "field=value"]),
        ("--grid optim.lr=", ["optim.lr=", "empty"]),
        ("--grid optim.lr=1e-3,,1e-4", ["optim.lr=0.001,,0.0001", "empty"]),
        ("--grid optim.lr=1e-3,0.001", ["optim.lr=0.001", "twice"]),
        ("--grid optim.lr=1e-3 --grid optim.lr=1e-4", ["optim.lr twice", "--grid optim.lr=VALUE,VALUE"]),
        ("--grid optim.lr=1e-3 --set optim.lr=1e-4", ["optim.lr is in --grid and in --set"]),
        ("--grid optim.lr=1e-3,fast", ["vq_published lr=fast", "optim.lr"]),
        ("--grid optim.lr=1e-3,-1", ["lr=-1", "greater than 0"]),
        ("--grid steps=NaN", ["steps=NaN", "nan"]),
        ("--grid seed=1,2", ["seed", "--seeds"]),
        ("--grid quantizer.method=vq,ibq", ["quantizer.method", "--base"]),
        ("--grid optim.lr=1e-3 vq_vs_ibq", ["--grid", "leave out vq_vs_ibq", "--base"]),
        ("--grid optim.lr=1e-3 all", ["--grid", "leave out"]),
        ("--base vq_fair", ["--base vq_fair", "--grid"]),
        ("--grid optim.lr=1e-3 --base vq_fare", ["'vq_fare'", "'vq_fair'"]),
        ("--grid optim.lr=1e-3 --base vq_vs_ibq/vq_fare", ["'vq_vs_ibq/vq_fair'"]),
        (
            "--grid optim.lr=1e-3 --base vq_entropy",
            ["'vq_entropy'", "vq_vs_ibq/vq_entropy or recipe_parts/vq_entropy or quantizers/vq_entropy"],
        ),
        (
            "--grid quantizer.beta=0.1,0.2 --base vq_published --base lfq",
            ["quantizers/lfq", "'quantizer.beta'", "leave out"],
        ),
        ("--grid quantizer.double=true,false", ["vq_vs_ibq/vq_published", "'quantizer.double'"]),
        ("--grid quantizer.codebook_size=256,1000 --base lfq", ["lfq codebook_size=1000", "power of two"]),
        ("--grid quantizer.code_dim=8,10 --base lfq", ["lfq code_dim=8", "set code_dim=5"]),
        ("--grid quantizer.codebook_size=many", ["codebook_size=many", "'many'"]),
        ("--grid quantizer.codebook_size=2.5", ["codebook_size=2.5", "2.5"]),
        ("--grid model.norm_groups=3,4", ["norm_groups=3", "base_channels=4"]),
        ("--grid data.name=mnist", ["name=mnist", "'mnist'"]),
        ("--grid optim.lr=1e-3 --set quantizer.beta_on=both", ["quantizer.beta_on", "--grid quantizer.beta_on=VALUE"]),
        ("--grid optim.lr=1e-3 --set seed=3", ["--seeds"]),
    ],
)
@pytest.mark.usefixtures("folders")
def test_wrong_grids_are_one_sentence_before_anything_trains(options: str, words: list[str]) -> None:
    result = runner.invoke(app, ["plan", "--preset", "smoke", *options.split()])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_a_grid_too_large_for_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"2,000 arms \(2 bases × 1000 of optim.lr\); give at most {MOST_ARMS}"):
        Study("quick", grid={RATE: [float(i) for i in range(1, 1001)]})


@pytest.mark.parametrize("values", [1e-3, "1e-3,1e-4", []])
def test_values_in_python_are_a_list(values: object) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr="):
        Study("quick", grid={RATE: values})


def test_two_fields_make_a_map_a_base_and_outcome() -> None:
    study = Study("quick", grid={K: [256, 1024], RATE: [1e-4, 1e-3, 1e-2]}, seeds=2)
    frame = grid_rows(study)
    lose(frame, 0, "nan", "NaN in the loss")  # seed 0 of the first arm: its other seed counts
    lose(frame, 1, "oom", "out of memory")
    for line in (2, 2 + 12):
        lose(frame, line, "pending")
    figure = drawn(study, frame)
    maps = [axis for axis in figure.axes if axis.texts]
    assert len(maps) == 6  # 2 bases; perplexity / K, bits, L1
    assert "1 of 2" in words(maps[0])[0]
    assert "1 of 2" in words(maps[0])[1]
    assert words(maps[0])[2] == "pending"
    hatched = [patch for patch in maps[0].patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    assert [patch.get_xy() for patch in hatched] == [(1.5, -0.5)]
    assert not any(word in " ".join(words(axis)) for axis in maps for word in ("nan", "None"))
    labels = [label.get_text() for label in maps[-1].get_xticklabels()]
    assert labels == ["0.0001", "0.001", "0.01"]


def test_an_arm_without_a_result_says_why_and_has_no_number() -> None:
    study = Study("quick", grid={"quantizer.beta_on": ["commitment", "codebook", "both"], RATE: [1e-4, 1e-3]})
    frame = grid_rows(study)
    for line, status, reason in (
        (0, "nan", "NaN"),
        (1, "oom", "out of memory"),
        (2, "running", ""),
        (3, "failed", "killed"),
    ):
        lose(frame, line, status, reason)
    ablation = study.ablations[0]
    maps = [axis for axis in drawn(study, frame).axes if axis.texts]
    assert len(maps) == 4  # at one K bits would say what perplexity / K says
    assert words(maps[0])[:4] == ["nan", "oom", "running", "failed"]
    pivot = tables.build("grid", ablation, frame)
    assert list(pivot.columns) == ["outcome", "base", "quantizer.beta_on", "optim.lr=0.0001", "optim.lr=0.001"]
    assert pivot.iloc[0, 2:].tolist() == ["commitment", "nan", "oom"]
    assert pivot.iloc[2, 2:].tolist() == ["both", "39.1", "46.4"]
    sentences = findings(ablation, frame)
    assert sentences[0].startswith("4 of 12 runs have no result")
    assert (
        "vq_published: perplexity / K is highest (46.4%) at beta_on=both lr=0.001 and lowest (39.1%) at beta_on=both "
        "lr=0.0001" in sentences[1]
    )
    assert not any("edge" in sentence for sentence in sentences)


def test_one_field_makes_lines() -> None:
    for values, scale, ticks in (
        ([1e-4, 1e-3, 1e-2], "log", ["0.0001", "0.001", "0.01"]),
        ([0.001, 0.002, 0.003], "linear", ["0.001", "0.002", "0.003"]),
    ):
        study = Study("quick", grid={RATE: values})
        frame = grid_rows(study)
        lose(frame, 2, "nan", "NaN")
        axes = drawn(study, frame).axes
        assert [axis.get_xscale() for axis in axes] == [scale, scale]
        assert [label.get_text() for label in axes[0].get_xticklabels()] == ticks
        assert words(axes[0]) == ["× nan"]
        assert len(axes[0].lines) == 2
        assert tables.build("grid", study.ablations[0], frame).empty
        assert "edge of the grid in optim.lr" in findings(study.ablations[0], frame)[1]


@pytest.mark.parametrize("values", [["commitment", "codebook"], ["both"]])
def test_one_field_of_words_makes_lines_over_names(values: list[str]) -> None:
    study = Study("quick", grid={"quantizer.beta_on": values})
    axes = drawn(study, grid_rows(study)).axes
    assert [label.get_text() for label in axes[0].get_xticklabels()] == values


def test_more_fields_make_more_maps_up_to_a_bound() -> None:
    three = Study("quick", grid={RATE: [1e-4, 1e-3], BETA: [0.1, 0.25], "steps": [50, 100], "batch_size": [16]})
    figure = drawn(three, grid_rows(three))
    assert len([axis for axis in figure.axes if axis.texts]) == 2 * 2 * 2
    assert titles(figure) == [
        f"{base}, steps={steps}" for base in ("vq_published", "ibq_published") for steps in (50, 100)
    ]
    pivot = tables.build("grid", three.ablations[0], grid_rows(three))
    assert len(pivot) == 3 * 2 * 2 * 2
    many = Study("quick", grid={RATE: [1e-4, 1e-3], BETA: [0.1, 0.25], "steps": list(range(50, 70))})
    figure = drawn(many, grid_rows(many))
    assert [title.partition("_")[0] for title in titles(figure)] == ["vq"] * 6 + ["ibq"] * 6
    assert "12 of 40 maps" in figure.get_suptitle()


def test_nothing_is_drawn_before_the_first_result() -> None:
    study = Study("quick", grid={RATE: [1e-4]})
    frame = grid_rows(study).assign(status="pending")
    assert figures.draw("heat_map", study, study.ablations[0], frame) is None


def test_no_label_is_clipped_and_no_cells_text_leaves_its_cell() -> None:
    study = Study("quick", grid={K: [2**i for i in range(6, 14)], RATE: [10.0**-i for i in range(1, 9)]})
    frame = grid_rows(study)
    lose(frame, 5, "interrupted")
    lose(frame, 6, "oom", "out of memory")
    figure = drawn(study, frame)
    box = figure.bbox
    for axis in figure.axes:
        tight = axis.get_tightbbox()
        assert box.x0 <= tight.x0
        assert tight.x1 <= box.x1
        assert box.y0 <= tight.y0
        assert tight.y1 <= box.y1
        if axis.texts:
            cell_width = axis.bbox.width / 8
            assert all(
                text.get_window_extent().width < cell_width for text in axis.texts if not isinstance(text, Annotation)
            )


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    return tmp_path


def test_from_the_command_line_to_the_page(own_folders: Path) -> None:
    """Plan, run with one run there already, run again, status, evaluate, report: the same options name the same
    study."""
    options = [
        "--preset",
        "smoke",
        "--grid",
        "quantizer.codebook_size=16,32",
        "--grid",
        "optim.lr=1e-4,1e-3",
        "--base",
        "vq_published",
    ]
    grid = {K: [16, 32], RATE: [1e-4, 1e-3]}
    experiments.run(preset="smoke", grid={K: [32], RATE: [1e-3]}, bases=("vq_published",))
    assert "4 runs, 1 finished; 18 steps left" in runner.invoke(app, ["plan", *options]).output
    first = runner.invoke(app, ["run", *options])
    assert first.exit_code == 0, first.output
    assert "training 3 runs" in first.output
    study = Study("smoke", grid=grid, bases=("vq_published",))
    written = [cell.run.row.stat().st_mtime_ns for cell in study.cells]
    again = runner.invoke(app, ["run", *options])
    assert "4 of 4 runs are finished already" in again.output
    assert [cell.run.row.stat().st_mtime_ns for cell in study.cells] == written
    assert runner.invoke(app, ["status", *options]).output.count(" ok ") == 4
    assert "4 runs evaluated" in runner.invoke(app, ["evaluate", *options, "--metric", "train_split"]).output
    assert runner.invoke(app, ["rerun", study.cells[1].run.path.name]).exit_code == 0

    [folder] = [folder for folder in (own_folders / "reports").iterdir() if "codebook_size" in folder.name]
    assert folder == study.report_folder
    first, page = ((folder / name).read_text() for name in ("index.html", "grid.html"))
    assert 'href="grid.html"' in first
    assert "claims_of_the_paper" not in first  # nothing was claimed of a grid
    assert 'src="figures/grid_heat_map.png"' in page
    assert "vq_published codebook_size=16 lr=0.001" in page
    assert "--grid quantizer.codebook_size=16,32 --grid optim.lr=0.0001,0.001 --base vq_published" in page
    assert "executed notebook" not in page
    assert {path.name for path in (folder / "tables").iterdir()} == {
        f"grid_{name}.{kind}" for name in ("grid", "arms", "configs") for kind in ("md", "csv", "tex")
    }
    assert {path.stem for path in (folder / "figures").iterdir()} == {
        f"grid_{name}"
        for name in (
            *("heat_map", "usage_over_training", "dimension_over_training"),
            *("rate_distortion", "reconstructions"),
        )
    }
    frame = pd.read_csv(folder / "rows.csv")
    assert set(frame["factor.optim.lr"]) == {1e-4, 1e-3}
    assert pages.widened(study) is study


def test_every_arm_that_is_a_tokenizer_can_be_a_base() -> None:
    for ablation in [ablation for ablation in ABLATIONS.values() if not ablation.of_transformers]:
        bases = tuple(f"{ablation.name}/{arm.name}" for arm in ablation.arms)
        study = Study("quick", grid={"batch_size": [16, 32]}, bases=bases)
        assert len(study.cells) == 2 * len(bases)
