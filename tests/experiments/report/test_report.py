from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from smoke_study import AT_SMOKE
from transformer_rows import NOT_AT_SMOKE

from experiments import rows
from experiments.ablations import ABLATIONS, Ablation, Arm
from experiments.analysis import claims
from experiments.analysis.claims import UNTESTED
from experiments.analysis.effects import effects
from experiments.analysis.findings import findings
from experiments.analysis.verdicts import WORDS
from experiments.report import curves, figures, layout, pages, provenance, tables
from experiments.report.configs import differing_fields
from experiments.study import Study
from ibq.run_directory import append_line, write_json

ABLATION, PARTS = ABLATIONS["vq_vs_ibq"], ABLATIONS["recipe_parts"]
pytestmark = pytest.mark.usefixtures("coarse_pictures")


def pages_of(first_page: Path) -> list[Path]:
    return sorted(first_page.parent.glob("*.html"))


def test_everything_is_there_and_every_link_leads_somewhere(first_page: Path) -> None:
    folder = first_page.parent
    expected = {
        f"{ablation.name}_{name}"
        for ablation in AT_SMOKE.values()
        for name in ablation.figures
        if name not in NOT_AT_SMOKE
    }
    assert {path.stem for path in (folder / "figures").iterdir()} == expected
    assert {path.name for path in pages_of(first_page)} == {"index.html", *(f"{name}.html" for name in AT_SMOKE)}
    linked = set()
    for page in pages_of(first_page):
        text = page.read_text()
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            address, _, anchor = target.partition("#")
            assert (folder / address).is_file(), target
            assert not anchor or f'id="{anchor}"' in (folder / address).read_text(), target
            linked.add(address)
    assert {f"curves/{name}.csv" for name in AT_SMOKE} <= linked
    assert {f"figures/{name}.{suffix}" for name in expected for suffix in ("png", "pdf")} <= linked
    assert {str(path.relative_to(folder)) for path in (folder / "tables").iterdir()} <= linked


def test_pages_are_self_contained(first_page: Path) -> None:
    for page in pages_of(first_page):
        text = page.read_text()
        assert "<script" not in text
        assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)
        assert "@import" not in text
        assert "url(" not in text


def test_the_first_page_has_every_claim_and_each_ablations_page_its_own(first_page: Path) -> None:
    first = unescape(first_page.read_text())
    for ablation in AT_SMOKE.values():
        page = unescape((first_page.parent / f"{ablation.name}.html").read_text())
        for contrast in ablation.contrasts:
            assert contrast.claim in first
            assert contrast.claim in page
            assert contrast.paper in first
        assert f"python -m experiments run {ablation.name} --preset smoke" in page
    for claim in UNTESTED:
        assert claim.sentence in first
        assert f"{claim.paper}." in first
    table = pd.read_csv(first_page.parent / "tables" / "claims_of_the_paper.csv")
    own = pd.read_csv(first_page.parent / "tables" / "claims_of_this_study.csv")
    assert len(table) + len(own) == len(UNTESTED) + sum(len(ablation.contrasts) for ablation in AT_SMOKE.values())
    assert set(table["verdict"].str.split(r"[:(]").str[0].str.strip()) <= set(WORDS)


