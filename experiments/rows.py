"""Rows: what runs found, joined to the ablations and arms that they serve."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from experiments import status
from experiments.analysis import diagnoses
from experiments.cells import Cell, trials
from experiments.study import Study
from ibq.errors import ConfigError
from ibq.evaluation.diagnosis import summary
from ibq.schema import flatten

if TYPE_CHECKING:
    import pandas as pd

FIRST_COLUMNS = ["ablation", "arm", "method", "codebook_size", "code_dim", "seed", "status"]
OF_THE_ROWS_IMAGES = (
    "fashion-cnn",
    "efficientnet-lite0",
    "lpips-alex",
    "lpips-vgg",
    "perceptual-efficientnet-lite0",
)
"""Evaluations of the very images that the row is of: they may bear plain names, and become columns beside the row's
own."""
PLAIN = (*OF_THE_ROWS_IMAGES, diagnoses.NAME)
"""Evaluations that bear plain names: of images, no others; and what needs none."""


def load(study: Study | None = None) -> pd.DataFrame:
    """One line per arm and seed of a study (default: the core study at quick), whether finished or not.

    Returns:
        Columns ablation, arm, method, codebook_size, code_dim, seed, status ("ok", "nan", "oom", "failed",
        "interrupted", "running", "stopped", "pending", "waiting" for a search, a tokenizer or neighbours; "oom" and
        "failed" also of a transformer whose tokenizer is so), `stage` ("tokenizer" or "transformer"), `started` (time
        at which its first attempt began, UTC), then the facts and metrics of finished runs, the levels of the arm's
        factors as `factor.<name>`, evaluations added later as `<evaluation>.<metric>` (those of PLAIN: as `<metric>`),
        and `reason` where there is no result. Runs of a search have arms of their own; `search.arm` names the arm they
        are for, `search.value` what they try, `search.loss` what decides. So have tokenizers of transformers;
        `tokenizer_of` names the transformer's arm. A transformer's line has `tokenizer.<name>` for what its tokenizer's
        row has, config fields left out. Lines of a map of collapse have `first.<name>` and `last.<name>` of their log.

    Raises:
        ConfigError: a run folder holds another run's row, or a damaged one.
    """
    import pandas as pd  # here, since status needs no frame and should answer at once

    study = study or Study()
    lines = [_line(cell) for cell in study.cells] + [_waiting_line(study, cell) for cell in study.waiting]
    frame = pd.DataFrame(lines)
    return frame[FIRST_COLUMNS + [column for column in frame.columns if column not in FIRST_COLUMNS]]


def of_arms(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines without those of transformers' tokenizers, which no table and no figure shows as arms."""
    return frame[frame["tokenizer_of"].isna()] if "tokenizer_of" in frame else frame


def _line(cell: Cell) -> dict[str, Any]:
    line = _arm_line(cell) | _started(cell)
    if cell.search:
        line |= {"search.arm": cell.search.arm, "search.value": cell.search.value}
    if cell.tokenizer_of:
        line["tokenizer_of"] = cell.tokenizer_of
    if cell.tokenizer:
        line |= _of_tokenizer(cell, cell.tokenizer)
    if cell.run.finished:
        facts = cell.ablation.adaptive.facts(cell.run, is_trial=cell.search is not None)
        return line | checked_row(cell) | _evaluations(cell) | facts
    return line | {"run": cell.run.path.name, "status": state(cell), "reason": _reason(cell)}


def _started(cell: Cell) -> dict[str, str]:
    """Column `started`, of a run that was."""
    times = [attempt["time"] for attempt in cell.run.read_attempts() if attempt["event"] == "started"]
    return {"started": datetime.fromtimestamp(times[0], UTC).isoformat(timespec="seconds")} if times else {}


def _arm_line(cell: Cell) -> dict[str, Any]:
    quantizer = cell.config.quantizer
    line: dict[str, Any] = {"ablation": cell.ablation.name, "arm": cell.arm.name, "method": quantizer.method}
    line |= {
        "codebook_size": quantizer.codebook_size,
        "code_dim": quantizer.code_dim,
        "seed": cell.seed,
        "stage": cell.stage,
    }
    line |= {f"config.{name}": value for name, value in flatten(cell.config.identity()).items()}
    return line | {f"factor.{name}": level for name, level in cell.arm.levels.items()}


