"""The arms of the comparison: equal bits, controls that lack one thing, and what follows from rows about the parts of
IBQ."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from experiments.ablations import ABLATIONS
from experiments.ablations.quantizers import METHODS, anatomy
from experiments.ablations.quantizers.anatomy import ANATOMY
from experiments.analysis import findings
from experiments.report import tables
from experiments.study import Study
from ibq.errors import ConfigError
from ibq.quantizers import Quantizer
from ibq.schema import flatten

ABLATION = ABLATIONS["quantizers"]


def configs() -> dict[str, dict[str, object]]:
    """Flat config of every arm before its search."""
    return {
        cell.arm.name: flatten(cell.config.to_json_dict()) for cell in Study("quick", ("quantizers",), seeds=1).waiting
    }


def test_every_registered_method_is_an_arm_and_every_description_is_used_once() -> None:
    flat = configs()
    assert {config["quantizer.method"] for config in flat.values()} == set(Quantizer.registry)
    assert sorted(arm.levels["method"] for arm in ABLATION.arms) == sorted(METHODS)


def test_all_arms_have_the_same_autoencoder_data_steps_and_bits() -> None:
    shared = [{k: v for k, v in config.items() if not k.startswith("quantizer.")} for config in configs().values()]
    assert all(config == shared[0] for config in shared)
    assert {config["quantizer.codebook_size"] for config in configs().values()} == {1024}
    assert {name: configs()[name]["quantizer.code_dim"] for name in ("vq", "vq_cosine", "lfq", "fsq")} == {
        "vq": 64,
        "vq_cosine": 8,
        "lfq": 10,
        "fsq": 4,
    }


def test_a_control_differs_from_the_released_ibq_in_one_field_and_takes_its_rate() -> None:
    flat = configs()
    for part in ANATOMY.parts:
        if part.removed:
            assert ABLATION.arm(part.removed).tuned_as == ANATOMY.whole
            fields = 2 if part.removed in ("ibq_scaled", "ibq_normalised") else 1  # with the factor on the logits
            assert sum(flat[part.removed][k] != v for k, v in flat["ibq"].items()) == fields, part
        if part.alone:
            assert ABLATION.arm(part.alone).tuned_as == ANATOMY.bare
            shared = flat["vq"].keys() & flat[part.alone].keys()
            assert sum(flat[part.alone][k] != flat["vq"][k] for k in shared) == 1, part


def test_scaled_logits_leave_the_entropies_where_they_were() -> None:
    flat = configs()
    whole, control = flat["ibq"], flat["ibq_scaled"]
    ratios = [config["quantizer.entropy_temperature"] / config["quantizer.logit_scale"] for config in (whole, control)]
    assert control["quantizer.logit_scale"] == flat["ibq"]["quantizer.code_dim"] ** -0.5
    assert ratios[0] == pytest.approx(ratios[1])


def test_the_fair_ibq_and_the_best_vq_differ_in_the_estimator_alone() -> None:
    flat = configs()
    shared = flat["vq_best"].keys() & flat["ibq_fair"].keys()
    assert [k for k in shared if flat["vq_best"][k] != flat["ibq_fair"][k]] == ["quantizer.method"]
    assert flat["ibq_fair"]["quantizer.double"] is False


def test_a_codebook_size_that_some_method_cannot_have_is_refused_for_all() -> None:
    with pytest.raises(ConfigError, match=r"codebook_size=1000 .* power of two"):
        _ = Study("quick", ("quantizers",), overrides={"quantizer.codebook_size": 1000}).cells
    with pytest.raises(ConfigError, match="codebook_size"):
        _ = Study("quick", ("quantizers",), overrides={"quantizer.codebook_size": "many"}).cells


def frame(shares: dict[str, list[float]]) -> pd.DataFrame:
    lines = [
        {
            "ablation": ABLATION.name,
            "arm": arm.name,
            "seed": seed,
            "status": "ok",
            "perplexity_share": share,
            "bits": 10 * share,
            "l1": 0.1,
        }
        for arm in ABLATION.arms
        for seed, share in enumerate(shares.get(arm.name, [0.5]))
    ]
    return pd.DataFrame(lines)


def test_parts_are_judged_by_the_threshold_stated_beforehand() -> None:
    rows = frame(
        {"vq": [0.02], "ibq_single": [0.01], "ibq_no_entropy": [0.1], "vq_entropy": [0.099], "ibq_top_8": [0.05, 0.5]}
    )
    rows.loc[rows["arm"] == "ibq_scaled", "status"] = "nan"
    rows.loc[rows["arm"] == "ibq_uniform", "status"] = "pending"
    judged = {verdict.name: verdict for verdict in anatomy.part_verdicts(rows)}
    assert judged["double term"].necessary is True
    assert judged["double term"].sufficient is None
    assert judged["entropy penalty"].necessary is False
    assert judged["entropy penalty"].sufficient is False
    assert judged["search, logits and gradient of IBQ"].sufficient is True
    assert judged["all codes in the softmax"].necessary is None  # the seeds disagree
    assert judged["logits as large as they are"].necessary is True  # not finite is not alive
    assert judged["initialisation from N(0, 1)"].necessary is None
    sentences = anatomy.sentences(rows)
    assert sentences[0].endswith("With 1 seed all of this is exploratory.")
    (necessary,) = [
        s
        for s in sentences
        if s.startswith("Necessary, since without it ibq collapses (at the learning rate of ibq): ")
    ]
    assert "double term (ibq_single at 1.0%)" in necessary
    assert "logits as large as they are (ibq_scaled, 1 of 1 seeds not finite)" in necessary
    assert any(
        s.startswith("Inconclusive whether necessary (") and "ibq_uniform without a result" in s for s in sentences
    )
    table = tables.build("parts", ABLATION, rows).set_index("part")
    removed, alone = (f"{ABLATION.letter(name)} {name}" for name in ("ibq_no_entropy", "vq_entropy"))
    assert list(table.loc["entropy penalty"]) == [removed, "10.0", "no", alone, "9.9", "no"]


def test_nothing_is_necessary_for_what_has_collapsed_itself_and_nothing_sufficient_where_there_is_no_collapse() -> None:
    verdicts = anatomy.part_verdicts(frame({"ibq": [0.01], "vq": [0.9], "ibq_single": [0.01]}))
    assert {(v.necessary, v.sufficient) for v in verdicts} == {(None, None)}


def test_three_seeds_lift_the_caution() -> None:
    rows = frame({arm.name: [0.5] * 3 if arm.name != "vq" else [0.01] * 3 for arm in ABLATION.arms})
    assert "exploratory" not in anatomy.sentences(rows)[0]


def search_frame(losses: dict[str, list[float]]) -> pd.DataFrame:
    values = (3e-4, 1e-3, 3e-3)
    lines = [
        {
            "ablation": ABLATION.name,
            "arm": f"{arm}: optim.lr {value:g}",
            "seed": 0,
            "status": "pending" if math.isnan(loss) else "nan" if math.isinf(loss) else "ok",
            "search.arm": arm,
            "search.value": value,
            "search.loss": loss,
        }
        for arm, of_arm in losses.items()
        for value, loss in zip(values, of_arm, strict=True)
    ]
    return pd.concat([pd.DataFrame(lines), frame({})], ignore_index=True)


def test_the_search_table_and_what_is_said_of_it() -> None:
    rows = search_frame(
        {"vq": [0.3, 0.2, 0.25], "ibq": [0.3, 0.2, 0.1], "lfq": [0.3, math.inf, 0.4], "fsq": [0.3, math.nan, 0.4]}
    )
    table = tables.build("search", ABLATION, rows).set_index("arm")
    assert dict(table["chosen"]) == {"vq": "0.001", "ibq": "0.003", "lfq": "0.0003", "fsq": "not yet"}
    assert table.loc["lfq", "0.001"] == "nan"
    assert table.loc["fsq", "0.001"] == "pending"
    followers = [arm.name for arm in ABLATION.arms if arm.tuned_as == "vq"]
    assert followers == ["vq_entropy", "vq_normal", "ibq_bare"]
    assert table.loc["vq", "also for"] == ", ".join(map(ABLATION.letter, followers))
    (sentence,) = [s for s in findings.findings(ABLATION, rows) if s.startswith("The search chose")]
    assert sentence.startswith("The search chose 0.0003 for lfq; 0.001 for vq; 0.003 for ibq.")
    assert sentence.endswith("At the edge of the grid, so perhaps not the best there is: ibq, lfq.")


def test_a_search_that_left_the_finite_numbers_and_an_arm_that_waits_lack_no_result() -> None:
    rows = search_frame({"vq": [0.3, 0.2, math.inf], "ibq": [0.3, 0.2, math.nan]})
    rows.loc[(rows["arm"] == "ibq") | (rows["arm"] == "ibq_single"), "status"] = "waiting"
    first, second = findings.findings(ABLATION, rows)[:2]
    assert first.startswith(f"1 of {len(rows) - 3} runs have no result (1 pending)")
    assert second == "2 runs wait for the search of their learning rate."
