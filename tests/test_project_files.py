"""The project's own files agree with each other, and imports run one way."""

from __future__ import annotations

import ast
import graphlib
import re
import tomllib
from pathlib import Path

import pytest

from ibq import plugins
from ibq.quantizers import parse_quantizer_config
from ibq.quantizers.contract import RULES, broken

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {
    "ipython": "IPython",
    "jupyter-server": "jupyter_server",
    "pillow": "PIL",
    "torch-fidelity": "torch_fidelity",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "umap-learn": "umap",
}


def requirement_name(requirement: str) -> str:
    return re.split(r"[<>=!~\[ ]", requirement)[0].lower()


def declared() -> set[str]:
    extras = PROJECT["optional-dependencies"]
    packages = [*PROJECT["dependencies"], *extras["metrics"], *extras["study"], *extras["test"]]
    return {requirement_name(r) for r in packages} - {"ibq-study"}


def test_environment_yml_installs_what_pyproject_declares() -> None:
    text = (ROOT / "environment.yml").read_text()
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip().startswith("- ")]
    assert lines == ["conda-forge", "python=3.11", "pip", "pip:", "-c constraints.txt", "-e .[study,test]"]
    installed = set(re.search(r"\.\[(.*)\]", text).group(1).split(","))
    assert "ibq-study[metrics]" in PROJECT["optional-dependencies"]["study"]
    assert installed | {"metrics"} == set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == ">=3.11"
    assert "--constraint constraints.txt --editable '.[study,test]'" in (ROOT / "Makefile").read_text()


def test_constraints_record_every_declared_package() -> None:
    recorded = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert declared() <= recorded


def imported_modules(folder: str) -> dict[str, set[str]]:
    modules: dict[str, set[str]] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                modules.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return modules


def imports_of_modules() -> dict[str, set[str]]:
    """Modules of `ibq` and `experiments` by module: every import, those inside functions included."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ("ibq", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = imports.setdefault(module, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in paths else node.module for name in submodules}
        imports[module] = {name for name in names if name in paths and name != module}
    return imports


def test_imports_run_one_way() -> None:
    assert not imported_modules("ibq").keys() & {"experiments", "notebooks", "pandas", "matplotlib", "papermill"}
    assert not imported_modules("experiments").keys() & {"notebooks", "tests"}


def test_no_import_circle() -> None:
    order = graphlib.TopologicalSorter(imports_of_modules())
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", ["ibq", "experiments"])
def test_few_modules_at_the_root_and_no_long_file(folder: str) -> None:
    roots = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__"}
    assert len(roots) <= 8, sorted(roots)
    lines = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {path: count for path, count in lines.items() if count > 400}


@pytest.mark.parametrize(("folder", "extras"), [("ibq", ["metrics"]), ("experiments", ["metrics", "study"])])
def test_every_import_is_declared(folder: str, extras: list[str]) -> None:
    import sys

    requirements = [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]
    known = {IMPORT_NAMES.get(requirement_name(r), requirement_name(r)) for r in requirements}
    with_torch = {"triton"}  # part of torch's CUDA builds, and looked for before it is used
    foreign = imported_modules(folder).keys() - set(sys.stdlib_module_names) - {"ibq", "experiments", "", *with_torch}
    assert foreign <= known, {name: imported_modules(folder)[name] for name in foreign - known}


def test_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 1
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec", dont_inherit=True), namespace)


@pytest.mark.usefixtures("own_plugins")
def test_the_quantizer_of_the_docs_keeps_the_contract(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your_own_quantizer.md").read_text(), flags=re.S)
    (tmp_path / "noisy.py").write_text(block)
    plugin = plugins.load_file(tmp_path / "noisy.py")
    assert list(plugin.arms) == ["noisy", "noisy_loud"]
    for fields in plugin.arms.values():
        config = parse_quantizer_config({"codebook_size": 64, "code_dim": 6, **fields})
        assert {rule: found for rule in RULES if (found := broken(rule, config))} == {}
