"""Consoles, pipes and homes as they are elsewhere: no UTF-8, a reader that leaves, no home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from plain_user import ROOT, as_user

from experiments import home
from experiments.study import Study
from ibq.data import fashion_mnist

pytestmark = pytest.mark.processes
STUDY = [sys.executable, "-m", "experiments"]


@pytest.mark.parametrize("module", ["experiments list", "ibq data fashion-mnist"])
def test_a_console_of_ascii_alone(module: str) -> None:
    done = as_user("-m", *module.split(), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_a_reader_that_leaves(own_folders: None) -> None:
    """As `status | head`: nothing is said, neither by the command nor at the end of Python."""
    read, write = os.pipe()
    os.close(read)
    for command in (["status", "--preset", "smoke"], ["list"], ["--help"]):
        done = subprocess.run([*STUDY, *command], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert done.stderr == ""
        assert done.returncode in (1, 141)
    os.close(write)


def test_output_that_is_closed_or_full(own_folders: None) -> None:
    done = subprocess.run([*STUDY, "list"], preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*STUDY, "list"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device")


def test_a_report_is_utf8_whatever_the_locale(own_folders: None) -> None:
    grid = ["--preset", "smoke", "--set", "steps=1", "--grid", "optim.lr=1e-3", "--base", "vq_vs_ibq/vq_fair"]
    done = as_user(
        "-m", "experiments", "run", *grid, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0, done.stderr
    folder = Study("smoke", (), None, {"steps": 1}, {"optim.lr": [1e-3]}, ("vq_vs_ibq/vq_fair",)).report_folder
    assert any(not page.read_text(encoding="utf-8").isascii() for page in folder.glob("*.html"))


HOMELESS = "import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n"


def test_a_study_of_a_user_without_a_home(own_folders: None, tmp_path: Path) -> None:
    """As of a user id that a container does not know: Jupyter, matplotlib and IPython find a place all the same."""
    (tmp_path / "sitecustomize.py").write_text(HOMELESS)
    command = ["run", "double_quant_loss", "--preset", "smoke", "--set", "steps=1"]
    done = as_user("-m", "experiments", *command, HOME=None, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert "executing notebook 02_double_quant_loss" in done.stdout
    assert "Traceback" not in done.stderr


def test_folders_beside_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    code = "from experiments import home; home.provide(); import os; print([os.environ.get(n) for n in home.VARIABLES])"
    (tmp_path / "home").mkdir(mode=0o555)
    given = dict.fromkeys(home.VARIABLES) | {"IPYTHONDIR": "mine"}
    done = as_user("-c", code, HOME=str(tmp_path / "home"), **given)
    folders = eval(done.stdout)
    assert folders[3] == "mine"
    assert all(
        Path(folder).name == name.lower()
        for folder, name in zip(folders, home.VARIABLES, strict=True)
        if folder != "mine"
    )
    assert not Path(folders[0]).parent.exists()
    kept = as_user("-c", code, HOME=str(tmp_path), **given)
    assert eval(kept.stdout) == [None, None, None, "mine", None, None]


def test_reports_that_cannot_be_written_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = as_user(
        *("-m", "experiments", "run", "vq_vs_ibq", "--preset", "smoke"),
        IBQ_RUNS=str(tmp_path / "runs"),
        IBQ_REPORTS=str(tmp_path / "file"),
    )
    remedy = "name a folder of your own for reports by IBQ_REPORTS"
    assert done.stderr == f"error: {tmp_path / 'file'} is a file where a folder is wanted; {remedy}\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "runs").exists()


def test_data_that_are_not_to_be_had_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        HOMELESS + "from dataclasses import replace\nfrom pathlib import Path\nfrom ibq.data import fashion_mnist\n"
        "fashion_mnist.FILES = replace(fashion_mnist.FILES, folder=Path('/nowhere'))\n"
    )
    done = as_user(
        *("-m", "experiments", "run", "vq_vs_ibq", "--preset", "smoke"),
        HOME=None,
        IBQ_DATA=None,
        IBQ_CACHE=None,
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
        IBQ_RUNS=str(tmp_path / "runs"),
        IBQ_REPORTS=str(tmp_path / "reports"),
    )
    assert done.returncode == 2
    assert "this user has no home folder to cache data in; set IBQ_CACHE" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_data_of_debians_package_need_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    installed = replace(fashion_mnist.FILES, folder=Path(os.environ["IBQ_DATA"]))
    monkeypatch.setattr(Path, "home", staticmethod(homeless))
    for name in ("IBQ_DATA", "IBQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert installed.are_here()
