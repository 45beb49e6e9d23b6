"""The report of a study, from rows and run directories alone: a first page, a page an ablation, tables, figures,
curves. Trains nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from experiments import rows as rows_module
from experiments.ablations import ABLATIONS, Ablation
from experiments.analysis import claims, diagnoses
from experiments.analysis.findings import findings
from experiments.report import continuation, curves, figures, layout, notebooks, provenance, tables, templates
from experiments.report.configs import differing_fields
from experiments.report.templates import Link
from experiments.runner import plan
from experiments.study import ROOT, Study, file_name
from ibq.errors import ConfigError, require_writable
from ibq.evaluation.diagnosis import summary
from ibq.metrics.quality import RELEASED_PSNR, RELEASED_SSIM, SSIM_WINDOW
from ibq.run_directory import read_lines, write_text

FIRST_PAGE = "index.html"
OWN_FOLDER = "name a folder of your own for reports by IBQ_REPORTS"
PAPER_CLAIMS, OWN_CLAIMS = "claims_of_the_paper", "claims_of_this_study"


def widened(study: Study) -> Study:
    """The study with what other ablations have finished under the same fields, so that a report shows all there is. A
    grid is alone.

    An ablation joins if a run of an arm of its own is finished, one that none of the named ablations has; of it, only
    what is finished is shown. One that is trained on request alone joins last, and not for runs that those of the
    others are, too.
    """
    if study.grid:
        return study
    cells, own = list(study.cells), {cell.run.path for cell in study.cells}
    joining = []
    absent = ABLATIONS.keys() - {ablation.name for ablation in study.ablations}
    for name in sorted(absent, key=lambda name: ABLATIONS[name].on_request):
        if ABLATIONS[name].on_request:
            own = {cell.run.path for cell in cells}
        try:
            finished = [cell for cell in study.of(name).cells if cell.run.finished]
        except ConfigError:  # a changed field that this ablation's arms differ in
            continue
        if any(cell.run.path not in own and not cell.tokenizer_of for cell in finished):
            joining.append(name)
            cells += finished
    names = {ablation.name for ablation in study.ablations} | set(joining)
    return study.of(*(name for name in ABLATIONS if name in names)).only(cells, study.waiting)


def write(study: Study) -> Path:
    """Write rows.csv, tables/, figures/, curves/ and the pages into the study's report folder; returns the first page's
    path.

    Of several processes one writes at a time.

    Raises:
        ConfigError: the folder cannot be written.
    """
    require_writable(study.report_folder, OWN_FOLDER)
    folder = study.report_folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        rows = rows_module.load(study)
        for stale in ("tables", "figures", "curves"):
            shutil.rmtree(folder / stale, ignore_errors=True)
        write_text(folder / "rows.csv", rows.to_csv(index=False))
        sections = [_section(study, ablation, rows, folder) for ablation in study.ablations]
        written = {FIRST_PAGE: _first_page(study, sections, rows, folder)}
        written |= {section["page"]: _ablation_page(study, section, sections) for section in sections}
        for name, text in written.items():
            write_text(folder / name, text)
        for path in folder.glob("*.html"):
            if path.name not in written:
                path.unlink()
    return folder / FIRST_PAGE


def page_name(ablation: Ablation) -> str:
    return f"{file_name(ablation.name)}.html"


def _section(study: Study, ablation: Ablation, rows: pd.DataFrame, folder: Path) -> dict[str, Any]:
    """Write an ablation's files; returns what its page and its line on the first page show."""
    mine = rows[rows["ablation"] == ablation.name]
    of_arms = rows_module.of_arms(mine)
    differing, common = differing_fields(study, ablation)
    items = [*_figures(study, ablation, mine, folder), *_tables(ablation, mine, folder)]
    notebook, current = notebooks.page_of(study, ablation, rows)
    return {
        "ablation": ablation,
        "page": page_name(ablation),
        "claims": claims.claims_of(study, ablation, rows),
        "findings": findings(ablation, rows),
        "continued": _continued(study, ablation, folder),
        "verdicts": next((item for item in items if item.name == "verdicts"), None),
        "parts": layout.arrange(items),
        "thumbnail": next((item for item in items if item.html is None), None),
        "configs": _written(
            differing, folder, f"{file_name(ablation.name)}_configs", "The config fields in which arms differ."
        ),
        "common": common,
        "curves": curves.write(study, ablation, folder),
        "diagnoses": _diagnoses(study, ablation, folder),
        "missing": provenance.missing(mine),
        "finished": int((of_arms["status"] == "ok").sum()),
        "lost": int((of_arms["status"] != "ok").sum()),
        "minutes": provenance.minutes(mine),
        "facts": provenance.facts(mine),
        "warnings": provenance.warnings(mine, by="arm"),
        "command": plan.command(study, ablation.name),
        "notebook": notebook,
        "notebook_is_current": current,
    }


def _continued(study: Study, ablation: Ablation, folder: Path) -> dict[str, Any] | None:
    """The half of the question that another ablation answers: its note, claims and table; None where there is no other
    half."""
    other = continuation.other_half(study, ablation)
    if other is None:
        return None
    shown: dict[str, Any] = {
        "title": other.ablation.title,
        "ablation": other.ablation,
        "note": other.note,
        "claims": [],
        "table": None,
    }
    if other.has_result:
        stem = f"{file_name(ablation.name)}_{file_name(other.ablation.name)}"
        shown["table"] = _written(other.arms_table(), folder, stem, tables.TABLES["arms"][1])
        shown["claims"] = claims.claims_of(study, other.ablation, other.rows)
    return shown


