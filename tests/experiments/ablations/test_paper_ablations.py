"""The paper's ablations of size: what their arms differ in, which runs they share, and what a figure of scaling
shows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.ablations import ABLATIONS, CORE
from experiments.cells import unique_runs
from experiments.report import figures, tables
from experiments.runner.plan import expected_cost, plan_table
from experiments.study import Study
from ibq.errors import ConfigError
from ibq.metrics import METRICS
from ibq.schema import flatten

SIZES = {
    "codebook_size": "quantizer.codebook_size",
    "code_dimension": "quantizer.code_dim",
    "model_size": "model.res_blocks",
}


def configs(name: str, preset: str = "quick") -> dict[str, dict[str, object]]:
    """Flat config of every arm at seed 0."""
    return {cell.arm.name: flatten(cell.config.to_json_dict()) for cell in Study(preset, (name,), seeds=1).cells}


@pytest.mark.parametrize(("name", "field"), SIZES.items())
def test_arms_of_a_method_differ_in_size_alone(name: str, field: str) -> None:
    ablation, flat = ABLATIONS[name], configs(name)
    for method in ablation.factors[0].levels:
        mine = [flat[arm.name] for arm in ablation.arms if arm.levels["method"] == method and arm.name in flat]
        assert len({config[field] for config in mine}) == len(mine) > 2
        assert all({**config, field: 0} == {**mine[0], field: 0} for config in mine)


def test_lfq_arms_have_log2_k_dimensions_and_otherwise_the_configs_of_their_levels() -> None:
    flat = configs("lfq_comparison")
    for name in ("lfq_quarter", "lfq_base", "lfq_fourfold", "bsq_base", "ibq_low"):
        assert 2 ** int(str(flat[name]["quantizer.code_dim"])) == flat[name]["quantizer.codebook_size"], name
    assert {name for name in flat["ibq_base"] if flat["ibq_base"][name] != flat["ibq_low"][name]} == {
        "quantizer.code_dim"
    }
    assert {name for name in flat["lfq_base"] if flat["lfq_base"][name] != flat["lfq_no_entropy"][name]} == {
        "quantizer.entropy_weight"
    }
    assert {name for name in flat["lfq_base"] if flat["lfq_base"][name] != flat["lfq_slow"][name]} == {"optim.lr"}


def test_at_gpu_the_sizes_are_those_of_the_paper() -> None:
    sizes = {config["quantizer.codebook_size"] for config in configs("codebook_size", "gpu").values()}
    assert {1024, 16384, 262144} <= sizes
    assert {config["quantizer.code_dim"] for config in configs("codebook_size", "gpu").values()} == {256}
    assert 2**18 in {
        config["quantizer.codebook_size"] for name, config in configs("lfq_comparison", "gpu").items() if "lfq" in name
    }


def test_arms_of_one_config_share_a_run() -> None:
    runs = {
        f"{cell.ablation.name}/{cell.arm.name}": cell.run.path
        for cell in Study("quick", tuple(ABLATIONS), seeds=1).cells
    }
    for one, *others in (
        (
            "vq_vs_ibq/ibq_published",
            "codebook_size/ibq_base",
            "code_dimension/ibq_64",
            "lfq_comparison/ibq_base",
            "model_size/ibq_base",
        ),
        ("vq_vs_ibq/vq_published", "codebook_size/vq_base", "code_dimension/vq_64", "model_size/vq_base"),
        ("vq_vs_ibq/vq_features", "codebook_size/vq_features_base", "model_size/vq_features_base"),
        ("recipe_parts/ibq_no_entropy", "code_dimension/ibq_no_entropy_64", "lfq_comparison/ibq_no_entropy"),
        ("codebook_size/ibq_fourfold", "lfq_comparison/ibq_fourfold"),
        ("double_quant_loss/double_slow", "lfq_comparison/ibq_slow"),
    ):
        assert {runs[other] for other in others} == {runs[one]}


def test_arms_beyond_the_presets_largest_codebook_are_left_out_unless_the_user_wants_them() -> None:
    study = Study("quick", ("codebook_size",))
    assert {cell.config.quantizer.codebook_size for cell in study.cells} == {64, 256, 1024, 4096}
    assert "ibq_sixteenfold" not in set(plan_table(study, ABLATIONS["codebook_size"])["arm"])
    names = ", ".join(f"codebook_size/{method}_sixteenfold" for method in ("vq", "vq_features", "ibq"))
    assert expected_cost(study).endswith(f"; left out, having more than 4,096 codes: {names}")
    assert "left out" not in expected_cost(Study("quick", ("vq_vs_ibq",)))
    larger = Study("quick", ("vq_vs_ibq",), overrides={"quantizer.codebook_size": 16384})
    assert len(unique_runs(larger.cells)) == len(unique_runs(Study("quick", ("vq_vs_ibq",)).cells))


def test_a_k_that_has_no_sixteenth_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"codebook_size=1000 cannot be taken ×1/16 times; choose a multiple of 16"):
        _ = Study("quick", ("codebook_size",), overrides={"quantizer.codebook_size": 1000}).cells


def test_the_core_study_is_the_headline_question() -> None:
    assert CORE == ("vq_vs_ibq",)
    assert {cell.arm.name for cell in Study("quick").cells} == {arm.name for arm in ABLATIONS["vq_vs_ibq"].arms}


def rows_by_size() -> pd.DataFrame:
    """Two seeds of the K ablation; every run of the largest IBQ failed, one of the second largest."""
    lines = []
    for cell in Study("quick", ("codebook_size",), seeds=2).cells:
        K = cell.config.quantizer.codebook_size
        failed = cell.arm.name == "ibq_fourfold" or (cell.arm.name == "ibq_base" and cell.seed == 1)
        line = {"ablation": "codebook_size", "arm": cell.arm.name, "seed": cell.seed, "codebook_size": K}
        numbers = {
            "usage": 1 / K,
            "perplexity_share": 1 / K,
            "l1": 0.1 + cell.seed / 100,
            "fid[fashion-cnn]": 3.0,
            "bits": 5.0,
        }
        lines.append(line | ({"status": "nan"} if failed else {"status": "ok", **numbers}))
    return pd.DataFrame(lines)


def test_a_figure_of_scaling_has_a_point_a_run_and_a_cross_where_there_is_none() -> None:
    ablation, rows = ABLATIONS["codebook_size"], rows_by_size()
    figure = figures.draw("scaling", Study("quick", ("codebook_size",)), ablation, rows)
    assert figure is not None
    for axis in figure.axes:
        points = np.concatenate([scatter.get_offsets() for scatter in axis.collections[::2]])
        crosses = np.concatenate([scatter.get_offsets() for scatter in axis.collections[1::2]])
        assert len(points) == (rows["status"] == "ok").sum()
        assert len(crosses) == 2  # two seeds of one arm
        assert np.allclose(crosses[:, 0], 4096, rtol=0.1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*ablation.factors[0].levels, "no result"]
    figures.plt.close(figure)


def test_failed_arms_have_their_state_in_the_table_and_no_number() -> None:
    ablation, rows = ABLATIONS["codebook_size"], rows_by_size()
    for column in (
        "bits",
        "psnr_db",
        "ssim",
        "quantization_error",
        "gap",
        "perplexity",
        "train_seconds",
        "config.steps",
    ):
        rows[column] = np.where(rows["status"] == "ok", 1.0, np.nan)
    table = tables.build("arms", ablation, rows).set_index("arm")
    assert set(table.loc["ibq_fourfold"][[METRICS[name].heading for name in ablation.columns]]) == {"nan"}
    assert table.loc["ibq_base", "seeds"] == "1 of 2 (nan)"
    paper = tables.build("paper", ablation, rows).set_index("paper")
    assert paper.loc["IBQ, K = 262,144", "usage %"] == "nan"