def test_two_reports_on_the_same_rows_are_the_same_bytes(
    first_page: Path, trained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time each kind of figure is drawn once, for the last ablation that has it; the files of the others
    stay as they were."""
    files = sorted(path for path in first_page.parent.rglob("*") if path.is_file())
    assert {path.suffix for path in files} >= {".html", ".csv", ".md", ".tex", ".png", ".pdf"}
    before = {path: path.read_bytes() for path in files}
    drawn_for = {name: ablation for ablation in trained[0].ablations for name in ablation.figures}
    draw, save, redrawn = figures.draw, figures.save, set()

    def draw_once(name: str, study: Study, ablation: Ablation, table: pd.DataFrame) -> Figure | None:
        return draw(name, study, ablation, table) if drawn_for[name] is ablation else Figure()

    def save_once(figure: Figure, folder: Path, stem: str) -> None:
        if figure.axes:
            redrawn.add(stem)
            save(figure, folder, stem)
        else:
            for suffix in ("png", "pdf"):
                path = folder / f"{stem}.{suffix}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(before[path])

    monkeypatch.setattr(figures, "draw", draw_once)
    monkeypatch.setattr(figures, "save", save_once)
    pages.write(trained[0])
    there = {path.stem for path in files if path.suffix == ".png"}
    assert redrawn == {f"{ablation.name}_{name}" for name, ablation in drawn_for.items()} & there
    assert [path.name for path in files if path.read_bytes() != before[path]] == []
    assert sorted(path for path in first_page.parent.rglob("*") if path.is_file()) == files


def test_a_page_that_no_ablation_has_any_more_goes(
    trained: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path))
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    study = Study("smoke", ("vq_vs_ibq",))
    study.report_folder.mkdir(parents=True)
    (study.report_folder / "former.html").write_text("former")
    pages.write(study)
    assert {page.stem for page in study.report_folder.glob("*.html")} == {"index", "vq_vs_ibq"}


def test_curves_have_every_log_line_of_every_run(trained: tuple) -> None:
    study: Study = trained[0]
    for ablation in AT_SMOKE.values():
        table = curves.curves(study, ablation)
        cells = [cell for cell in study.cells if cell.ablation is ablation]
        assert len(table) == sum(len(cell.run.read_history()) for cell in cells)
        assert list(table)[:5] == ["arm", "seed", "run", "status", "step"]
        mine = table[table["run"] == cells[0].run.path.name]
        assert list(mine["perplexity"]) == [line["perplexity"] for line in cells[0].run.read_history()]


def test_only_fields_in_which_arms_differ_stand_in_the_table(trained: tuple) -> None:
    table, common = differing_fields(trained[0], ABLATIONS["double_quant_loss"])
    assert list(table)[:2] == ["", "arm"]
    assert set(table) - {"", "arm"} == {"quantizer.double", "quantizer.beta_on", "quantizer.entropy_weight", "optim.lr"}
    assert dict(zip(table["arm"], table["quantizer.double"], strict=True))["single"] == "false"
    assert common["quantizer.codebook_init"] == "normal"
    assert common["batch_size"] == "8"
    assert "seed" not in {*table, *common}


def test_a_field_that_a_method_has_not_is_a_dash_and_one_still_searched_for_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "none"))
    table, _ = differing_fields(Study("smoke", ("quantizers",)), ABLATIONS["quantizers"])
    by_arm = table.set_index("arm")
    assert by_arm.loc["vq", "quantizer.double"] == "–"
    assert by_arm.loc["ibq", "quantizer.double"] == "true"
    assert "not chosen yet" in by_arm.to_numpy() or "optim.lr" not in by_arm


def test_a_study_without_rows_renders_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "none"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    study = Study("smoke", tuple(AT_SMOKE))
    first_page = pages.write(study)
    texts = {page.stem: page.read_text() for page in pages_of(first_page)}
    assert re.search(r"<b>pending</b>, 8 runs: vq_published seed 0; ", texts["vq_vs_ibq"])
    assert (
        "<b>waiting</b> (waits for the search of simvq, 0 of 3 runs finished), 1 run: simvq seed 0"
        in texts["quantizers"]
    )
    assert not any("<img" in text for text in texts.values())
    assert not re.search(r'class="verdict (supported|smaller-than-claimed|contradicted)"', texts["index"])
    assert set(rows.load(study)["status"]) == {"pending", "waiting"}


def test_a_figure_or_table_that_no_section_names_is_shown_at_the_end() -> None:
    items = [layout.Item(name, name, "") for name in ("unheard_of", "rate_distortion", "scaling", "verdicts")]
    items += [layout.Item("scaling", "t", "", html="<table>")]
    arranged = layout.arrange(items)
    assert [(heading, [item.file for item in below]) for heading, below in arranged] == [
        ("Over size", ["scaling", "t"]),
        ("Usage and quality side by side", ["rate_distortion"]),
        ("More", ["unheard_of"]),
    ]


def test_rows_of_several_commits_or_devices_are_flagged(
    trained: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = Study("smoke", ("vq_vs_ibq", "double_quant_loss"))
    frame = rows.load(study)
    frame["commit"] = "aaaaaaaaaaaa"
    assert provenance.warnings(frame, by="ablation") == []
    alone = frame["arm"] == "vq_features"
    frame.loc[alone, ["commit", "device"]] = ["bbbbbbbbbbbb+", "another CPU"]
    one = frame[frame["ablation"] == "vq_vs_ibq"]
    assert provenance.warnings(one, by="arm") == [
        "These rows span 2 commits, so that differences may be of the code or the machine: aaaaaaaaaaaa (7 runs); "
        "bbbbbbbbbbbb+ (1 run: "
        "vq_features).",
        f"These rows span 2 devices, so that differences may be of the code or the machine: {one['device'].iloc[0]} "
        f"(7 runs); "
        "another CPU (1 run: vq_features).",
        "1 run trained from a tree with uncommitted changes (bbbbbbbbbbbb+).",
    ]
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path))
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    monkeypatch.setattr(rows, "load", lambda study: frame)
    first_page = pages.write(study)
    assert "(1 run: vq_vs_ibq)" in first_page.read_text()
    assert "span 2 commits" in (first_page.parent / "vq_vs_ibq.html").read_text()
    assert "span" not in re.sub(r"<span|</span", "", (first_page.parent / "double_quant_loss.html").read_text())


@pytest.fixture
def half_failed(trained: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The first ablation with one arm that failed, one that ran out of memory and one that left the finite numbers."""
    study: Study = trained[0]
    shutil.copytree(study.runs_folder, tmp_path / "runs")
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    half = Study("smoke", ("vq_vs_ibq",))
    runs = {cell.arm.name: cell.run for cell in half.cells}
    for arm, event, reason in (
        ("ibq_published", "oom", "out of memory: Tried to allocate 2.00 GiB; lower batch_size or --slots"),
        ("vq_published", "error", "ValueError: broken"),
    ):
        runs[arm].row.unlink()
        append_line(runs[arm].attempts, {"event": event, "time": 0.0, "reason": reason})
    row = runs["vq_fair"].read_row()
    write_json(
        runs["vq_fair"].row,
        {name: row[name] for name in NAN_ROW} | {"status": "nan", "reason": "loss is nan at step 4"},
    )
    return half


NAN_ROW = (
    "run",
    "data_hash",
    "parameters",
    "train_seconds",
    "peak_memory_gib",
    "device",
    "threads",
    "cores",
    "torch",
    "python",
    "commit",
)
LOST = {"ibq_published": "oom", "vq_published": "failed", "vq_fair": "nan"}


def test_lost_runs_appear_as_such_and_never_as_a_number(half_failed: Study) -> None:
    first_page = pages.write(half_failed)
    frame = rows.load(half_failed).set_index("arm")
    assert {arm: frame.loc[arm, "status"] for arm in LOST} == LOST
    text = (first_page.parent / "vq_vs_ibq.html").read_text()
    memory = "out of memory: Tried to allocate 2.00 GiB; lower batch_size or --slots; last logged step 6 of 6"
    assert f"<b>oom</b> ({memory}), 1 run: ibq_published seed 0" in text
    assert "<b>failed</b> (ValueError: broken; last logged step 6 of 6), 1 run: vq_published seed 0" in text
    assert "<b>nan</b> (loss is nan at step 4), 1 run: vq_fair seed 0" in text

    arms = pd.read_csv(first_page.parent / "tables" / "vq_vs_ibq_arms.csv", dtype=str, keep_default_na=False).set_index(
        "arm"
    )
    paper = pd.read_csv(first_page.parent / "tables" / "vq_vs_ibq_paper.csv", dtype=str)
    for arm, state in LOST.items():
        assert set(arms.loc[arm, list(arms)[list(arms).index("seeds") + 1 :]]) == {state}
        assert arms.loc[arm, "seeds"] == "0"
    assert paper.loc[0, "usage %"] == "failed"
    judged = zip(claims.claims_of(half_failed, ABLATION, rows.load(half_failed)), ABLATION.contrasts, strict=True)
    own = [claim for claim, contrast in judged if {contrast.without, contrast.with_} & LOST.keys()]
    assert {(claim.word, claim.change) for claim in own} == {("inconclusive", "")}
    assert {claim.reason for claim in own} == {
        "no result of vq_published seed 0 (failed), ibq_published seed 0 (oom)",
        "no result of vq_published seed 0 (failed)",
        "no result of vq_fair seed 0 (nan)",
    }
    assert not {*LOST} & {arm for pair in effects(ABLATION, rows.load(half_failed))["pair"] for arm in letters(pair)}
    states = {line["arm"]: (line["state"], line["detail"]) for line in rows.status_lines(half_failed)}
    assert states["vq_vs_ibq/ibq_published seed 0"][0] == "oom"
    assert "out of memory" in states["vq_vs_ibq/ibq_published seed 0"][1]


def letters(pair: str) -> list[str]:
    return [arm.name for arm in ABLATION.arms if ABLATION.letter(arm.name) in pair.split("→")]


def test_a_snapshot_is_the_report_without_machine_paths_and_notebook_files(
    first_page: Path, trained: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study: Study = trained[0]
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path / "reports"))
    shutil.copytree(first_page.parent, study.report_folder)
    for name, text in (("x.html", f"in {pages.ROOT}/runs"), ("x.ipynb", "{}"), ("x.stamp", "")):
        (study.report_folder / "notebooks").mkdir(exist_ok=True)
        (study.report_folder / "notebooks" / name).write_text(text)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    published = pages.publish(study, "smoke")
    assert published == tmp_path / "reports" / "published" / "smoke"
    assert (published / "notebooks" / "x.html").read_text() == "in REPOSITORY/runs"
    left_out = {
        path for path in first_page.parent.rglob("*.*") if path.suffix in (".ipynb", ".stamp") or path.name == ".lock"
    }
    for path in first_page.parent.rglob("*.*"):
        assert (published / path.relative_to(first_page.parent)).exists() == (path not in left_out), path
    assert not (published / "notebooks" / "x.ipynb").exists()


