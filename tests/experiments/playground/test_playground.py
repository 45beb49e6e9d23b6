"""The playground: its steps against independent ones, the drift, the board, the animation, and an interface that leaves
nothing."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.playground import METHODS, Drift, Learner, Observation, Playground, Settings, measure
from experiments.playground.animation import FRAME_MS, FRAMES, LAST_FRAME_MS, METHODS_SHOWN
from experiments.playground.drawing import Board, arrow_shapes, convex_hull
from experiments.playground.simulation import CODES, as_feature_map
from experiments.playground.widgets import Interface
from experiments.study import ROOT
from ibq.errors import ConfigError
from ibq.metrics.codebook import ADAM_EPS

PUBLISHED = ROOT / "reports" / "published" / "playground.gif"


def batch(seed: int, count: int = 256) -> torch.Tensor:
    return Drift().features(0.1, count, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def among() -> dict[str, Observation]:
    """All methods side by side after a few steps."""
    playground = Playground(list(METHODS), Settings(seed=3))
    playground.advance(12)
    return playground.observe()


@pytest.mark.parametrize("label", METHODS)
def test_a_method_learns_the_same_bits_alone_and_among_others_and_leaves_the_global_draws_alone(
    label: str, among: dict[str, Observation]
) -> None:
    before = torch.get_rng_state()
    alone = Playground([label], Settings(seed=3))
    alone.advance(12)
    one, other = alone.observe()[label], among[label]
    assert torch.equal(one.codes_KD, other.codes_KD)
    assert torch.equal(one.pull_KD, other.pull_KD)
    assert (one.counts_K == other.counts_K).all()
    assert not torch.equal(Playground([label], Settings(seed=4)).observe()[label].codes_KD, one.codes_KD)
    assert torch.equal(torch.get_rng_state(), before)


def test_under_vq_a_code_that_is_never_selected_stays_and_under_ibq_every_code_moves_at_every_step() -> None:
    vq, ibq = Learner("VQ", seed=0, lr=0.01), Learner("IBQ as released", seed=0, lr=0.01)
    begin_KD = vq.quantizer.codebook.detach().clone()
    assert torch.equal(begin_KD, ibq.quantizer.codebook)
    ever_K = torch.zeros(CODES, dtype=torch.bool)
    for i in range(30):
        z_ND = batch(i)
        indices = vq.quantizer.eval()(as_feature_map(z_ND)).indices
        vq.quantizer.train()
        ever_K[indices.flatten()] = True
        before_KD = ibq.quantizer.codebook.detach().clone()
        vq.step(z_ND, watched=True)
        ibq.step(z_ND, watched=True)
        pulled_K = (vq.observe(z_ND).pull_KD != 0).any(1)
        assert set(pulled_K.nonzero().flatten().tolist()) == set(indices.flatten().tolist())
        assert (ibq.quantizer.codebook != before_KD).any(1).all()
    moved_K = (vq.quantizer.codebook != begin_KD).any(1)
    assert torch.equal(moved_K, ever_K)
    assert 5 < int(moved_K.sum()) < CODES - 5


def test_a_code_that_vq_has_left_coasts_on_momentum_and_then_stands() -> None:
    learner = Learner("VQ", seed=0, lr=0.01)
    here_ND, there_ND = batch(0), batch(0) - torch.tensor([5.0, 0.0])
    for _ in range(3):
        learner.step(here_ND)
    for _ in range(200):
        learner.step(there_ND)
    before_KD = learner.quantizer.codebook.detach().clone()
    learner.step(there_ND, watched=True)
    seen = learner.observe(there_ND)
    assert torch.equal((seen.codes_KD != before_KD).any(1), seen.counts_K > 0)


def vq_loss(codes_KD: torch.Tensor, z_ND: torch.Tensor) -> torch.Tensor:
    q_ND = codes_KD[torch.cdist(z_ND, codes_KD).argmin(1)]
    z_q_ND = z_ND + (q_ND - z_ND).detach()
    return (
        (z_q_ND - z_ND).square().mean() + (z_ND - q_ND.detach()).square().mean() + 0.25 * (q_ND - z_ND).square().mean()
    )


def ibq_loss(codes_KD: torch.Tensor, z_ND: torch.Tensor, entropy: float = 0.05) -> torch.Tensor:
    logits_NK = z_ND @ codes_KD.T
    p_NK, hard_NK = logits_NK.softmax(1), torch.nn.functional.one_hot(logits_NK.argmax(1), CODES).double()
    z_q_ND = (hard_NK + p_NK - p_NK.detach()) @ codes_KD
    q_ND = hard_NK @ codes_KD
    log_NK = (logits_NK / 0.01).log_softmax(1)
    mean_K = log_NK.exp().mean(0)
    penalty = -(log_NK.exp() * log_NK).sum(1).mean() + (mean_K * (mean_K + 1e-5).log()).sum()
    return 2 * (z_q_ND - z_ND).square().mean() + 0.25 * (q_ND - z_ND).square().mean() + entropy * penalty


@pytest.mark.parametrize(
    ("label", "loss"),
    [
        ("VQ", vq_loss),
        ("VQ, restarts", vq_loss),
        ("IBQ as released", ibq_loss),
        ("IBQ, no entropy", lambda codes_KD, z_ND: ibq_loss(codes_KD, z_ND, 0.0)),
    ],
)
def test_arrows_are_minus_the_gradient_of_an_independent_loss_in_float64(label: str, loss) -> None:
    learner, z_ND = Learner(label, seed=1, lr=0.01), batch(1)
    codes_KD = learner.quantizer.codebook.detach().double().requires_grad_()
    learner.step(z_ND, watched=True)
    (gradient_KD,) = torch.autograd.grad(loss(codes_KD, z_ND.double()), codes_KD)
    pull_KD = learner.observe(z_ND).pull_KD.double()
    torch.testing.assert_close(pull_KD, -gradient_KD, rtol=1e-4, atol=1e-5 * float(gradient_KD.abs().max()))
    arrows_KD, exponent_K = arrow_shapes(pull_KD)
    shown_K = ~np.isnan(exponent_K)
    cosine_K = torch.nn.functional.cosine_similarity(torch.from_numpy(arrows_KD), -gradient_KD, eps=1e-300)
    assert torch.equal(torch.from_numpy(shown_K), gradient_KD.square().mean(1).sqrt() > ADAM_EPS)
    assert (cosine_K[shown_K & (exponent_K > -2)] > 0.999).all()


@pytest.mark.parametrize("label", ["SimVQ", "VQ, linear codes", "IBQ, cosine"])
def test_where_codes_are_a_function_of_parameters_arrows_are_what_plain_gradient_descent_does(label: str) -> None:
    learner, z_ND = Learner(label, seed=1, lr=0.01), batch(1)
    learner.quantizer.double()
    learner.adam.zero_grad()
    learner.loss(z_ND.double()).backward()
    pull_KD, before_KD, rate = learner.pull(), learner.quantizer.codebook.detach().clone(), 1e-7
    with torch.no_grad():
        for parameter in learner.quantizer.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    torch.testing.assert_close(pull_KD, (learner.quantizer.codebook.detach() - before_KD) / rate, rtol=1e-4, atol=1e-5)
    assert (pull_KD != 0).any(1).all()


def test_moving_averages_arrows_are_the_moves_that_follow() -> None:
    learner = Learner("VQ, moving averages", seed=0, lr=0.01)
    for i in range(3):
        learner.step(batch(i), watched=True)
    seen = learner.observe(batch(9))
    learner.step(batch(3))  # whose forward applies what the one before has seen
    torch.testing.assert_close(seen.codes_KD + seen.pull_KD, learner.quantizer.codebook.detach(), rtol=0, atol=1e-5)
    assert 0 < seen.pulled < CODES


def test_restarts_are_told_once() -> None:
    learner, z_ND = Learner("VQ, restarts", seed=0, lr=0.01), batch(0)
    told = []
    for i in range(240):
        learner.step(batch(i))
        told.append(int(learner.observe(z_ND).restarted_K.sum()))
    assert sum(told[:228]) == 0
    assert sum(told) > 5
    assert learner.observe(z_ND).restarted_K.sum() == 0


def test_the_mixture_wanders_turns_jumps_and_comes_back() -> None:
    drift = Drift(distance=1.5, spread=0.2)
    for phase in (0.0, 0.2, 0.49, 0.5, 0.9, 1.3):
        assert float(drift.middle(phase).norm()) == pytest.approx(1.5, abs=1e-5)
        torch.testing.assert_close(drift.centers(phase).mean(0), drift.middle(phase), rtol=0, atol=1e-6)
        torch.testing.assert_close(drift.centers(phase), drift.centers(phase + 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(drift.middle(0.5), -drift.middle(0.5 - 1e-7), rtol=0, atol=1e-5)
    torch.testing.assert_close(drift.middle(1.0), drift.middle(1 - 1e-7), rtol=0, atol=1e-5)
    assert float((drift.centers(0.1) - drift.centers(0.102)).norm(dim=1).max()) < 0.03
    torch.testing.assert_close(Drift(0.0).middle(0.7), torch.zeros(2))
    z_ND = drift.features(0.3, 60_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z_ND.mean(0), drift.middle(0.3), rtol=0, atol=0.02)
    expected = 2 * 0.2**2 + float((drift.centers(0.3) - drift.middle(0.3)).square().sum(1).mean())
    assert float(z_ND.var(0).sum()) == pytest.approx(expected, rel=0.02)


def test_the_probe_is_one_draw_that_moves_with_the_centres_and_speed_changes_do_not_make_it_jump() -> None:
    playground = Playground(["VQ"], Settings(speed=1.0))
    playground.advance(3)
    before_ND = playground.probe()
    playground.change(lr=0.05, speed=0.0)
    playground.advance(2)
    assert torch.equal(playground.probe(), before_ND)
    assert playground.learners[0].adam.param_groups[0]["lr"] == 0.05
    playground.change(lr=0.05, speed=2.0)
    playground.advance(1)
    assert 0 < float((playground.probe() - before_ND).norm(dim=1).max()) < 0.1


def test_the_hull_is_what_some_direction_chooses() -> None:
    generator = torch.Generator().manual_seed(0)
    codes_KD = torch.randn(CODES, 2, generator=generator)
    angle_N = torch.linspace(0, 2 * torch.pi, 20_000)
    chosen = (torch.stack([angle_N.cos(), angle_N.sin()], 1) @ codes_KD.T).argmax(1).unique()
    corners = convex_hull(codes_KD.numpy())
    assert np.array_equal(corners[0], corners[-1])
    assert {tuple(corner) for corner in corners} == {tuple(code) for code in codes_KD[chosen].double().numpy()}


def test_the_board_moves_with_the_codes_and_says_their_numbers() -> None:
    playground = Playground(METHODS_SHOWN)
    board = Board(playground, columns=3)
    pictures = []
    for _ in range(2):
        playground.advance(4)
        seen = playground.observe()
        board.update(seen)
        pictures.append(board.image())
        used = {label: len(panel._used.get_offsets()) for label, panel in board._panels.items()}
        assert used == {label: observation.in_use for label, observation in seen.items()}
    assert pictures[0].shape == pictures[1].shape
    assert pictures[0].shape[1] == 900
    changed = (pictures[0] != pictures[1]).any(2)
    assert 0.005 < changed.mean() < 0.3
    board.arrows = False
    board.redraw(seen)
    assert (board.image() != pictures[1]).any()
    assert Image.open(BytesIO(board.png())).size == pictures[0].shape[1::-1]


def test_curves_go_on_beyond_their_axis() -> None:
    playground = Playground(["VQ"])
    board = Board(playground, columns=4)
    for steps in (499, 501):
        playground.steps = steps
        board.update(playground.observe())
        board.image()
    assert board._curves.axes.get_xlim() == (0, 1000)


def test_the_command_writes_a_gif_that_loops(tmp_path: Path) -> None:
    out = tmp_path / "new" / "small.gif"
    done = CliRunner().invoke(
        app, ["playground", "--out", str(out), "--frames", "3", "--speed", "20", "--method", "VQ", "--method", "SimVQ"]
    )
    assert done.exit_code == 0, done.output
    assert "frame 3 of 3" in done.output
    with Image.open(out) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (3, 0)
    assert [path.name for path in out.parent.iterdir()] == ["small.gif"]


def test_the_published_animation_has_its_frames_is_small_and_loops() -> None:
    assert PUBLISHED.stat().st_size < 3e6
    with Image.open(PUBLISHED) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.size[0]) == (FRAMES, 0, 900)
        durations = []
        for i in range(FRAMES):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert durations == [FRAME_MS] * (FRAMES - 1) + [LAST_FRAME_MS]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "a.mp4"], ["'a.mp4'", "'a.gif'"]),
        (["--frames", "1"], ["frames=1", "2 and 500"]),
        (["--method", "VQQ"], ["'VQQ'", "'VQ'"]),
        (["--method", "VQ", "--method", "VQ"], ["VQ, VQ", "once"]),
        (["--lr", "0"], ["lr=0.0", "above 0"]),
        (["--lr", "nan"], ["lr=nan", "finite"]),
        (["--speed", "0"], ["speed=0.0", "above 0"]),
        (["--distance", "-1"], ["distance=-1.0", "at least 0"]),
        (["--seed", "-1"], ["seed=-1", "at least 0"]),
    ],
)
def test_wrong_options_are_one_sentence(options: list[str], words: list[str], tmp_path: Path) -> None:
    out = [] if "--out" in options else ["--out", str(tmp_path / "a.gif")]
    result = CliRunner().invoke(app, ["playground", *out, *options])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_wrong_presets_and_no_method_are_sentences_too() -> None:
    with pytest.raises(ConfigError, match="no preset 'quik'; did you mean 'quick'"):
        measure.scale_of("quik")
    with pytest.raises(ConfigError, match=r"methods \(none\) must be one or more"):
        Playground([])


def test_the_table_has_every_method_and_the_sentences_its_means() -> None:
    rows = measure.measure(measure.Scale(seeds=2, steps=3), methods=("VQ", "IBQ as released"))
    table = measure.table(rows)
    assert list(table["method"]) == ["VQ", "IBQ as released"]
    vq = rows[(rows["method"] == "VQ") & (rows["distance"] == 2)]["in use"]
    assert table.loc[0, "in use, distance 2"] == f"{vq.mean():.1f} ± {vq.std():.1f}"
    assert [sentence.startswith("Distance ") for sentence in measure.sentences(rows)] == [True, True]


def test_more_codes_can_be_chosen_by_dot_product_in_more_dimensions() -> None:
    table = measure.choosable(dims=(2, 8), seeds=2, directions=4096)
    few, many = (float(text.split()[0]) for text in table.iloc[:, 1])
    assert few < 16 < 40 < many


def test_the_interface_plays_pauses_begins_anew_and_leaves_no_task() -> None:
    async def use() -> None:
        first = Interface(Settings(distance=1.0))
        begin = first.image.value
        assert first.playground.settings.distance == 1.0
        first.step.click()
        assert first.playground.steps == 1
        assert first.image.value != begin
        first.play.value = True
        first.lr.value = 0.1
        await until(lambda: first.playground.steps >= 7)
        assert first.playground.learners[0].adam.param_groups[0]["lr"] == pytest.approx(0.1)
        first.play.value = False
        paused = first.playground.steps
        await asyncio.sleep(0.2)
        assert first.playground.steps == paused
        assert only_this_task()
        first.arrows.value = False
        assert first.playground.steps == paused
        first.methods.value = ("VQ", "IBQ, cosine")
        first.play.value = True
        await until(lambda: first.playground.steps > paused)
        first.reset.click()
        await asyncio.sleep(0.05)
        assert only_this_task()
        assert (first.playground.steps, first.play.value) == (0, False)
        assert list(first.playground.observe()) == ["VQ", "IBQ, cosine"]
        first.methods.value = ()
        first.reset.click()
        assert "one or more" in first.status.value
        first.play.value = True
        await asyncio.sleep(0)
        second = Interface()  # as when the cell is run again
        await asyncio.sleep(0.05)
        assert only_this_task()
        assert first.image.comm is None
        second.close()

    def only_this_task() -> bool:
        return asyncio.all_tasks() == {asyncio.current_task()}

    async def until(condition) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.02)

    asyncio.run(use())
