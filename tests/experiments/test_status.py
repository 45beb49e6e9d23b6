"""Status of a run from its files alone: state, reason, newest lines of the log, time left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from experiments import status
from ibq.errors import ConfigError
from ibq.run_directory import TAIL_BYTES, RunDirectory, append_line, write_text


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "vq-s0-0123456789ab")


def attempt(run: RunDirectory, event: str, reason: str | None = None) -> None:
    append_line(run.attempts, {"event": event, "time": 0.0, "reason": reason})


@pytest.mark.parametrize(
    ("events", "state", "reason"),
    [
        ([], "pending", ""),
        (["started"], "interrupted", ""),
        (["started", "damaged"], "interrupted", ""),
        (["started", "stopped"], "stopped", "stopped at step 3"),
        (["started", "oom"], "oom", "out of memory"),
        (["started", "killed"], "failed", "killed"),
        (["started", "timeout", "started", "lost"], "failed", "lost"),
    ],
)
def test_attempts_decide_where_there_is_no_row(run: RunDirectory, events: list[str], state: str, reason: str) -> None:
    reasons = {"stopped": "stopped at step 3", "oom": "out of memory"}
    for event in events:
        attempt(run, event, reasons.get(event))
    now = status.of(run)
    assert (now.state, now.reason) == (state, reason)


def test_whoever_holds_the_lock_trains_it_and_a_row_ends_it(run: RunDirectory) -> None:
    attempt(run, "started")
    with FileLock(run.lock):
        assert status.of(run).state == "running"
    assert status.of(run).state == "interrupted"
    write_text(run.row, json.dumps({"status": "nan"}))
    assert status.of(run).state == "nan"
    write_text(run.row, "{")
    with pytest.raises(ConfigError, match=r"row.json is not JSON"):
        status.of(run)


def test_the_newest_lines_are_read_from_the_end_of_a_long_history_torn_ones_left_out(run: RunDirectory) -> None:
    assert (status.of(run).step, status.of(run).last, status.of(run).seconds_left(9)) == (0, {}, None)
    run.path.mkdir()
    lines = [json.dumps({"step": step, "seconds": 2.0 * step, "text": "x" * 100}) for step in range(1, 2001)]
    assert len("\n".join(lines)) > 2 * TAIL_BYTES
    run.history.write_text("\n".join(lines) + '\n{"step": 2001, "sec')
    now = status.of(run)
    assert [line["step"] for line in now.recent] == list(range(2001 - status.SPEED_LINES, 2001))
    assert (now.step, now.seconds_left(2100)) == (2000, pytest.approx(200.0))
    assert status.share_done(run, 4000) == 0.5


def test_time_left_in_words() -> None:
    assert [status.time_left(seconds) for seconds in (None, 9, 600, 360_000)] == [
        "time left not known yet",
        "about 9 s left",
        "about 10.0 min left",
        "about 100.0 h left",
    ]
