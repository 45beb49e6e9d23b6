"""Presence of a browser at the kernel: against a small HTTP server that answers as Jupyter's does, and against
Jupyter's own."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import websocket
from jupyter_server import serverapp

from experiments.explorer import presence
from experiments.explorer.presence import UNWATCHED, Presence
from experiments.explorer.workers import Workers
from experiments.study import ROOT

PATIENCE_S = 240.0
RUNNING_SERVERS = presence._running_servers


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


class Server:
    """Answers /base/api/kernels/ID with what `connections` holds, to whoever has the token."""

    def __init__(self) -> None:
        self.connections: int | None = 0
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                known = self.path == "/base/api/kernels/the-id" and self.headers["Authorization"] == "token secret"
                answer = {"id": "the-id", "connections": outer.connections} if outer.connections is not None else {}
                self.send_response(200 if known else 404)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.info = {"url": f"http://127.0.0.1:{self._http.server_port}/base/", "token": "secret"}

    def asks(self, times: int = 3) -> None:
        """Wait until it has been asked so often again."""
        target = self.asked + times
        until(lambda: self.asked >= target, "questions")

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class Closed(Workers):
    """Counts how often it is closed."""

    times = 0

    def close(self, timeout_s: float = 0.0) -> None:
        self.times += 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    other = {"url": "http://127.0.0.1:1/", "token": ""}  # nobody answers there
    monkeypatch.setattr(presence, "_own_id", lambda: iter(["the-id"]))
    monkeypatch.setattr(presence, "_running_servers", lambda: [other, server.info])
    monkeypatch.setattr(presence, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(presence, "ABSENT_S", 0.3)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not for a server of this machine
    yield server
    server.close()


def test_runs_stop_once_the_last_browser_has_gone_and_not_before(server: Server) -> None:
    workers = Closed()
    watch = Presence(workers)
    until(lambda: watch.state == "watched: runs stop 0.3 s after the last browser has gone", "the server to be found")
    time.sleep(0.5)
    assert workers.times == 0  # nobody has come yet
    server.connections = 2
    server.asks()
    server.connections = 0
    server.asks(1)
    server.connections = 1  # a page was loaded anew
    server.asks()
    time.sleep(0.5)
    assert workers.times == 0
    server.connections = None  # it says nothing
    time.sleep(0.5)
    assert workers.times == 0
    server.connections = 0
    until(lambda: workers.times == 1, "the runs to be stopped")
    time.sleep(0.5)
    assert workers.times == 1  # once
    server.connections = 1
    server.asks()
    server.connections = 0
    until(lambda: workers.times == 2, "the runs to be stopped, when it was opened again")
    watch.end()
    assert not watch._thread.is_alive()


def test_a_server_that_answers_late_is_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.connections = None
    watch = Presence(Closed())
    server.asks()
    assert watch.state == UNWATCHED
    server.connections = 1
    until(lambda: watch.state != UNWATCHED, "the server to be found")
    watch.end()


def test_what_goes_wrong_while_it_looks_does_not_end_the_watch(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def went() -> Iterator[dict[str, str]]:
        raise FileNotFoundError("jpserver-1.json")

    def answers_half(*_: object, **__: object) -> None:
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(serverapp, "list_running_servers", went)
    assert RUNNING_SERVERS() == []
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", answers_half)
    assert presence._Kernel(server.info, "the-id").connections() is None


@pytest.mark.parametrize("why", ["another kernel's", "another token", "no server", "no kernel"])
def test_where_no_server_knows_the_kernel_nothing_is_watched(
    server: Server, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "another kernel's":
        monkeypatch.setattr(presence, "_own_id", lambda: iter(["another-id"]))
    elif why == "another token":
        server.info["token"] = "wrong"
    elif why == "no server":
        monkeypatch.setattr(presence, "_running_servers", list)
    else:
        monkeypatch.undo()  # this process, under pytest, is none
    workers = Closed()
    watch = Presence(workers)
    time.sleep(0.2)
    assert watch.state == UNWATCHED
    watch.end()
    assert workers.times == 0


# --- Jupyter's own server ---------------------------------------------------------------------------------------------

CELL = """
import time
from experiments.explorer import presence
from experiments.explorer.run import new_run
from experiments.recipes import get_preset, tokenizer

presence.ASK_EVERY_S, presence.ABSENT_S = 0.3, 3.0
watch = presence.Presence()
run = new_run(tokenizer(get_preset("smoke"), {"method": "vq"}).with_fields(steps=1_000_000))
run.train()
while run.state != "training":
    time.sleep(0.05)
