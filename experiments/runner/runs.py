"""Commands on runs: forget, rerun, compare, and evaluate anew without training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from experiments.analysis import diagnoses
from experiments.cells import Cell, unique_runs
from experiments.rows import OF_THE_ROWS_IMAGES
from experiments.runner import torchrun
from experiments.runner.sweep import OWN_FOLDER
from experiments.study import Study, runs_folder
from ibq.config import RunConfig, TrainConfig
from ibq.data import load_images
from ibq.distributed import resolve_device
from ibq.errors import ConfigError, DataError, OtherSourceError, nearest, require_writable
from ibq.evaluation.tokenizer import OF_PAIRS, PERCEPTUAL, PerceptualEvaluation, UnfitError, evaluate
from ibq.evaluation.transformer import evaluate_samples
from ibq.metrics import NETWORKS
from ibq.models.tokenizer import Tokenizer, load_tokenizer
from ibq.plugins import sha256_of
from ibq.run_directory import RunDirectory, write_json
from ibq.schema import flatten
from ibq.training.runtime import Runtime

EVALUATIONS: dict[str, str] = {
    "full_test": "the whole test split, where the row has its first images only",
    "train_split": "as many images of the train split: what the tokenizer has seen",
    **NETWORKS,
    diagnoses.NAME: "what a tokenizer's history shows, in words: whether its codebook has collapsed, and of what",
}
"""Evaluations of finished runs by name, and what they add to the row: as `name.metric` unless it is one of
`rows.PLAIN`."""


def find_run(name: str) -> RunDirectory:
    """A run of the runs folder by its id, or by an unambiguous beginning of it.

    Raises:
        ConfigError: no run or several begin so; a name that is not an id (a path, say) is not looked up at all.
    """
    folder = runs_folder()
    known = sorted(path.parent.name for path in folder.glob("[!.]*/config.json"))
    matches = [run for run in known if run == name] or [run for run in known if name and run.startswith(name)]
    if len(matches) == 1:
        return RunDirectory(folder / matches[0])
    if matches:
        found = f"{len(matches)} runs begin with it"
    else:
        found = f"no run has that id; {nearest(name, known)}" if known else f"there are no runs in {folder}"
    raise ConfigError(f"run {name!r} cannot be chosen: {found}")


def forget(run: RunDirectory) -> None:
    """Remove a run for good. It leaves the runs folder in one step, so that a kill leaves no half of it behind.

    Transformers that were trained on a tokenizer outlive it: each has a copy of it and of its row. The study's next run
    trains the tokenizer again, since it is one of its runs, and no finished transformer.

    Raises:
        ConfigError: the run is being trained.
    """
    doomed = run.path.with_name(f".forgotten-{run.path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        with FileLock(run.lock, timeout=0):
            run.path.rename(doomed)
    except Timeout:
        raise ConfigError(f"run {run.path.name} is being trained; stop it first") from None
    shutil.rmtree(doomed)


def transformers_on(tokenizer: RunDirectory) -> list[RunDirectory]:
    """The runs of transformers that have a copy of a tokenizer's run."""
    copies = sorted(tokenizer.path.parent.glob("transformer-*/tokenizer/row.json"))
    return [
        RunDirectory(path.parents[1]) for path in copies if json.loads(path.read_text())["run"] == tokenizer.path.name
    ]


def kept_copies(tokenizer: RunDirectory) -> str:
    """Phrase on the transformers of a tokenizer that is forgotten or trained again; empty where there are none."""
    transformers = transformers_on(tokenizer)
    if not transformers:
        return ""
    if len(transformers) == 1:
        return "1 transformer trained on it keeps its copy of it: forget it to train it anew"
    return f"{len(transformers)} transformers trained on it keep their copy of it: forget them to train them anew"


