"""Plugins: what a file registers, what is refused in a sentence, the ids of runs, and other processes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugin_files import SOURCE, source, write
from training_runs import RUNTIME, assert_same_run

from ibq import build_quantizer, load_tokenizer, plugins
from ibq.config import RESULTS_VERSION, TrainConfig, TransformerTrainConfig
from ibq.errors import ConfigError
from ibq.models.tokenizer import Tokenizer
from ibq.quantizers import Quantizer
from ibq.run_directory import RunDirectory
from ibq.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("own_plugins")
ROOT = Path(plugins.__file__).parents[1]
SHA256 = hashlib.sha256(SOURCE.encode()).hexdigest()


def refusal(*files: Path) -> str:
    """The one sentence on files that cannot be used, after which nothing is registered."""
    before = dict(Quantizer.registry)
    with pytest.raises(ConfigError) as caught:
        plugins.use(files)
    assert Quantizer.registry == before
    assert os.environ[plugins.VARIABLE] == ""
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_registers_its_methods(tmp_path: Path) -> None:
    plugin = plugins.load_file(write(tmp_path))
    assert (plugin.name, plugin.methods, plugin.sha256) == ("mine", ("mine",), SHA256)
    assert plugin.arms == {"mine": {"method": "mine"}}
    assert plugins.plugin_of("mine") is plugin
    assert plugins.plugin_of("vq") is None
    assert plugins.loaded() == (plugin,)
    quantized = build_quantizer({"method": "mine", "codebook_size": 8, "code_dim": 2})(torch.randn(1, 2, 3, 3))
    assert quantized.indices.shape == (1, 3, 3)
    assert plugins.load_file(write(tmp_path, "copy.py")) is plugin, "the same source is the same plugin"


def test_the_environment_names_files_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("mine", "other"):
        write(tmp_path, f"{method}.py", source(method))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, os.pathsep.join(["mine.py", "", "other.py"]))
    assert build_quantizer({"method": "other"}).config.method == "other", "loaded when it is asked for"
    assert os.environ[plugins.VARIABLE] == f"{tmp_path / 'mine.py'}{os.pathsep}{tmp_path / 'other.py'}"
    plugins.use([write(tmp_path, "third.py", source("third")), "mine.py"])
    assert os.environ[plugins.VARIABLE].split(os.pathsep)[2:] == [str(tmp_path / "third.py")]
    assert [plugin.name for plugin in plugins.loaded()] == ["mine", "other", "third"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = (", "cannot be imported: SyntaxError: '(' was never closed (mine.py, line 1); mend it"),
        ("\n\nimport no_such_package", "ModuleNotFoundError in line 3: No module named 'no_such_package'; mend it"),
        ("raise ValueError('one\\n two')", "cannot be imported: ValueError in line 1: one two; mend it"),
        ("", "it registers no quantizer of its own; write class Mine(Quantizer, config=MineConfig)"),
        ("from ibq.quantizers.vq import VectorQuantizer", "it registers no quantizer of its own"),
        (source("vq"), "method 'vq' of ibq_plugin_"),
        (source("vq"), ".MineQuantizer is the name of ibq.quantizers.vq.VectorQuantizer; choose another"),
        (SOURCE.replace('    method: Literal["mine"] = "mine"\n', "    pass\n"), "names no method; write method: "),
        (
            "from ibq import build_quantizer\nbuild_quantizer({'method': 'no'})",
            "method='no' is not a quantizer",
        ),
        (SOURCE + "ARMS = {}", "ARMS is not of the form {'arm': {'field': value}}; write it so or leave it out"),
        (SOURCE + "ARMS = {'mine': 3}", "ARMS is not of the form"),
        (SOURCE + "ARMS = {'': {}}", "ARMS has the arm ''; name it by a text"),
        (SOURCE + "ARMS = {'a': {'method': 'vq'}}", "ARMS['a'] has method='vq'; give it one of mine"),
        (SOURCE + "ARMS = {'a': {'bta': 1}}", "ARMS['a'] has a field 'bta'; did you mean 'beta'?"),
        (SOURCE + source("two").replace("Mine", "Two") + "ARMS = {'a': {}}", "method=None; give it one of mine, two"),
    ],
)
def test_what_is_no_plugin_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, text=text)
    said = refusal(path)
    assert said.startswith(f"the plugin {path} cannot be ")
    assert words in said


def test_files_that_cannot_be_named_or_read_are_one_sentence(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.py") == (
        f"the plugin {tmp_path / 'no.py'} cannot be read (No such file or directory); name a file"
    )
    assert "(Is a directory)" in refusal(tmp_path)
    assert refusal(tmp_path / "a:b.py").endswith("has ':' in its path, which separates paths; move it")


def test_a_name_that_another_plugin_has_is_one_sentence(tmp_path: Path) -> None:
    first = plugins.load_file(write(tmp_path))
    said = refusal(write(tmp_path, "second.py", SOURCE + "# changed\n"))
    assert "second.py cannot be used: method 'mine' of ibq_plugin_" in said
    assert plugins.plugin_of("mine") is first
    assert Quantizer.registry["mine"].__module__ == f"ibq_plugin_{SHA256[:16]}"


def test_arms_are_what_the_file_says(tmp_path: Path) -> None:
    two = SOURCE + source("two").replace("Mine", "Two")
    plugin = plugins.load_file(write(tmp_path, text=two + "ARMS = {'a': {'method': 'two', 'beta': 0.5}}\n"))
    assert plugin.methods == ("mine", "two")
    assert plugin.arms == {"a": {"method": "two", "beta": 0.5}}
    plugin = plugins.load_file(write(tmp_path, "p.py", source("one") + "ARMS = {'slow': {'beta': 0.5}, 'one': {}}\n"))
    assert plugin.arms == {"slow": {"method": "one", "beta": 0.5}, "one": {"method": "one"}}


def install(folder: Path, text: str = SOURCE, module: str = "mine_package") -> None:
    """A package with an entry point, as pip leaves it."""
    write(folder, f"{module}.py", text)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nmine = {module}:MineQuantizer\n")


def test_an_installed_package_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plugins.wanted()
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.wanted()
    quantizer = build_quantizer({"method": "mine"})
    assert type(quantizer).__module__ == "mine_package"
    (plugin,) = plugins.loaded()
    assert (plugin.name, plugin.sha256, plugin.installed) == ("mine", SHA256, True)
    monkeypatch.delitem(sys.modules, "mine_package")


def test_a_package_that_is_imported_first_is_no_circle(tmp_path: Path) -> None:
    build = "from ibq import build_quantizer\nbuild_quantizer({'method': 'vq'})\n"
    install(tmp_path, build + SOURCE + "made = build_quantizer({'method': 'mine', 'code_dim': 2})\n")
    program = (
        "import mine_package\nfrom ibq import plugins\nplugins.load_plugins()\nprint(plugins.plugin_of('mine').name)"
    )
    done = python(program, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.stdout == "mine\n", done.stderr


def test_a_package_that_cannot_be_imported_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "raise RuntimeError('broken')", module="broken_package")
    monkeypatch.syspath_prepend(tmp_path)
    assert build_quantizer({"method": "vq"}).config.method == "vq", "what is built in asks for no plugin"
    with pytest.raises(
        ConfigError, match=r"^the plugin mine of the package broken_package cannot be imported: Runtime"
    ):
        plugins.load_plugins()


# --- Ids and other processes ------------------------------------------------------------------------------------------


def id_without_plugins(config: TrainConfig) -> str:
    tree = {"config": config.to_json_dict(), "data": "data", "results_version": RESULTS_VERSION}
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
    return f"{config.quantizer.method}-s{config.seed}-{digest}"


def test_the_hash_of_the_source_enters_the_ids_of_its_methods_alone(tmp_path: Path) -> None:
    built_in = {
        method: TrainConfig(quantizer=build_quantizer({"method": method}).config) for method in Quantizer.registry
    }
    plugins.load_file(write(tmp_path))
    for config in built_in.values():
        assert config.run_id("data") == id_without_plugins(config)
        assert config.identity() == config.to_json_dict()
    mine = TrainConfig(quantizer=build_quantizer({"method": "mine"}).config)
    assert mine.identity() == mine.to_json_dict() | {"plugin_sha256": SHA256}
    assert mine.run_id("data") != id_without_plugins(mine)
    transformer = TransformerTrainConfig(tokenizer=mine, data=mine.data)
    assert transformer.identity()["tokenizer"]["plugin_sha256"] == SHA256
    assert "plugin_sha256" not in transformer.identity()


def python(program: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", program], input=stdin, env=given, capture_output=True)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_config_takes_its_source_to_other_processes(tmp_path: Path) -> None:
    """Also to one that had started before, and as it was when it was loaded, whatever the file is now."""
    path = write(tmp_path)
    plugins.load_file(path)
    config = TrainConfig(quantizer=build_quantizer({"method": "mine", "beta": 0.5}).config)
    path.write_text("raise RuntimeError")
    done = python("import pickle, sys; print(pickle.load(sys.stdin.buffer).run_id('data'))", pickle.dumps(config))
    assert done.stdout.strip() == config.run_id("data"), done.stderr


# --- Runs -------------------------------------------------------------------------------------------------------------


def forget_plugins() -> None:
    plugins._loaded.clear()
    Quantizer.registry.pop("mine", None)


def test_a_run_keeps_its_source_and_is_refused_without_it(
    tmp_path: Path, tiny: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.load_file(write(tmp_path))
    config = tiny("mine", steps=2)
    runs = [RunDirectory(tmp_path / name) for name in ("run", "again")]
    for run in runs:
        list(train_tokenizer(config, run.path, RUNTIME))
    assert_same_run(*runs)
    row = runs[0].read_row()
    assert row["config.plugin_sha256"] == SHA256
    copy = runs[0].plugin
    assert copy.read_text() == SOURCE
    assert load_tokenizer(runs[0].path).config == config

    forget_plugins()
    remedy = f"--plugin {copy} or IBQ_PLUGINS={copy}"
    without = f"{runs[0].path} has a quantizer of method 'mine', which is not built in; name its plugin by {remedy}"
    for read in (load_tokenizer, lambda path: RunDirectory(path).read_config()):
        with pytest.raises(ConfigError) as caught:
            read(runs[0].path)
        assert str(caught.value) == without

    other = plugins.load_file(write(tmp_path, "other.py", SOURCE + "# changed\n"))
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(runs[0].path)
    assert str(caught.value) == (
        f"{runs[0].path} was trained with another source of method 'mine' (sha256 {SHA256[:8]}) than {other.path} has "
        f"(sha256 {other.sha256[:8]}); name its own, {remedy}"
    )

    forget_plugins()
    monkeypatch.setenv(plugins.VARIABLE, str(copy))
    assert load_tokenizer(runs[0].path).config.identity() == config.to_json_dict() | {"plugin_sha256": SHA256}


def test_a_saved_tokenizer_keeps_its_source_too(tmp_path: Path, tiny: object) -> None:
    plugins.load_file(write(tmp_path))
    Tokenizer(tiny("mine")).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "plugin.py").read_text() == SOURCE
    Tokenizer(tiny("vq")).save(tmp_path / "vq")
    assert not (tmp_path / "vq" / "plugin.py").exists()


def test_a_run_from_before_plugins_were_copied_names_no_copy(tmp_path: Path, tiny: object) -> None:
    plugins.load_file(write(tmp_path))
    Tokenizer(tiny("mine")).save(tmp_path / "saved")
    (tmp_path / "saved" / "plugin.py").unlink()
    assert load_tokenizer(tmp_path / "saved").config.quantizer.method == "mine"
    forget_plugins()
    with pytest.raises(ConfigError, match=r"name its plugin by --plugin FILE or IBQ_PLUGINS=FILE$"):
        load_tokenizer(tmp_path / "saved")


def test_a_plugins_method_that_became_built_in_is_another_source(tmp_path: Path, tiny: object) -> None:
    Tokenizer(tiny("vq")).save(tmp_path)
    (tmp_path / "plugin.py").write_text(SOURCE)
    with pytest.raises(ConfigError, match=r"another source of method 'vq' \(sha256 \w{8}\) than is built in; name its"):
        load_tokenizer(tmp_path)
