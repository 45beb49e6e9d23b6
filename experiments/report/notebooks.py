"""Execute the notebooks of a study with papermill and render them as self-contained pages; only those whose source or
rows changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from experiments import home
from experiments import rows as rows_module
from experiments.ablations import Ablation
from experiments.benchmarks import index_backprop
from experiments.report import continuation, templates
from experiments.report.figures import compact
from experiments.report.templates import Link
from experiments.study import ROOT, Study
from ibq.errors import ConfigError
from ibq.run_directory import write_text

SOURCES = ROOT / "notebooks"
MECHANISM = "00_how_ibq_works"
"""The notebook that belongs to no ablation and is executed for a report all the same."""
INTERACTIVE = {"09_collapse_explorer", "10_two_dimensional_playground"}
"""Those that are to be played with, and are executed for no report."""


def execute_changed(study: Study, say: Callable[[str], None] = print) -> None:
    """Execute notebook 00 and each ablation's into the report folder, but for those that would show what they showed
    the last time.

    A grid has no notebook, so there nothing is executed; nor have some ablations.
    """
    if study.grid:
        return
    home.provide()
    rows = rows_module.load(study)
    shown: dict[str, tuple[str, dict[str, Any]]] = {MECHANISM: (index_backprop.known_rows().to_csv(index=False), {})}
    for ablation in study.ablations:
        if ablation.notebook:
            parameters = {"preset": study.preset_name, "seeds": study.seeds, "overrides": study.overrides_of(ablation)}
            shown[ablation.notebook] = (_data(study, rows, ablation), parameters)
    for name, (data, parameters) in shown.items():
        source = SOURCES / f"{name}.ipynb"
        target = study.report_folder / "notebooks" / source.name
        if target.is_file() and _is_current(study, name, data):
            continue
        say(f"executing notebook {name}")
        execute(source, target, study, parameters)
        write_text(target.with_suffix(".html"), as_page(target))
        write_text(target.with_suffix(".stamp"), _fingerprint(source, data))


def page_of(study: Study, ablation: Ablation, rows: pd.DataFrame) -> tuple[str | None, bool]:
    """The address of an ablation's executed notebook within the report, None while there is none, and whether it shows
    these rows."""
    if ablation.notebook is None or not (study.report_folder / "notebooks" / f"{ablation.notebook}.html").is_file():
        return None, False
    return f"notebooks/{ablation.notebook}.html", _is_current(study, ablation.notebook, _data(study, rows, ablation))


def _data(study: Study, rows: pd.DataFrame, ablation: Ablation) -> str:
    """The rows of an ablation and of its other half, whatever other rows stand beside them."""
    shown = [rows[rows["ablation"] == ablation.name]]
    if other := continuation.other_half(study, ablation):
        shown.append(other.rows)
    return "".join(mine.dropna(axis=1, how="all").sort_index(axis=1).to_csv(index=False) for mine in shown)


def _is_current(study: Study, name: str, data: str) -> bool:
    stamp = study.report_folder / "notebooks" / f"{name}.stamp"
    return stamp.is_file() and stamp.read_text() == _fingerprint(SOURCES / f"{name}.ipynb", data)


def execute(source: Path, target: Path, study: Study, parameters: Mapping[str, Any]) -> None:
    """Run a notebook under papermill, in this study's folders.

    Raises:
        ConfigError: a cell failed; the message names it and the executed copy that shows the traceback.
    """
    import papermill  # as nbconvert below, only once there is a home

    target.parent.mkdir(parents=True, exist_ok=True)
    # the kernel must find the same folders, also those of smoke, which belong to this process
    folders = {"IBQ_RUNS": str(study.runs_folder), "IBQ_REPORTS": str(study.report_folder.parent)}
    before = {name: os.environ.get(name) for name in folders}
    os.environ.update(folders)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of papermill's and the kernel client's own code
            papermill.execute_notebook(
                source,
                target,
                parameters=dict(parameters),
                kernel_name="python3",
                progress_bar=False,
                cwd=source.parent,
                extra_arguments=[
                    "--IPKernelApp.log_level=40"
                ],  # errors only: the kernel warns of its own local sockets
            )
    except papermill.PapermillExecutionError as error:
        raise ConfigError(
            f"notebook {source.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; see {target}"
        ) from None
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def as_page(notebook: Path) -> str:
    """One HTML page that fetches nothing: no foreign script, font or image."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="basic", embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    content = nbformat.read(notebook, as_version=4)
    for output in [output for cell in content.cells for output in cell.get("outputs", [])]:
        if png := output.get("data", {}).get("image/png"):
            output["data"]["image/png"] = b64encode(compact(b64decode(png))).decode()
    body, _ = exporter.from_notebook_node(content)
    navigation = [Link("Overview", "../index.html"), Link(notebook.stem, None)]
    return templates.render(
        "notebook.html", title=notebook.stem, navigation=navigation, body=without_machine_paths(body)
    )


def without_machine_paths(text: str) -> str:
    """The text with this checkout's and this user's folders replaced by names, where they stand as paths of their
    own."""
    for folder, name in ((ROOT, "REPOSITORY"), (Path(os.path.expanduser("~")), "~")):
        if len(folder.parts) > 1:  # a home of "/" would name everything, and "~" is none
            text = re.sub(rf"(?<![\w/+.-]){re.escape(str(folder))}(?![\w+.-])", name, text)
    return text


def _fingerprint(source: Path, data: str) -> str:
    code = [
        path.read_text(encoding="utf-8")
        for suffix in ("py", "html", "css")
        for path in sorted((ROOT / "experiments").rglob(f"*.{suffix}"))
    ]
    return hashlib.sha256(json.dumps([source.read_text(encoding="utf-8"), data, code]).encode()).hexdigest()
