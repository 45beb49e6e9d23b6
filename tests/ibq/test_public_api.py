"""What other people build on, and which way imports run."""

from __future__ import annotations

import ast
import importlib
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
        "FSQConfig",
        "FiniteScalarQuantizer",
        "TrainedTransformer",
        "GumbelConfig",
        "GumbelQuantizer",
        "IBQConfig",
        "IndexBackpropQuantizer",
        "LFQConfig",
        "LookupFreeQuantizer",
        "Quantized",
        "SimVQConfig",
        "SimVectorQuantizer",
        "Tokenizer",
        "VQConfig",
        "VectorQuantizer",
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
        "typer",
        "rich",
    }
    assert study.isdisjoint(name.split(".")[0] for _, name in modules_imported_by("ibq"))