def rerun(
    run: RunDirectory, device: str = "auto", say: Callable[[str], None] = print
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Train a run's config again, beside it; once the new row is there, it takes the old one's place.

    Device aside, it is watched as the last attempt was (cadences, images of the evaluation, threads). A transformer is
    trained on the tokenizer as it now is. Transformers whose tokenizer is trained again stay as they are, each with its
    copy.

    Returns:
        The former row and the new one, each None where there is none.

    Raises:
        ConfigError: the run was never started, its config cannot be read, or its tokenizer is not finished.
    """
    config, before = run.read_config(), run.read_row() if run.finished else None
    started = [attempt for attempt in run.read_attempts() if attempt["event"] == "started"]
    if not started:
        raise ConfigError(f"run {run.path.name} was never started; train it by `run` or `train` first")
    fresh = RunDirectory(run.path.with_name(f".rerun-{run.path.name}"))
    fields = started[-1]["runtime"]
    runtime = Runtime(**fields | {"device": device, "guidances": tuple(fields["guidances"])})
    threads = torch.get_num_threads()
    torch.set_num_threads(started[-1]["threads"])  # sums, and so rows, depend on the threads in their last bits
    try:
        torchrun.train(config, runtime, fresh.path, say, _tokenizer_of(run, config))
    except SystemExit:  # it has been said why
        return before, None
    finally:
        torch.set_num_threads(threads)
    forget(run)
    fresh.path.rename(run.path)
    return before, run.read_row()


def _tokenizer_of(run: RunDirectory, config: RunConfig) -> Tokenizer | RunDirectory | None:
    """The tokenizer of a transformer's run: the finished run that it names, or where it names none the copy in it."""
    if isinstance(config, TrainConfig):
        return None
    if run.tokenizer_row.is_file():
        tokenizer = RunDirectory(run.path.with_name(json.loads(run.tokenizer_row.read_text())["run"]))
        if not tokenizer.finished:
            raise ConfigError(
                f"run {run.path.name} needs its tokenizer, run {tokenizer.path.name}, which is not finished; train "
                f"that one first"
            )
        return tokenizer
    return load_tokenizer(run.tokenizer)


def compare(one: RunDirectory, other: RunDirectory) -> list[tuple[str, Any, Any]]:
    """Config fields and row entries in which two runs differ, as (name, value of one, value of the other)."""
    sides = []
    for run in (one, other):
        facts = _facts(run)
        row = run.read_row() if run.finished else {"status": "unfinished"}
        sides.append(facts | {name: value for name, value in row.items() if not name.startswith("config.")})
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [
        (name, sides[0].get(name), sides[1].get(name)) for name in names if sides[0].get(name) != sides[1].get(name)
    ]


def _facts(run: RunDirectory) -> dict[str, Any]:
    """Config fields, and the hash of a plugin's source; as they stand in the file where that source is not loaded."""
    try:
        tree = run.read_config().to_json_dict()
    except OtherSourceError:  # of two runs one may be of the plugin as it was
        tree = json.loads(run.config.read_text())
    return flatten(tree) | ({"plugin_sha256": sha256_of(run.plugin.read_bytes())} if run.plugin.is_file() else {})


def evaluate_finished(study: Study, name: str, say: Callable[[str], None] = print) -> int:
    """Add an evaluation to every finished run of a study that lacks it, as eval/<name>.json; returns how many were
    added.

    Runs of a search are passed by, since no table shows them but for what decided. So are, with a word, runs that the
    metric does not fit,
    and transformers: their tokenizers are evaluated, and but for `inception` their samples were when they were trained.

    Raises:
        ConfigError: an unknown evaluation (the nearest is named), or a run's folder cannot be written.
        DataError: a network's weights are absent, or there are runs to measure and the metric fits none of them.
    """
    if name not in EVALUATIONS:
        raise ConfigError(f"evaluation {name!r} does not exist; {nearest(name, EVALUATIONS)}")
    if name == diagnoses.NAME:
        return diagnoses.evaluate(study, say)
    compared = unique_runs(cell for cell in study.cells if not cell.search)
    rows = [
        (cell, cell.run.read_row())
        for cell in compared
        if cell.run.finished and not evaluation_file(cell, name).is_file()
    ]
    todo = [
        (cell, row) for cell, row in rows if row["status"] == "ok" and f"kid[{name}]" not in row
    ]  # a row may have it from training
    if name != "inception" and (passed_by := [cell for cell, _ in todo if cell.tokenizer]):
        todo = [(cell, row) for cell, row in todo if not cell.tokenizer]
        say(
            f"{name} is of tokenizers: {len(passed_by)} transformers are passed by, whose own metrics came with their "
            f"training"
        )
    for cell, _ in todo:
        require_writable(evaluation_file(cell, name).parent, OWN_FOLDER)
    device, batch_size = resolve_device("auto"), study.preset.runtime.eval_batch_size
    perceptual = PerceptualEvaluation(name, device) if name in PERCEPTUAL else None
    split_of = lru_cache(maxsize=1)(load_images)  # the runs of a study mostly share their images
    reasons = []
    for i, (cell, row) in enumerate(todo, 1):
        if name in OF_THE_ROWS_IMAGES:
            images, n_images = split_of(cell.config.data, row["protocol.split"]), row["protocol.n_images"]
        elif name == "train_split":
            images, n_images = split_of(cell.config.data, "train"), study.preset.runtime.eval_images
        else:
            images = split_of(cell.config.data, "test")
            n_images = len(images)
        tokenizer = load_tokenizer(cell.run.tokenizer if cell.tokenizer else cell.run.path).to(device)
        try:
            if perceptual and cell.tokenizer:
                metrics, protocol = evaluate_samples(
                    perceptual, tokenizer, load_file(cell.run.generated), images, n_images, batch_size
                )
            else:
                metrics, protocol, *_ = (perceptual or evaluate)(tokenizer, images, n_images, batch_size, weights="ema")
        except UnfitError as error:
            reasons.append(str(error))
            say(f"[{i}/{len(todo)}] {name} {cell.name}: {error}")
            continue
        write_json(evaluation_file(cell, name), metrics | {f"protocol.{key}": value for key, value in protocol.items()})
        say(f"[{i}/{len(todo)}] {name} {cell.name}: {_summary(metrics, protocol)}")
    if todo and len(reasons) == len(todo):
        raise DataError(reasons[0])
    return len(todo) - len(reasons)


def _summary(metrics: dict[str, float], protocol: dict[str, Any]) -> str:
    """A few of the numbers, at least one, and why any is absent."""
    fids = ("fid", "fid[fashion-cnn]", "fid[efficientnet-lite0]")
    of_interest = ("perplexity", "dimension_used", "l1", *fids, *OF_PAIRS.values())
    shown = [key for key in of_interest if key in metrics]
    numbers = [f"{key} {metrics[key]:.4g}" for key in shown or list(metrics)[:1]]
    return ", ".join(numbers + [f"{key} {why}" for key, why in protocol.items() if str(why).startswith("absent: ")])


def evaluation_file(cell: Cell, name: str) -> Path:
    return cell.run.path / "eval" / f"{name}.json"