print("watch:", watch.state)
"""


class Jupyter:
    """A Jupyter server of its own, one kernel, and a browser's connection to it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = os.environ | {
            "IBQ_EXPLORER_TOKEN": str(folder),
            "PYTHONPATH": str(ROOT),
            "IBQ_RUNS": str(folder / "runs"),
        }
        self.environment |= {
            name: str(folder / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
        }
        self.folder, self.browsers = folder, list[websocket.WebSocket]()
        options = [
            f"--ServerApp.port={self.port}",
            "--IdentityProvider.token=secret",
            f"--ServerApp.root_dir={folder}",
            "--allow-root",
        ]
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", *options]
        with open(folder / "log.txt", "wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        until(self._answers, "the Jupyter server")
        self.kernel = self._ask("POST", "/api/kernels")["id"]

    def _answers(self) -> bool:
        try:
            return bool(self._ask("GET", "/api"))
        except OSError:
            return False

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        headers, data = {"Authorization": "token secret"}, b"{}" if method == "POST" else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers=headers, data=data, method=method
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            content = answer.read()
        return dict(json.loads(content)) if content else {}

    def connect(self) -> websocket.WebSocket:
        url = f"ws://127.0.0.1:{self.port}/api/kernels/{self.kernel}/channels?token=secret"
        self.browsers.append(websocket.create_connection(url, timeout=PATIENCE_S))
        return self.browsers[-1]

    def execute(self, browser: websocket.WebSocket, code: str) -> str:
        """Output that the code prints."""
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
        header = {
            "msg_id": uuid.uuid4().hex,
            "username": "",
            "session": uuid.uuid4().hex,
            "msg_type": "execute_request",
            "version": "5.3",
        }
        message = {
            "header": header,
            "parent_header": {},
            "metadata": {},
            "content": content,
            "channel": "shell",
            "buffers": [],
        }
        browser.send(json.dumps(message))
        printed, awaited = "", {"execute_reply", "idle"}  # on two channels, of which either may be first
        while awaited:
            reply = json.loads(browser.recv())
            if reply["parent_header"].get("msg_id") != header["msg_id"]:
                continue
            if reply["msg_type"] == "stream":
                printed += reply["content"]["text"]
            if reply["msg_type"] == "error":
                raise AssertionError("\n".join(reply["content"]["traceback"]))
            awaited -= {reply["msg_type"], reply["content"].get("execution_state")}
        return printed

    def processes(self) -> list[str]:
        """Command lines of all that was started here and lives."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("IBQ_EXPLORER_TOKEN") == str(self.folder)
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def trainers(self) -> int:
        """The server of trainers and what it has forked."""
        return sum("multiprocessing.forkserver" in command for command in self.processes())

    def events(self) -> list[str]:
        path = next((self.folder / "runs" / "explore").glob("*/attempts.jsonl"))
        return [json.loads(line)["event"] for line in path.read_text().splitlines()]

    def restart(self) -> None:
        self._ask("POST", f"/api/kernels/{self.kernel}/restart")

    def close(self) -> None:
        for browser in self.browsers:
            browser.close()
        self.process.terminate()
        self.process.wait(PATIENCE_S)


@pytest.mark.processes
def test_a_closed_tab_and_a_restarted_kernel_leave_no_process(tmp_path: Path) -> None:
    jupyter = Jupyter(tmp_path)
    try:
        browser = jupyter.connect()
        assert "watch: watched: runs stop 3 s after the last browser has gone" in jupyter.execute(browser, CELL)
        assert jupyter.trainers() == 2
        browser.close()
        browser = jupyter.connect()  # the page was loaded anew
        time.sleep(5)
        assert jupyter.trainers() == 2
        browser.close()  # the tab was closed
        until(lambda: jupyter.trainers() == 0, "the end of the trainers")
        assert any("ipykernel" in command for command in jupyter.processes())  # the kernel itself lives on
        assert jupyter.events() == ["started", "stopped"]
        browser = jupyter.connect()
        assert "stopped" in jupyter.execute(browser, "print(run.state)")
        jupyter.execute(browser, "run.train()\nwhile run.state != 'training':\n    time.sleep(0.05)")
        assert jupyter.trainers() == 2
        browser.close()
        jupyter.restart()
        until(lambda: jupyter.trainers() == 0, "the end of the trainers")
        assert jupyter.events() == ["started", "stopped"] * 2
    finally:
        jupyter.close()
    until(lambda: jupyter.processes() == [], "the end of every process")
