"""make lab: it starts as root and without a home, listens on the loopback address alone, and says how to get there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from experiments.cli import lab
from experiments.study import ROOT


def test_root_is_allowed_and_a_browser_is_opened_on_a_display_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert lab.options(8890)[-1] == "--ServerApp.allow_root=True"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert lab.options(8890) == [
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=8890",
        f"--ServerApp.root_dir={ROOT / 'notebooks'}",
    ]
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert lab.options(8890)[-1] == "--ServerApp.open_browser=False"


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((lab.ADDRESS, port := lab.free_port()))
        taken.listen()
        assert lab.free_port() != port


def answer(address: str) -> bytes:
    """Of a server that listens a moment after it has printed where."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, timeout=300) as found:
                return bytes(found.read())
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(f"nothing listens at {address}")


@pytest.mark.processes
@pytest.mark.parametrize("has_home", [True, False])
def test_it_starts_for_whoever_runs_this_and_prints_address_and_tunnel(has_home: bool, tmp_path: Path) -> None:
    environment = {name: of for name, of in os.environ.items() if name not in ("HOME", "DISPLAY", "WAYLAND_DISPLAY")}
    if has_home:
        environment["HOME"] = str(tmp_path)
    else:
        homeless = "import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n"
        (tmp_path / "sitecustomize.py").write_text(homeless)
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "experiments.cli.lab"]
    server = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        said = ""
        for line in server.stderr:
            said += line
            found = re.search(r"^ +http://127\.0\.0\.1:(\d+)/lab\?token=(\w+)", line)
            if found:  # indented it comes once more, when the server listens
                break
        assert found, said
        port, token = found.groups()
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in said
        assert "Traceback" not in said
        assert b"00_how_ibq_works.ipynb" in answer(f"http://127.0.0.1:{port}/api/contents?token={token}")
    finally:
        server.terminate()
        server.communicate(timeout=300)