def _waiting_line(study: Study, cell: Cell) -> dict[str, Any]:
    status, reason = _state_of_waiting(study, cell)
    return _arm_line(cell) | {"status": status, "reason": reason}


def _state_of_waiting(study: Study, cell: Cell) -> tuple[str, str]:
    """A waiting cell's state and why: "waiting", or that of its tokenizer where it is lost, so that no verdict passes
    over it."""
    if cell.tokenizer and (lost := state(cell.tokenizer)) in ("failed", "oom"):
        return lost, f"its tokenizer {cell.tokenizer.run.path.name}: {status.of(cell.tokenizer.run).reason}"
    return "waiting", waits_for(study, cell)


def _of_tokenizer(cell: Cell, tokenizer: Cell) -> dict[str, Any]:
    """Facts of the tokenizer that a transformer was trained on: the copy of its row, and evaluations since then."""
    copy = cell.run.tokenizer_row
    if not copy.is_file():
        return {}
    row: dict[str, Any] = json.loads(copy.read_text())
    added = _evaluations(tokenizer) if tokenizer.run.finished and tokenizer.run.read_row() == row else {}
    return {f"tokenizer.{name}": value for name, value in (row | added).items() if not name.startswith("config.")}


def waits_for(study: Study, cell: Cell) -> str:
    """Reason why a cell waits, in a phrase."""
    if cell.tokenizer and not any(each is cell.tokenizer for each in study.waiting):
        return f"waits for its tokenizer {cell.tokenizer.run.path.name}"
    arm = cell.ablation.arm(cell.tokenizer_of) if cell.tokenizer_of else cell.arm
    mine = [each for each in study.cells if each.ablation is cell.ablation]
    neighbours = [each.run for each in mine if each.arm.name in (arm.between or ()) and each.seed == 0]
    return cell.ablation.adaptive.waits_for(arm, trials(mine, cell.ablation, arm.name), neighbours)


def _reason(cell: Cell) -> str:
    """Reason why a run has no row, and its progress."""
    now = status.of(cell.run)
    progress = f"last logged step {now.step} of {cell.config.steps}" if now.step else ""
    return "; ".join(part for part in (now.reason, progress) if part)


def checked_row(cell: Cell) -> dict[str, Any]:
    """The row of a finished run, which must be the row of this very config.

    Raises:
        ConfigError: row.json is damaged or belongs to another run, as after copying folders about.
    """
    row = cell.run.read_row()
    if row.get("run") != cell.run.path.name:
        raise ConfigError(f"{cell.run.path} holds the row of run {row.get('run')!r}; forget the run and train it again")
    return row


def _evaluations(cell: Cell) -> dict[str, Any]:
    """Evaluations added after training: eval/<name>.json as columns <name>.<metric>, or, of evaluations that are PLAIN,
    <metric>."""
    columns: dict[str, Any] = {}
    for path in sorted((cell.run.path / "eval").glob("*.json")):
        prefix = "" if path.stem in PLAIN else f"{path.stem}."
        columns |= {f"{prefix}{key}": value for key, value in json.loads(path.read_text()).items()}
    return columns


def state(cell: Cell) -> str:
    """State of a run, as `status.of` has it; of a finished one, its row must be of this very config."""
    return str(checked_row(cell)["status"]) if cell.run.finished else status.of(cell.run).state


def status_lines(study: Study) -> list[dict[str, Any]]:
    """For `status`: every arm with its state and one phrase about it."""
    lines = []
    for cell in study.cells:
        lines.append({"arm": cell.name, "run": cell.run.path.name} | _state_and_detail(cell))
    for cell in study.waiting:
        kind, phrase = _state_of_waiting(study, cell)
        lines.append({"arm": cell.name, "state": kind, "detail": phrase, "run": ""})
    return lines


def _state_and_detail(cell: Cell) -> dict[str, str]:
    if cell.run.finished:
        row = checked_row(cell) | _evaluations(cell)
        return {"state": row["status"], "detail": status.result_of(row)}
    now, detail = status.of(cell.run), ""
    if now.step:
        detail = f"step {now.step} of {cell.config.steps}, {now.step / max(now.last['seconds'], 1e-9):.1f} steps/s"
        detail += diagnoses.phrase({diagnoses.NAME: summary(diagnoses.findings_of(cell))})
    if now.state in ("failed", "oom"):
        detail = now.reason + (f" ({detail})" if detail else "")
    return {"state": now.state, "detail": detail}
