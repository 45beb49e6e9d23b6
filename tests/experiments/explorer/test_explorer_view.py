"""Reading of run folders, whole, torn, foreign or removed; every figure of them can be drawn without a warning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.explorer import show
from experiments.explorer.background import Background
from experiments.explorer.drawing import Shown, draw_png
from experiments.explorer.figures import FIGURES, draw
from experiments.explorer.figures.parts import RUN_HEX
from experiments.explorer.tabs import TABS
from experiments.explorer.trainer import LIVE
from experiments.explorer.view import describe, fields_that_differ, in_words, read_view
from ibq.config import TrainConfig, TransformerTrainConfig
from ibq.errors import ConfigError
from ibq.run_directory import RunDirectory, append_line, write_json, write_tensors
from ibq.training.interventions import Intervention, scheduled
from ibq.training.runtime import Runtime
from ibq.training.tokenizer import train_tokenizer

SIZE = (8.3, 5.1)
PATIENCE_S = 240.0
CHANGES = [
    Intervention(step=3, fields={"optim.lr": 1e-4, "quantizer.double": False}),
    Intervention(step=5, restart_dead=True),
]


@pytest.fixture(scope="module")
def run(folders: Path, tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., TrainConfig]) -> RunDirectory:
    """A finished run that was changed twice while it trained."""
    directory = RunDirectory(tmp_path_factory.mktemp("views") / "ibq")
    runtime = Runtime(device="cpu", log_every=1, snapshots=3, eval_images=8, eval_batch_size=8)
    for _ in train_tokenizer(tiny("ibq"), directory.path, runtime, intervene=scheduled(CHANGES)):
        pass
    return directory


@pytest.fixture
def copy(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(run.path, tmp_path / "copy")
    return RunDirectory(tmp_path / "copy")


def live_of(run: RunDirectory, step: int) -> dict[str, torch.Tensor]:
    images = {name: torch.zeros(8, 1, 32, 32, dtype=torch.uint8) for name in ("images_BCHW", "reconstructions_BCHW")}
    return run.read_snapshot(run.snapshot_steps()[0]) | images | {"step": torch.tensor(step)}


def test_a_whole_run(run: RunDirectory) -> None:
    view = read_view(run, slot=2)
    assert view.step == view.tensors_step == 8
    assert view.steps == list(range(1, 9))
    assert [each.step for each in view.interventions] == [3, 5]
    assert view.pictures["reconstructions_BCHW"].shape[0] == 8
    assert view.label == "C  IBQ K=16 D=8 lr=0.001"
    assert in_words(view.interventions[0]) == "learning rate 0.0001, double term off"
    assert in_words(view.interventions[1]) == "restart of dead codes"


def test_the_newest_moment_counts(copy: RunDirectory) -> None:
    write_tensors(copy.path / LIVE, live_of(copy, step=3))
    assert read_view(copy).tensors_step == 8  # a snapshot is newer
    write_tensors(copy.path / LIVE, live_of(copy, step=9))
    view = read_view(copy)
    assert view.tensors_step == 9
    assert not view.pictures["reconstructions_BCHW"].any()


def test_torn_files_are_left_out(copy: RunDirectory) -> None:
    """Files as a kill or a full disk may leave them."""
    (copy.path / LIVE).write_bytes(b"torn")
    newest = copy.snapshots / f"{copy.snapshot_steps()[-1]:08d}.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    lines = copy.history.read_text().splitlines()
    odd = ["null", "[1]", '{"step": "three"}', '{"no": "step"}', '{"step": 8, "loss": "much"}']
    copy.history.write_text("\n".join([*lines[:4], lines[2], *lines[4:7], *odd, '{"step": 9, "lo']))
    append_line(copy.interventions, {"step": -1})
    copy.evaluation.unlink()
    view = read_view(copy)
    assert view.tensors_step == 4
    assert view.steps == list(range(1, 9))
    assert len(view.interventions) == 2
    assert view.pictures == {}


def test_an_empty_run(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> None:
    directory = RunDirectory(tmp_path / "new")
    write_json(directory.config, tiny("vq").to_json_dict())
    view = read_view(directory)
    assert (view.step, view.tensors, view.pictures, view.findings) == (0, {}, {}, [])
    assert view.projection is None


def test_foreign_folders_are_refused_in_one_sentence(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> None:
    directory = RunDirectory(tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"foreign holds no config\.json; pass the folder of a run"):
        read_view(directory)
    directory.path.mkdir()
    directory.config.write_text("{")
    with pytest.raises(ConfigError, match=r"foreign/config.json cannot be read .*; forget the run and train it again"):
        read_view(directory)
    config = tiny("ibq")
    transformer = {"model": {"depth": 1}, "tokenizer": config.to_json_dict(), "data": config.data.model_dump()}
    write_json(directory.config, TransformerTrainConfig.parse(transformer).to_json_dict())
    with pytest.raises(ConfigError, match="foreign is a transformer's run, and the explorer shows tokenizers'"):
        read_view(directory)


def test_differences_of_runs(tiny: Callable[..., TrainConfig]) -> None:
    configs = [tiny("ibq"), tiny("ibq", **{"optim.lr": 1e-4, "quantizer.codebook_size": 32})]
    assert fields_that_differ(configs) == ["quantizer.codebook_size", "optim.lr"]
    assert describe(configs[1]) == "IBQ K=32 D=8 lr=0.0001"


# --- Figures ----------------------------------------------------------------------------------------------------------


def test_every_tab_has_its_figure() -> None:
    assert list(TABS) == list(FIGURES)
    assert len(set(RUN_HEX)) == 4


@pytest.mark.parametrize("name", list(TABS))
def test_every_figure_of_none_one_and_four_runs(
    name: str, run: RunDirectory, copy: RunDirectory, tiny: Callable[..., TrainConfig]
) -> None:
    """Whole, new, torn and changed runs; every text lies within the figure, every panel has lines, points, a picture or
    words."""
    new = RunDirectory(copy.path.parent / "new")
    write_json(new.config, show.settings("smoke", "fsq").to_json_dict())
    torn = RunDirectory(copy.path.parent / "torn")
    write_json(torn.config, tiny("vq").to_json_dict())
    torn.history.write_text('{"step": 1, "seconds": 0.1, "loss": 1.0, "usage": 0.5, "perplexity": 3.0}\n')
    write_tensors(copy.path / LIVE, live_of(copy, step=9))
    runs = [run, new, copy, torn]
    for views in ([], [read_view(new)], [read_view(run)], [read_view(each, slot) for slot, each in enumerate(runs)]):
        figure = draw(name, views, SIZE)
        figure.canvas.draw()
        box = figure.get_tightbbox()
        assert box.x0 >= -0.01
        assert box.y0 >= -0.01
        assert box.x1 <= SIZE[0] + 0.01
        assert box.y1 <= SIZE[1] + 0.01
        assert all(axis.lines or axis.collections or axis.images or axis.texts for axis in figure.axes)


def test_effective_dimension_stands_beside_usage(run: RunDirectory) -> None:
    axes = draw("overview", [read_view(run)], SIZE).axes
    assert [axis.get_title(loc="left") for axis in axes[:4]] == [
        *("Codes used", "Perplexity"),
        *("Dimension, used codes", "d_99, used codes"),
    ]
    used, features = (line.get_ydata() for line in axes[2].lines[:2])
    history = run.read_history()
    assert list(used) == [line["dimension_used"] for line in history]
    assert list(features) == [line["dimension_features"] for line in history]


def test_interventions_are_marked_and_explained(run: RunDirectory) -> None:
    figure = draw("overview", [read_view(run, 1)], SIZE)
    axis = figure.axes[0]
    assert {"B1", "B2"} <= {text.get_text() for text in axis.texts}
    assert [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [3, 5]
    assert "B 1: learning rate 0.0001, double term off from step 3" in figure.get_supxlabel()


# --- Drawing in another process ---------------------------------------------------------------------------------------


@pytest.mark.processes
def test_another_process_draws_what_this_one_draws(run: RunDirectory, tmp_path: Path) -> None:
    shown = (Shown(str(run.path), 0), Shown(str(tmp_path / "removed"), 1))
    background = Background()
    try:
        drawn = background.submit(draw_png, "images", shown, SIZE).result(PATIENCE_S)
        here = draw_png("images", shown, SIZE)
    finally:
        background.close()
    assert drawn.png.startswith(b"\x89PNG")
    assert drawn._replace(seconds=0) == here._replace(seconds=0)
    assert drawn.problem == ""
    assert {folder: seen.step for folder, seen in drawn.seen.items()} == {str(run.path): 8}
    assert drawn.seen[str(run.path)].findings == [finding.sentence for finding in read_view(run).findings]


def test_a_figure_that_fails_is_said_in_one_sentence(run: RunDirectory) -> None:
    drawn = draw_png("no figure", (Shown(str(run.path), 0),), SIZE)
    assert drawn.png == b""
    assert "the figure 'no figure' could not be drawn: KeyError" in drawn.problem
