from __future__ import annotations

import pytest
from typer.testing import CliRunner

from experiments.cli import app

runner = CliRunner()


@pytest.mark.parametrize("command", ["list", "plan --preset smoke", "status --preset smoke", "report --preset smoke"])
@pytest.mark.usefixtures("trained")
def test_commands_work(command: str) -> None:
    result = runner.invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "vq_vs_ibq" in result.output or "report:" in result.output


@pytest.mark.usefixtures("trained")
def test_plan_counts_what_is_left() -> None:
    assert "13 runs, 13 finished; 0 steps left" in runner.invoke(app, ["plan", "--preset", "smoke"]).output
    assert "13 runs, 0 finished; 65 steps left" in runner.invoke(app, ["plan", "--preset", "smoke", "--set", "steps=5"]).output


@pytest.mark.usefixtures("trained")
def test_status_tells_every_arm() -> None:
    output = runner.invoke(app, ["status", "--preset", "smoke"]).output
    assert output.count(" ok ") == 13


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan --preset qick", ["'qick'", "'quick'"]),
        ("run vq_vs_ibqq --preset smoke", ["'vq_vs_ibqq'", "'vq_vs_ibq'"]),
        ("plan --set optim.lr", ["'optim.lr'", "field=value"]),
        ("plan --set optim.rl=1", ["'optim.rl'"]),
        ("run --preset smoke --set steps=-3", ["steps", "-3"]),
        ("plan --seeds 0", ["seeds=0"]),
        ("run --preset smoke --set quantizer.beta=NaN", ["quantizer", "nan"]),
        ("run --preset smoke --set model.norm_groups=3", ["norm_groups=3", "divisors"]),
    ],
)
@pytest.mark.usefixtures("folders")
def test_a_users_error_is_one_line_on_stderr(command: str, words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    result = runner.invoke(app, command.split())
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
