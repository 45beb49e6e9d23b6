"""The table of quantizers is read from the registry: nothing can be missing from it, and what it shows can be typed."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.cli.base import value_of
from experiments.cli.quantizer_options import options_table
from ibq.quantizers import Quantizer, build_quantizer


def test_every_method_is_listed_with_its_paper_and_every_option() -> None:
    result = CliRunner().invoke(app, ["list", "--quantizers"])
    assert result.exit_code == 0, result.output
    for method, quantizer in Quantizer.registry.items():
        assert re.search(rf"^ *{method} .*{re.escape(quantizer.paper)}", result.output, re.M), method
        assert "arXiv" in quantizer.paper
        for field in quantizer.config_class.model_fields:
            assert field == "method" or f" {field}=" in result.output


@pytest.mark.parametrize(
    ("method", "options", "paper"), options_table(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_defaults_shown_are_what_the_command_line_reads(method: str, options: list[str], paper: str) -> None:
    shown = {
        name: value_of(text) for name, text in (re.match(r"(\w+)=(.*?) \(.*", option).groups() for option in options)
    }
    assert build_quantizer({"method": method} | shown).config == Quantizer.registry[method].config_class()


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("vq", "distance=euclidean (euclidean | cosine) cosine: LlamaGen, arXiv 2406.06525"),
        ("vq", "ema_decay=null (float > 0 < 1 | null) VQ-VAE-2, arXiv 1906.00446"),
        ("ibq", "double=true (true | false)"),
        ("ibq", "logit_scale=1.0 (inverse_sqrt_dim | float > 0)"),
        ("fsq", "levels=[4, 4, 4, 4, 4] ([int, ...])"),
    ],
)
def test_allowed_values_are_in_words(method: str, option: str) -> None:
    assert option in {method: options for method, options, _ in options_table()}[method]
