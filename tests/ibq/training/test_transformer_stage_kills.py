"""A transformer's run that is killed while it encodes, then while it samples: no finished file is made again, and the
end is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import assert_same_tensors

from ibq.run_directory import RunDirectory

TRAIN = """
import sys
from pathlib import Path
import pytest, torch, ibq.data.tokens, ibq.evaluation.transformer
from transformer_runs import transformer_config, train, watch_images
torch.set_num_threads(1)
ibq.data.tokens.SHARD, ibq.evaluation.transformer.PART = 16, 2
with pytest.MonkeyPatch.context() as patch:
    watch_images(patch, Path(sys.argv[1]))
    train(transformer_config(), Path(sys.argv[2]))
"""


def begin(cache: Path, run: RunDirectory) -> subprocess.Popen[bytes]:
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(cache), str(run.path)], env=os.environ | {"PYTHONPATH": folders}
    )


def written(folder: Path) -> dict[Path, int]:
    """Finished files and when they were written; none where the folder is just being removed."""
    try:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*.safetensors")}
    except FileNotFoundError:
        return {}


@pytest.mark.processes
def test_a_run_that_is_killed_makes_no_finished_file_again(tmp_path: Path) -> None:
    quiet, run, cache = RunDirectory(tmp_path / "quiet"), RunDirectory(tmp_path / "run"), tmp_path / "cache"
    assert begin(tmp_path / "another cache", quiet).wait() == 0
    for folder in (cache / "tokens", run.samples):
        process = begin(cache, run)
        while process.poll() is None and not written(folder):
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        if folder != run.samples:
            encoded = written(folder)
    sampled, seen = written(run.samples), dict[Path, int]()
    assert encoded
    assert sampled
    process = begin(cache, run)
    while process.poll() is None:
        seen |= written(run.samples)
        time.sleep(0.001)
    assert process.returncode == 0
    assert encoded.items() <= written(cache / "tokens").items()
    assert sampled.items() <= seen.items()
    for finished, expected in ((run.model, quiet.model), (run.generated, quiet.generated)):
        assert_same_tensors(load_file(finished), load_file(expected))