def test_a_new_quantizer_needs_a_level_and_an_arm(trained: tuple) -> None:
    """The steps that the README asks for a new quantizer are enough for every table and figure."""
    method = replace(ABLATION.factors[0], levels=(*ABLATION.factors[0].levels, "noisy"))
    arm = Arm("noisy", dict(ABLATION.arm("vq_published").levels) | {"estimator": "noisy"}, focal=True)
    extended = replace(ABLATION, factors=(method, *ABLATION.factors[1:]), arms=(*ABLATION.arms, arm))
    frame = rows.load(trained[0])
    line = frame.iloc[[0]].assign(arm="noisy", **{"factor.estimator": "noisy"})
    frame = pd.concat([frame, line], ignore_index=True)
    for name in extended.tables:
        assert len(tables.build(name, extended, frame)) > 0, name
    for name in ("rate_distortion", "main_effects"):
        figure = figures.draw(name, trained[0], extended, frame)
        assert figure is not None
        figures.plt.close(figure)
    assert "estimator: VQ → noisy" in set(effects(extended, frame)["change"])


def test_findings_name_every_claim_and_missing_runs(trained: tuple) -> None:
    frame = rows.load(trained[0])
    sentences = findings(ABLATION, frame)
    for contrast in ABLATION.contrasts:
        assert any(sentence.startswith(contrast.claim) for sentence in sentences)
    assert not any("supported" in sentence.lower() for sentence in sentences)  # one seed
    frame.loc[0, "status"] = "failed"
    assert findings(ABLATION, frame)[0].startswith("1 of 8 runs have no result (1 failed)")


