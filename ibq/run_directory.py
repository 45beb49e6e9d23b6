"""One directory a run: what is in it, and how its files are written so that a kill at any moment loses nothing
finished."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ibq.config import RunConfig, parse_run_config
from ibq.errors import ConfigError, OtherSourceError
from ibq.plugins import VARIABLE, is_method, plugin_of, sha256_of

PLUGIN = "plugin.py"
TAIL_BYTES = 65_536
"""Size of the end of a history in which its last lines are looked for."""


class _Member:
    """A path in a run's directory, made on first use: a study has thousands of runs, and most commands look at one file
    of each."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __set_name__(self, owner: type, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, run: RunDirectory, owner: type) -> Path:
        path = run.path / self._name
        run.__dict__[self._attribute] = path
        return path


class RunDirectory:
    """Paths and files of one run.

    config.json       the TrainConfig or TransformerTrainConfig
    plugin.py         of a tokenizer whose quantizer is a plugin's: its source
    history.jsonl     a line per log step
    snapshots/        of a tokenizer: tensors at up to 8 points of training
    tokenizer/        of a transformer: its tokenizer, as `Tokenizer.save` writes one, and the row of that one's run
    checkpoint/       for resuming; removed when the run is finished
    samples/          of a transformer: parts of an evaluation that is not whole; removed as well
    model.safetensors the averaged weights of a finished run; a transformer's as they are where it averages none
    eval/             what the evaluation saw: code counts and pictures, or samples
    attempts.jsonl    every start, how it ended, what was damaged
    control.jsonl     what is asked of its trainer, where anything is (`ibq.training.control`)
    interventions.jsonl  what was changed while it trained, where anything was
    heartbeat         touched as long as the trainer gets on
    row.json          written last; its presence means that the run is finished
    """

    config = _Member("config.json")
    plugin = _Member(PLUGIN)
    history = _Member("history.jsonl")
    snapshots = _Member("snapshots")
    tokenizer = _Member("tokenizer")
    tokenizer_row = _Member("tokenizer/row.json")
    checkpoint = _Member("checkpoint")
    model = _Member("model.safetensors")
    evaluation = _Member("eval/reconstruction.safetensors")
    generated = _Member("eval/samples.safetensors")
    samples = _Member("samples")
    attempts = _Member("attempts.jsonl")
    control = _Member("control.jsonl")
    interventions = _Member("interventions.jsonl")
    heartbeat = _Member("heartbeat")
    row = _Member("row.json")
    lock = _Member(".lock")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def finished(self) -> bool:
        return self.row.is_file()

    def read_row(self) -> dict[str, Any]:
        """The row of a finished run.

        Raises:
            ConfigError: row.json is damaged.
        """
        try:
            row: dict[str, Any] = json.loads(self.row.read_text())
        except ValueError as error:
            raise ConfigError(f"{self.row} is not JSON ({error}); forget the run and train it again") from None
        return row

    def read_config(self) -> RunConfig:
        """The config of the run.

        Raises:
            ConfigError: config.json is absent, is not JSON, is not a valid config, or is of a method that is not here.
        """
        try:
            tree = json.loads(self.config.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self.path} holds no config.json; pass the folder of a run") from None
        except ValueError as error:
            raise self._unreadable(error) from None
        require_source(self.path, tree)
        try:
            return parse_run_config(tree)
        except ValueError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: ValueError) -> ConfigError:
        reason = " ".join(str(error).split())
        return ConfigError(f"{self.config} cannot be read ({reason}); forget the run and train it again")

    def read_history(self) -> list[dict[str, Any]]:
        return read_lines(self.history)

    def read_recent(self, count: int) -> list[dict[str, Any]]:
        """The last lines of the history, at most `count` and oldest first, read from its end."""
        try:
            with open(self.history, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                tail = file.read()
        except FileNotFoundError:
            return []
        return [record for record in parsed_lines(tail) if "step" in record][-count:]

    def read_attempts(self) -> list[dict[str, Any]]:
        return read_lines(self.attempts)

    def snapshot_steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.snapshots.glob("*.safetensors"))

    def read_snapshot(self, step: int) -> dict[str, torch.Tensor]:
        return load_file(self.snapshot_path(step))

    def snapshot_path(self, step: int) -> Path:
        return self.snapshots / f"{step:08d}.safetensors"

    def write_snapshot(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(self.snapshot_path(step), tensors)

    def rewind(self, step: int) -> None:
        """Forget history lines and snapshots beyond a step: they belong to an attempt that is being redone."""
        lines = [line for line in self.read_history() if line["step"] <= step]
        write_text(self.history, "".join(json.dumps(line) + "\n" for line in lines))
        for later in self.snapshot_steps():
            if later > step:
                self.snapshot_path(later).unlink()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file, [] if it is absent; lines torn by a kill are left out."""
    return parsed_lines(path.read_bytes()) if path.is_file() else []


def parsed_lines(content: bytes) -> list[dict[str, Any]]:
    """JSON objects, one a line; what is torn is left out."""
    records = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line; where a kill tore the last one, begin a new line first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write((json.dumps(record) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: it is either the old one or the new one, whole and on disk."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, replaced in one step; tensors are moved to the CPU."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written under it takes the place of `path` when the block ends without
    an error.

    A kill leaves a hidden file, whose name begins with a dot and that of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- Plugins ----------------------------------------------------------------------------------------------------------


def save_source(method: str, folder: Path) -> None:
    """Leave the source of a method from a plugin in a folder; of a built-in one, nothing."""
    if plugin := plugin_of(method):
        write_bytes(folder / PLUGIN, plugin.source)


def require_source(folder: Path, config: Any) -> None:
    """Refuse the config of a folder if its method is not here, or is here from another source than `save_source` left.

    Args:
        folder: of a run or of `Tokenizer.save`.
        config: as JSON; a transformer's has that of its tokenizer, whose folder is `tokenizer`.

    Raises:
        OtherSourceError: one sentence that names the method, and the file to give by --plugin or IBQ_PLUGINS.
    """
    config = config if isinstance(config, dict) else {}
    if "tokenizer" in config:
        folder, config = folder / "tokenizer", config["tokenizer"]
    method = config["quantizer"].get("method") if isinstance(config.get("quantizer"), dict) else None
    if not isinstance(method, str):
        return  # the config's own errors say more
    copy = folder / PLUGIN
    kept = copy.read_bytes() if copy.is_file() else None
    if not is_method(method):
        file = copy if kept else "FILE"
        raise OtherSourceError(
            f"{folder} has a quantizer of method {method!r}, which is not built in; name its plugin by --plugin {file} "
            f"or {VARIABLE}={file}"
        )
    plugin = plugin_of(method)
    if kept and (plugin is None or plugin.source != kept):
        here = f"{plugin.path} has (sha256 {plugin.sha256[:8]})" if plugin else "is built in"
        raise OtherSourceError(
            f"{folder} was trained with another source of method {method!r} (sha256 "
            f"{sha256_of(kept)[:8]}) than {here}; name its own, --plugin {copy} or {VARIABLE}={copy}"
        )


@cache
def source_commit() -> str:
    """Commit of the source tree this package runs from, with '+' where it has uncommitted changes; 'unknown' outside a
    checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit, changed = (
            subprocess.run(["git", "-C", root, *question], capture_output=True, text=True, check=True).stdout.strip()
            for question in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")
