"""The public API and the direction of imports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ibq

ROOT = Path(ibq.__file__).resolve().parents[1]


def modules_imported_by(package: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path, ("." * node.level) + (node.module or "")


def test_the_public_names_are_frozen() -> None:
    assert set(ibq.__all__) == {
        "BSQConfig",
        "BinarySphericalQuantizer",
        "DiVeQConfig",
        "DiVeQQuantizer",
        "FSQConfig",
        "FiniteScalarQuantizer",
        "TrainedTransformer",
        "GroupedConfig",
        "GroupedQuantizer",
        "GumbelConfig",
        "GumbelQuantizer",
        "IBQConfig",
        "IndexBackpropQuantizer",
        "LFQConfig",
        "LookupFreeQuantizer",
        "Quantized",
        "SimVQConfig",
        "SimVectorQuantizer",
        "NSVQConfig",
        "NonStationaryQuantizer",
        "OptVQConfig",
        "OptimalTransportQuantizer",
        "VQBridgeConfig",
        "VQBridgeQuantizer",
        "SphericalConfig",
        "SphericalQuantizer",
        "Tokenizer",
        "VQConfig",
        "VectorQuantizer",
        "WassersteinConfig",
        "WassersteinQuantizer",
        "build_quantizer",
        "index_backprop",
        "load_transformer",
        "load_released",
        "load_tokenizer",
    }
    assert len(ibq.__all__) == len(set(ibq.__all__))
    for name in ibq.__all__:
        assert callable(getattr(ibq, name)), name


def test_every_module_of_ibq_can_be_imported() -> None:
    for path in (ROOT / "ibq").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert importlib.import_module(name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize(
    ("package", "forbidden"), [("ibq", {"experiments", "notebooks", "tests"}), ("experiments", {"notebooks", "tests"})]
)
def test_imports_run_one_way(package: str, forbidden: set[str]) -> None:
    imported = list(modules_imported_by(package))
    assert any(name.split(".")[0] == "ibq" for _, name in imported), "the walk sees imports"
    assert [(str(path), name) for path, name in imported if name.split(".")[0] in forbidden] == []
    assert [(str(path), name) for path, name in imported if name.startswith(".")] == [], "absolute imports only"


def test_ibq_needs_none_of_the_studys_packages() -> None:
    study = {
        "pandas",
        "matplotlib",
        "seaborn",
        "umap",
        "skimage",
        "sklearn",
        "IPython",
        "papermill",
        "nbconvert",
        "rich",
    }
    assert study.isdisjoint(name.split(".")[0] for _, name in modules_imported_by("ibq"))


CORE = """
import sys
missing = ("torchvision", "lpips", "torch_fidelity", "torchmetrics", "jinja2")
sys.modules |= dict.fromkeys(missing)  # importing them raises ModuleNotFoundError
from ibq import Tokenizer, build_quantizer, index_backprop, load_released, load_tokenizer, load_transformer
import torch
quantizer = build_quantizer({"method": "ibq", "codebook_size": 8, "code_dim": 4})
assert quantizer(torch.randn(1, 4, 2, 2)).indices.shape == (1, 2, 2)
assert index_backprop(torch.randn(3, 4), torch.randn(8, 4))[0].shape == (3, 4)
from ibq.errors import ConfigError, require_packages
try:
    require_packages("lpips")
except ConfigError as error:
    print(error)
"""


def test_the_core_needs_nothing_that_only_metrics_and_pages_need() -> None:
    done = subprocess.run([sys.executable, "-c", CORE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the package lpips is missing; install it with pip install 'ibq-study[metrics]'\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ibq", "Commands"),
        ("ibq sample --help", "--guidance"),
        ("experiments", "Commands"),
        ("experiments list", "paper"),
    ],
)
def test_help_and_list_are_printed_without_torch(command: str, words: str) -> None:
    arguments = [sys.executable, "-X", "importtime", "-m", *command.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert words in done.stdout + done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported
    assert imported.isdisjoint({"torch", "numpy", "pandas", "matplotlib"})
