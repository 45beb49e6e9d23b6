"""The folder of samples: what a kill leaves of it is gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ibq.cli import sample_folder
from ibq.cli.sample_folder import SampleFolder


@pytest.mark.parametrize("written", [False, True], ids=["before the record", "after the record"])
def test_a_kill_while_the_folder_is_claimed_leaves_it_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    folder, write_json = SampleFolder(tmp_path / "out", (0, 1), 3, (4, 4, 1)), sample_folder.write_json

    def killed(*arguments: Any) -> None:
        if written:
            write_json(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt), folder.claim({"seed": 0}, {}, {}):
            pass
    with folder.claim({"seed": 1}, {}, {}):
        assert folder.missing() == [0, 1, 2]
    assert json.loads(folder.record.read_text())["settings"] == {"seed": 1}