def _diagnoses(study: Study, ablation: Ablation, folder: Path) -> dict[str, Any] | None:
    """Diagnoses of tokenizers: a table with a phrase a run, and the sentences of each; None where
    nothing is."""
    seen = diagnoses.seen_in(study, ablation)
    if not seen:
        return None
    table = pd.DataFrame(
        [{"arm": cell.arm.name, "seed": cell.seed, "seen in its history": summary(found)} for cell, found in seen]
    )
    item = _written(
        table,
        folder,
        f"{file_name(ablation.name)}_diagnoses",
        "Runs whose history shows that something is wrong, and what.",
    )
    sentences = [
        (f"{cell.arm.name}, seed {cell.seed}", [finding.sentence for finding in found]) for cell, found in seen
    ]
    return {"table": item, "sentences": sentences}


def _figures(study: Study, ablation: Ablation, rows: pd.DataFrame, folder: Path) -> list[layout.Item]:
    items = []
    for name in ablation.figures:
        figure = figures.draw(name, study, ablation, rows)
        if figure is not None:
            stem = f"{file_name(ablation.name)}_{name}"
            figures.save(figure, folder / "figures", stem)
            items.append(layout.Item(name, f"figures/{stem}", figures.caption(name, study, ablation)))
    return items


def _tables(ablation: Ablation, rows: pd.DataFrame, folder: Path) -> list[layout.Item]:
    of_paper = (
        f"Source: {ablation.paper_source}. Compare directions only. PSNR: {RELEASED_PSNR}. SSIM: {RELEASED_SSIM}. Ours "
        f"are of floats, SSIM in an {SSIM_WINDOW}×{SSIM_WINDOW} Gaussian window."
    )
    notes = {"arms": provenance.protocol(ablation, rows), "paper": of_paper}
    items = []
    for name in ablation.tables:
        table = tables.build(name, ablation, rows)
        if not table.empty:
            item = _written(table, folder, f"{file_name(ablation.name)}_{name}", tables.TABLES[name][1])
            items.append(replace(item, name=name, note=notes.get(name, "")))
    return items


def _written(table: pd.DataFrame, folder: Path, stem: str, caption: str) -> layout.Item:
    tables.write(table, folder / "tables", stem, caption)
    return layout.Item(stem, f"tables/{stem}", caption, table.to_html(index=False, border=0, escape=True))


def _first_page(study: Study, sections: list[dict[str, Any]], rows: pd.DataFrame, folder: Path) -> str:
    everything = claims.claims(study, rows)
    paper = [claim for claim in everything if claim.paper]
    own = [claim for claim in everything if not claim.paper]
    mechanism = f"notebooks/{notebooks.MECHANISM}.html"
    return templates.render(
        "index.html",
        study=study,
        navigation=_navigation(sections, FIRST_PAGE),
        sections=sections,
        shown={section["ablation"].name: section["page"] for section in sections},
        paper=_judged(
            paper, folder, PAPER_CLAIMS, "Every claim of the paper, and what the rows of this study say of it."
        ),
        own=_judged(own, folder, OWN_CLAIMS, "This study's own questions, and what its rows say of them."),
        facts=provenance.facts(rows),
        warnings=provenance.warnings(rows, by="ablation"),
        sessions=read_lines(folder / "sessions.jsonl"),
        command=plan.command(study, *(section["ablation"].name for section in sections)),
        mechanism=mechanism if (folder / mechanism).is_file() else None,
    )


def _judged(of: list[claims.Claim], folder: Path, stem: str, caption: str) -> dict[str, Any] | None:
    """Claims with their count and table, None where there are none."""
    return (
        {"claims": of, "count": claims.count(of), "table": _written(claims.table(of), folder, stem, caption)}
        if of
        else None
    )


def _ablation_page(study: Study, section: dict[str, Any], sections: list[dict[str, Any]]) -> str:
    return templates.render("ablation.html", study=study, navigation=_navigation(sections, section["page"]), s=section)


def _navigation(sections: list[dict[str, Any]], current: str) -> list[Link]:
    links = [("Overview", FIRST_PAGE), *((section["ablation"].title, section["page"]) for section in sections)]
    return [Link(label, None if address == current else address) for label, address in links]


def record_session(study: Study, command: str, trained: int, minutes: float) -> None:
    """Note a session that trained something, for the first page."""
    folder = study.report_folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sessions.jsonl", "a") as file:
        date = pd.Timestamp.now("UTC").strftime("%Y-%m-%d")
        file.write(
            json.dumps({"date": date, "command": command, "trained": trained, "minutes": round(minutes, 1)}) + "\n"
        )


def publish(study: Study, name: str) -> Path:
    """Copy what `write` rendered to reports/published/<name>, as a snapshot to commit; machine paths are taken out of
    notebooks."""
    target = ROOT / "reports" / "published" / file_name(name)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(study.report_folder, target, ignore=shutil.ignore_patterns("*.stamp", "*.ipynb", ".lock"))
    for page in [path for path in target.rglob("*") if path.suffix in (".html", ".csv", ".md", ".tex", ".jsonl")]:
        page.write_text(notebooks.without_machine_paths(page.read_text(encoding="utf-8")), encoding="utf-8")
    return target
