"""ibq check: what it prints of quantizers that keep and break the contract, and its exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_files import SOURCE, source, write
from typer.testing import CliRunner, Result

from ibq.cli import check
from ibq.cli.app import app
from ibq.quantizers.contract import RULES

FAULT = source(after="indices_N = indices_N.int()")


@pytest.fixture
def one_process(own_plugins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule on processes is passed by: starting two takes longer than all else."""
    monkeypatch.setattr(check, "two_processes", lambda configs: [[] for _ in configs])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.mark.usefixtures("one_process")
def test_what_is_kept_and_what_a_step_costs(tmp_path: Path) -> None:
    result = run(write(tmp_path, text=SOURCE + "ARMS = {'one': {}, 'two': {'beta': 0.5}}\n"))
    assert result.exit_code == 0, result.output
    assert result.output.count("keeps all") == 2
    assert re.search(r"^one of mine\.py [0-9a-f]{8}: K = 64, D = 6$", result.output, re.M)
    for rule in (*RULES, "two processes"):
        assert result.output.count(f"  kept    {rule} ") == 2
    said = " ".join(result.output.split())
    assert re.search(r"a step's gradient reaches the features, embedding \(\d+ of 64 codes\)", said)
    cost = (
        r"tokens at K = 1,024, D = 64 on the CPU takes [\d.]+ ms, [\d.]+ times vq's, and at most [\d.]+ MiB, ([\d.]+) "
    )
    assert [1.5 < float(times) < 3 for times in re.findall(cost, said)] == [True, True], "an N x K matrix of distances"


@pytest.mark.usefixtures("one_process")
def test_what_is_broken_is_said_in_words(tmp_path: Path) -> None:
    result = run(write(tmp_path, text=FAULT), "fsq")
    assert result.exit_code == 1
    of_mine, of_fsq = result.output.split("fsq: K = 64, D = 2")
    assert "BROKEN  shapes and types" in of_mine
    assert "in training indices are torch.int32 of shape (2, 3, 4); they must be int64" in " ".join(of_mine.split())
    assert re.search(rf"breaks \d+ of {len(RULES) + 1} rules", of_mine)
    assert f"keeps all {len(RULES) + 1} rules" in of_fsq
    assert max(map(len, result.output.splitlines())) <= 120


@pytest.mark.usefixtures("one_process")
def test_a_method_that_raises_is_tried_by_every_rule(tmp_path: Path) -> None:
    result = run(write(tmp_path, text=source(before='raise RuntimeError("not yet")')))
    assert result.exit_code == 1
    assert result.output.count("it raises RuntimeError: not yet (mine.py, line 20)") > len(RULES) / 2
    assert "a step is not measured: RuntimeError: not yet" in result.output


@pytest.mark.usefixtures("one_process")
def test_fields_are_set_and_what_draws_is_said(tmp_path: Path) -> None:
    result = run("gumbel", "--set", "code_dim=4", "--set", "codebook_size=16")
    assert result.exit_code == 0, result.output
    assert "gumbel: K = 16, D = 4" in result.output
    assert (
        "training draws random numbers, so that two processes hold the same, but not what one trains" in result.output
    )


@pytest.mark.usefixtures("own_plugins")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vqq"], "'vqq' is neither a file nor a method; did you mean 'vq'?"),
        (["no.py"], "no.py cannot be read (No such file or directory); name a file"),
        (["vq", "--set", "code_dim"], "--set 'code_dim' is not of the form field=value"),
        (["lfq", "--set", "code_dim=5"], "lfq cannot be tried at codebook_size=64, code_dim=5: code_dim=5 is not the "),
        (["vq", "--set", "bta=1"], "vq cannot be tried at codebook_size=64, code_dim=6: bta: Extra inputs"),
    ],
)
def test_what_cannot_be_tried_is_one_sentence(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr


@pytest.mark.processes
def test_the_whole_command_in_processes_of_its_own(tmp_path: Path) -> None:
    """Both processes of the last rule find the file by the environment."""
    local = source(after='losses["codebook"] = losses["codebook"] + z_ND.mean(0).square().mean()')
    command = [sys.executable, "-m", "ibq", "check", write(tmp_path, text=local)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(check.__file__).parents[2])
    assert done.returncode == 1, done.stderr
    assert "BROKEN  two processes" in done.stdout
    assert "two processes do not train what one does on the joined batch" in " ".join(done.stdout.split())
    assert done.stderr == ""