def test_findings_admit_that_more_codes_can_mean_more_error() -> None:
    lines = []
    for arm in PARTS.arms:
        high = arm.levels["entropy"] == "on"
        lines.append(
            {
                "ablation": PARTS.name,
                "arm": arm.name,
                "seed": 0,
                "status": "ok",
                "bits": 8.0 if high else 2.0,
                "l1": 0.2 if high else 0.1,
            }
        )
    sentences = findings(PARTS, pd.DataFrame(lines))
    assert any(
        s.startswith("More codes in use did not mean a lower error") and "entropy: off → on (+6.00 bits" in s
        for s in sentences
    )


def test_a_hostile_reason_is_escaped(trained: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IBQ_REPORTS", str(tmp_path))
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    study = Study("smoke", ("vq_vs_ibq", "double_quant_loss"))
    frame = rows.load(study)
    frame["reason"] = None
    frame.loc[0, ["status", "reason"]] = ["failed", "<script>alert(1)</script>"]
    monkeypatch.setattr(rows, "load", lambda study: frame)
    texts = [page.read_text() for page in pages_of(pages.write(study))]
    assert not any("<script>" in text for text in texts)
    assert any("&lt;script&gt;" in text for text in texts)


def test_an_ablation_joins_the_report_by_a_run_of_its_own_and_with_what_is_finished(
    trained: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finished = {cell.run.path.name: cell.run.path for cell in trained[0].cells}
    monkeypatch.setenv("IBQ_RUNS", str(tmp_path))
    study = Study("smoke", ("vq_vs_ibq",))
    for cell in study.cells:
        (tmp_path / cell.run.path.name).symlink_to(finished[cell.run.path.name])
    assert [ablation.name for ablation in pages.widened(study).ablations] == [
        "vq_vs_ibq"
    ]  # though others share its runs

    own = next(cell for cell in Study("smoke", ("codebook_size",)).cells if cell.arm.name == "vq_quarter")
    (tmp_path / own.run.path.name).symlink_to(finished[own.run.path.name])
    wider = pages.widened(study)
    assert [ablation.name for ablation in wider.ablations] == ["vq_vs_ibq", "codebook_size"]
    joined = {cell.arm.name for cell in wider.cells if cell.ablation.name == "codebook_size"}
    assert joined == {"vq_quarter", "vq_base", "vq_features_base", "ibq_base"}
    assert set(rows.load(wider)["status"]) == {"ok"}


def test_rows_from_before_a_figures_numbers_were_logged_leave_it_out(
    trained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study("smoke", ("vq_vs_ibq",))
    frame = rows.load(study)
    monkeypatch.setattr(type(study.cells[0].run), "read_history", lambda run: [{"step": 2}])
    assert figures.draw("logits_over_training", study, ABLATION, frame) is None
