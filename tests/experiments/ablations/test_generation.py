"""The ablation of transformers: what its arms differ in, and what tables, claims and findings make of rows that are
known."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pandas as pd
import pytest
from transformer_rows import ABLATION, GUIDANCES, QUALITY, arms, known, study

from experiments import rows
from experiments.ablations import ABLATIONS
from experiments.ablations.changes import Given
from experiments.analysis import claims
from experiments.analysis.findings import findings
from experiments.cells import unique_runs
from experiments.recipes import get_preset
from experiments.report import continuation, notebooks, pages, provenance, tables
from experiments.report.configs import active_fields
from experiments.runner.plan import command
from experiments.runner.runs import evaluation_file
from experiments.study import Study
from ibq.config import TrainConfig, TransformerTrainConfig
from ibq.metrics import METRICS
from ibq.run_directory import write_json

FID = "fid[fashion-cnn]"
pytestmark = pytest.mark.usefixtures("own_folders")


def configs(preset: str, **overrides: object) -> dict[str, TransformerTrainConfig]:
    return {cell.arm.name: cell.config for cell in arms(Study(preset, (ABLATION.name,), overrides=overrides))}  # type: ignore[misc]


# --- What is compared -------------------------------------------------------------------------------------------------


def changed(one: TransformerTrainConfig, other: TransformerTrainConfig) -> set[str]:
    fields = [active_fields(config) for config in (one, other)]
    return {name for name in {*fields[0], *fields[1]} if fields[0].get(name) != fields[1].get(name)}


@pytest.mark.parametrize("preset", ["smoke", "quick", "gpu"])
def test_arms_have_the_same_k_and_differ_in_what_they_are_named_for(preset: str) -> None:
    of = configs(preset)
    assert len({config.quantizer.codebook_size for config in of.values()}) == 1
    for one, other, field in (
        ("lfq_tokens", "lfq_halves", "model.subtoken_bits"),
        ("ibq_tokens", "ibq_shallow", "model.depth"),
        ("ibq_tokens", "ibq_deep", "model.depth"),
    ):
        assert changed(of[one], of[other]) == {field}
    for name in ("vq_tokens", "vq_features_tokens", "lfq_tokens"):
        assert all(field.startswith("tokenizer.quantizer.") for field in changed(of["ibq_tokens"], of[name])), name


def test_tokenizers_are_those_of_notebooks_01_and_05_trained_three_times_as_long() -> None:
    published = {
        f"{cell.ablation.name}/{cell.arm.name}": cell.config
        for cell in Study("quick", ("vq_vs_ibq", "lfq_comparison"), seeds=1).cells
    }
    for name, reference in (
        ("vq_tokens", "vq_vs_ibq/vq_published"),
        ("vq_features_tokens", "vq_vs_ibq/vq_features"),
        ("ibq_tokens", "vq_vs_ibq/ibq_published"),
        ("lfq_tokens", "lfq_comparison/lfq_base"),
    ):
        config, tokenizer = published[reference], configs("quick")[name].tokenizer
        assert isinstance(config, TrainConfig)
        assert tokenizer.quantizer == config.quantizer
        assert tokenizer.steps == 3 * config.steps == 900
    cells = study().cells
    assert len(unique_runs(cells)) == len(unique_runs(cell for cell in cells if cell.seed == 0)) == 4


@pytest.mark.parametrize(("preset", "times"), [("smoke", 3), ("quick", 3), ("gpu", 1), ("paper", 1)])
def test_the_preset_says_how_much_longer_its_tokenizers_train(
    preset: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.study._data_hash", lambda data: "0" * 64)  # of ImageNet, which is not here
    steps = {config.tokenizer.steps for config in configs(preset).values()}
    assert steps == {times * get_preset(preset).fields["steps"]}


@pytest.mark.parametrize(("depth", "depths"), [(1, (1, 1, 2)), (2, (1, 2, 3)), (3, (2, 3, 5)), (12, (6, 12, 18))])
def test_depths_are_multiples_of_the_presets_and_at_least_one(depth: int, depths: tuple[int, ...]) -> None:
    base = configs("quick")["ibq_tokens"].with_fields(**{"model.depth": depth})
    changes = [ABLATION.arm(name).transformer or {} for name in ("ibq_shallow", "ibq_tokens", "ibq_deep")]
    given = Given(get_preset("quick"), 1024, base)
    assert tuple(change["model.depth"](given) for change in changes) == depths


@pytest.mark.parametrize(("preset", "bits"), [("smoke", (2, 3)), ("quick", (5, 5)), ("gpu", (7, 7))])
def test_halves_are_halves_of_the_bits(preset: str, bits: tuple[int, int]) -> None:
    of = configs(preset)
    assert of["lfq_halves"].model.subtoken_bits == bits
    assert all(config.model.subtoken_bits == () for name, config in of.items() if name != "lfq_halves")
    assert of["lfq_halves"].quantizer.codebook_size == 2 ** sum(bits)


# --- Claims and tables ------------------------------------------------------------------------------------------------


def test_claims_are_judged_by_the_rows_and_say_their_scale() -> None:
    of = known(seeds=3)
    judged = {claim.sentence: claim for claim in claims.claims_of(of, ABLATION, rows.load(of))}
    of_contrast = {contrast.name: judged[contrast.claim] for contrast in ABLATION.contrasts}
    assert {claim.word for claim in judged.values()} == {"supported"}
    assert of_contrast["IBQ against LFQ"].change == "-0.907 (-0.907 to -0.907)"  # log2(8 / 15) in every seed
    assert of_contrast["collapse: bits"].change == "+1.766 (+1.766 to +1.766)"
    assert of_contrast["factorized: likelihood"].claimed == "Δ log2 bits per image < +0.07"
    scale = "quick: fashion-mnist 32×32, K = 1,024, D = 64, tokenizers of 900 steps, depth 1 and 3, 700 steps"
    assert of_contrast["scaling: quality"].scale == scale
    assert "D = 10 and 64, tokenizers of 900 steps, depth 2," in of_contrast["IBQ against LFQ"].scale


def test_three_claims_are_the_papers() -> None:
    assert [contrast.paper[:7] for contrast in ABLATION.contrasts if contrast.paper] == [
        "Table 5",
        "Table 7",
        "Table 7",
    ]


def test_a_lost_arm_leaves_its_claims_inconclusive_and_shows_its_state() -> None:
    frame = rows.load(known(lost=("lfq_tokens",), pending=("ibq_deep",)))
    table = tables.build("arms", ABLATION, frame).set_index("arm")
    columns = [METRICS[name].heading for name in ABLATION.columns if not METRICS[name].optional]
    assert set(table.loc["lfq_tokens", columns]) == {"nan"}
    assert set(table.loc["ibq_deep", columns]) == {"waiting"}
    values = {
        "blocks": "2",
        "bits per image": "340",
        "guidance": "2.0",
        "FID[fashion-cnn]": "8.00",
        "precision[fashion-cnn]": "0.700",
    }
    assert dict(table.loc["ibq_tokens", list(values)]) == values
    assert table.loc["ibq_tokens", "tokenizer's L1"] == "0.0950"
    verdicts = tables.build("verdicts", ABLATION, frame)["verdict"]
    assert verdicts[0] == "inconclusive: no result of lfq_tokens seed 0 (nan)"
    assert (verdicts == "inconclusive: no finished pair: ibq_deep seed 0 waiting").sum() == 2


def test_fid_has_a_column_where_inceptions_weights_were() -> None:
    of = known()
    assert "FID (Inception)" not in tables.build("arms", ABLATION, rows.load(of))
    cell = next(cell for cell in arms(of) if cell.arm.name == "ibq_tokens")
    write_json(evaluation_file(cell, "inception"), {"fid": 20.125, "fid@2": 20.125, "guidance@fid": 2.0})
    table = tables.build("arms", ABLATION, rows.load(of)).set_index("arm")
    assert table.loc[["ibq_tokens", "lfq_tokens"], "FID (Inception)"].tolist() == ["20.12", "not measured"]


def test_the_papers_table_has_table_7_and_says_what_is_not_reported() -> None:
    table = tables.build("paper", ABLATION, rows.load(known())).set_index("paper")
    reported = table[table["gFID (paper)"] != "not reported"]
    assert dict(zip(reported["gFID (paper)"], reported["IS (paper)"], strict=True)) == {
        "2.88": "254.73",
        "2.45": "267.48",
        "2.14": "278.99",
        "2.05": "286.73",
        "3.08": "258.26",
        "2.51": "271.70",
        "2.33": "271.77",
    }
    assert {"DiT", "LlamaGen", "VAR", "MAR"} < set(table.index[table["IS (paper)"] == "not reported"])
    assert table.loc["IBQ XXL, 2.1B", FID.replace("fid", "FID")] == "6.00"
    assert table.loc["DiT", "closest arm"] == "none"


def test_the_protocol_says_how_samples_were_drawn_and_chosen() -> None:
    said = provenance.protocol(ABLATION, rows.load(known(seeds=2)))
    assert said.count("Protocol") == 1
    assert (
        "1,000 samples at each guidance (1, 2, 3), against the same images; temperature 1, no truncation, the run's "
        "seed." in said
    )
    assert "chosen on these very samples" in said


# --- Findings ---------------------------------------------------------------------------------------------------------


def test_findings_say_where_guidance_is_best_and_what_bits_do_not_say() -> None:
    of = known(seeds=2)
    said = " ".join(findings(ABLATION, rows.load(of)))
    assert (
        f"FID[fashion-cnn] is lowest at guidance 2 for {', '.join(QUALITY)}; it was chosen on the very samples" in said
    )
    assert "The lowest of all is 6.00, of ibq_deep." in said
    assert "Bits alone compare nothing: vq_tokens has the fewest an image (100, behind a tokenizer of L1 0.200)" in said
    assert (
        "From ibq_shallow to ibq_deep parameters go from 0.25 to 2.25 million, bits per image from 350.0 to 325.0"
        in said
    )
    assert "the largest that was tried" not in said


def test_findings_flag_a_best_guidance_that_is_the_largest() -> None:
    said = " ".join(findings(ABLATION, rows.load(known(best=GUIDANCES[-1], pending=("vq_tokens",)))))
    assert "At the largest that was tried, so perhaps not the best: vq_features_tokens, " in said
    assert "Here the fewest bits per image (325) and the lowest FID[fashion-cnn] are of one arm, ibq_deep." in said
    assert "1 transformer waits for its tokenizer." in said


def test_nothing_trained_no_findings_of_transformers() -> None:
    assert not [sentence for sentence in findings(ABLATION, rows.load(study())) if "guidance" in sentence]


# --- The other half of the comparison with LFQ ------------------------------------------------------------------------

LFQ = ABLATIONS["lfq_comparison"]


def test_a_field_of_transformers_is_left_out_where_an_ablation_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"transformer.steps": 500, "optim.lr": 1e-3}
    of = Study("quick", ("vq_vs_ibq", LFQ.name, ABLATION.name), overrides=fields)
    given = {}
    monkeypatch.setattr(
        notebooks, "execute", lambda source, target, study, parameters: given.update({source.stem: parameters})
    )
    monkeypatch.setattr(notebooks, "as_page", lambda notebook: "")
    notebooks.execute_changed(of, lambda _: None)
    overrides = {name: parameters["overrides"] for name, parameters in given.items() if parameters}
    assert overrides == {"01_vq_vs_ibq": {"optim.lr": 1e-3}, "05_lfq_comparison": fields, "08_generation": fields}
    for ablation in of.ablations:
        assert Study("quick", (ablation.name,), overrides=of.overrides_of(ablation)).cells
        words = shlex.split(command(of, ablation.name))
        assert ("transformer.steps=500" in words) == (ablation.name != "vq_vs_ibq")
    assert "transformer.steps=500" in command(of, "vq_vs_ibq", ABLATION.name)


def test_names_of_the_other_half_name_something() -> None:
    for ablation in ABLATIONS.values():
        named = [claim.partition("/")[0] for claim in ablation.shows_too]
        assert len(set(named)) <= 1
        for name in named:
            assert set(ablation.shows_too) <= {f"{name}/{contrast.name}" for contrast in ABLATIONS[name].contrasts}


@pytest.mark.parametrize("seen_from", [lambda study: study, pages.widened], ids=["study", "report"])
def test_where_the_other_half_is_not_trained_its_command_is_said(seen_from: Callable[[Study], Study]) -> None:
    other = continuation.other_half(seen_from(Study("quick", (LFQ.name,), seeds=2)), LFQ)
    assert other is not None
    assert not other.has_result
    assert (
        other.note
        == "Generation is trained by the ablation generation: python -m experiments run generation --preset quick "
        "--seeds 2"
    )


def test_where_it_is_trained_its_arms_and_claims_are_shown_on_the_page() -> None:
    known()
    of = Study("quick", (LFQ.name,))
    other = continuation.other_half(of, LFQ)
    assert other is not None
    assert other.note == ""
    assert list(other.arms_table()["arm"]) == ["lfq_halves", "ibq_tokens", "lfq_tokens"]
    page = (pages.write(of).parent / f"{LFQ.name}.html").read_text()
    assert re.search(
        r'<h2 id="continued">Generation</h2>.*?inconclusive.*?one seed.*?Table 5, K = 16,384: IBQ better in generation',
        page,
        re.DOTALL,
    )
    assert "<td>lfq_halves</td>" in page
    table = pd.read_csv(of.report_folder / "tables" / "lfq_comparison_generation.csv")
    assert list(table["FID[fashion-cnn]"]) == [12.0, 8.0, 15.0]


def test_a_field_that_the_other_half_cannot_have_is_said() -> None:
    of = Study("quick", (LFQ.name,), overrides={"quantizer.beta": 0.5})
    other = continuation.other_half(of, LFQ)
    assert other is not None
    assert other.note.startswith("Generation: none, since ")


def test_notebook_05_is_executed_again_once_the_other_half_is_trained() -> None:
    of = Study("quick", (LFQ.name,))
    before = notebooks._data(of, rows.load(of), LFQ)
    assert before == notebooks._data(of, rows.load(of), LFQ)
    known()
    assert before != notebooks._data(of, rows.load(of), LFQ)


def test_an_ablation_without_another_half_has_none() -> None:
    assert continuation.other_half(study(), ABLATION) is None
