"""The report of a study, from rows and run directories alone: tables, figures, one self-contained page. Trains nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from experiments import figures, notebooks, tables, tuning
from experiments import rows as rows_module
from experiments.ablations import ABLATIONS, Ablation
from experiments.findings import findings
from experiments.study import ROOT, Study, file_name
from ibq.errors import ConfigError
from ibq.run_directory import read_lines, write_text

FACTS = ["device", "cores", "threads", "torch", "python", "commit"]
PROTOCOL = "protocol."


def widened(study: Study) -> Study:
    """The study with every other ablation that has a finished run under the same fields: a report shows all there is. A grid is alone."""
    if study.grid:
        return study
    names = []
    for name in ABLATIONS:
        alone = replace(study, ablation_names=(name,))
        try:
            finished = any(cell.run.finished for cell in alone.cells)
        except ConfigError:  # a changed field that this ablation's arms differ in
            finished = False
        if finished or name in {ablation.name for ablation in study.ablations}:
            names.append(name)
    return replace(study, ablation_names=tuple(names))


def write(study: Study) -> Path:
    """Write rows.csv, tables/, figures/ and index.html into the study's report folder; returns the page's path."""
    folder = study.report_folder
    rows = rows_module.load(study)
    for stale in ("tables", "figures"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    write_text(folder / "rows.csv", rows.to_csv(index=False))
    sections = [_section(study, ablation, rows, folder) for ablation in study.ablations]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=select_autoescape())
    mechanism = Path("notebooks") / f"{notebooks.MECHANISM}.html"
    page = environment.get_template("report.html").render(
        study=study,
        sections=sections,
        facts=_facts(rows),
        sessions=_sessions(folder),
        mechanism=mechanism.as_posix() if (folder / mechanism).is_file() else None,
    )
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _section(study: Study, ablation: Ablation, rows: pd.DataFrame, folder: Path) -> dict[str, Any]:
    mine = rows[rows["ablation"] == ablation.name]
    shown_tables, shown_figures, stem = [], [], file_name(ablation.name)
    for name in ablation.tables:
        table, caption = tables.build(name, ablation, mine), tables.TABLES[name][1]
        if not table.empty:
            tables.write(table, folder / "tables", f"{stem}_{name}", caption)
            html = table.to_html(index=False, border=0, escape=True)
            shown_tables.append({"name": name, "file": f"tables/{stem}_{name}", "caption": caption, "html": html})
    for name in ablation.figures:
        figure = figures.draw(name, study, ablation, mine)
        if figure is not None:
            figures.save(figure, folder / "figures", f"{stem}_{name}")
            shown_figures.append({"name": name, "file": f"figures/{stem}_{name}", "caption": figures.caption(name, study, ablation)})
    return {
        "ablation": ablation,
        "findings": findings(ablation, rows),
        "tables": {table["name"]: table for table in shown_tables},
        "figures": {figure["name"]: figure for figure in shown_figures},
        "missing": mine[mine["status"] != "ok"].to_dict("records"),
        "notebook": f"notebooks/{ablation.notebook}.html" if (folder / "notebooks" / f"{ablation.notebook}.html").is_file() else None,
        "source": f"source: {ablation.paper_source}",
        "protocol": protocol(ablation, mine),
    }


def protocol(ablation: Ablation, rows: pd.DataFrame) -> str:
    """Without this a number means nothing: split, images, tokens, weights, what uniform sampling would give, and how a field was tuned."""
    finished = rows[rows["status"] == "ok"]
    if finished.empty:
        return ""
    names = ["protocol.split", "protocol.n_images", "protocol.weights", "tokens", "codebook_size", "uniform_usage", "uniform_perplexity"]
    sentences = []
    for split, n_images, weights, tokens, K, usage, perplexity in finished[names].drop_duplicates().itertuples(index=False):
        sentences.append(
            f"Protocol: the first {int(n_images):,} images of the {split} split, {int(tokens):,} tokens, {weights} weights; as many tokens "
            f"drawn uniformly would use {100 * usage:.1f}% of {int(K):,} codes at a perplexity of {perplexity:.0f}."
        )
    if ablation.tuning:
        times = ", ".join(f"{factor:g}" for factor in ablation.tuning.factors)
        sentences.append(
            f"Tuning: {ablation.tuning.field} at {times} times the recipe's value, in runs of {100 * ablation.tuning.step_share:.0f}% "
            f"of the steps with the whole schedule, seed 0; {tuning.RULE}."
        )
    return " ".join(sentences)


def _facts(rows: pd.DataFrame) -> dict[str, str]:
    """Machine, versions, commit and protocol of the finished rows; several values stand side by side, so that a mixture shows."""
    finished = rows[rows["status"] == "ok"]
    names = [name for name in FACTS if name in finished] + sorted(name for name in finished if name.startswith(PROTOCOL))
    facts = {name.removeprefix(PROTOCOL): ", ".join(str(v) for v in finished[name].unique()) for name in names}
    if "train_seconds" in finished and not finished.empty:
        runs = finished.drop_duplicates("run")
        facts["runs"] = f"{len(runs)}, {runs['train_seconds'].sum() / 60:.1f} minutes of training in all"
        facts["parameters a run"] = ", ".join(f"{int(n):,}" for n in sorted(runs["parameters"].unique()))
        facts["peak memory a run"] = f"{runs['peak_memory_gib'].max():.2f} GiB"
    return facts


def record_session(study: Study, command: str, trained: int, minutes: float) -> None:
    """Note a session that trained something, for the report's head."""
    folder = study.report_folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sessions.jsonl", "a") as file:
        date = pd.Timestamp.now("UTC").strftime("%Y-%m-%d")
        file.write(json.dumps({"date": date, "command": command, "trained": trained, "minutes": round(minutes, 1)}) + "\n")


def _sessions(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "sessions.jsonl")


def publish(study: Study) -> Path:
    """Copy what `write` rendered to reports/published/<study>, as a snapshot to commit; machine paths are taken out of notebooks."""
    target = ROOT / "reports" / "published" / study.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(study.report_folder, target, ignore=shutil.ignore_patterns("*.stamp", "*.ipynb"))
    for page in [path for path in target.rglob("*") if path.suffix in (".html", ".csv", ".md", ".tex", ".jsonl")]:
        page.write_text(notebooks.without_machine_paths(page.read_text()))
    return target
