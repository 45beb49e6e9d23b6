"""Quantizers of one's own: files (IBQ_PLUGINS, --plugin) and installed packages (entry points) that register a method
without touching this repository.

A plugin is known by the hash of its source, which is part of the id of each of its runs; a run keeps a copy of that
source. Only the one file is hashed, so a plugin should need nothing beside it that changes.
"""

from __future__ import annotations

import copyreg
import hashlib
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibq.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ibq.schema import QuantizerConfig

VARIABLE = "IBQ_PLUGINS"
"""Environment variable that names the files, separated as in PATH."""
GROUP = "ibq.quantizers"
"""Group of the entry points; each names a module, or a class in one."""
ARMS = "ARMS"
"""Name in a plugin for its arms in tables: quantizer fields by the arm's name. Without it each method is an arm."""


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin.

    Attributes:
        name: of the file without its suffix, or of the entry point.
        path: the file.
        source: what was run.
        methods: those that it has registered.
        arms: quantizer fields, `method` among them, by the name of an arm.
        installed: True of an entry point, which every process finds by itself.
    """

    name: str
    path: Path
    source: bytes = field(repr=False)
    methods: tuple[str, ...]
    arms: Mapping[str, Mapping[str, Any]]
    installed: bool = False

    @property
    def sha256(self) -> str:
        """Of the source (hex)."""
        return sha256_of(self.source)

    def __str__(self) -> str:
        return f"{self.path.name} {self.sha256[:8]}"


def sha256_of(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


_loaded: dict[str, Plugin] = {}
"""Plugins of this process by the name of their module, in the order in which they were loaded."""
_loading: set[str] = set()
"""Modules that are being imported as plugins."""


def wanted() -> bool:
    """True if the environment names plugins or has some installed; looks without importing torch."""
    return bool(_named() or entry_points(group=GROUP))


def use(files: Iterable[str | Path]) -> None:
    """Load files, and name them in the environment, so that processes started from here have them too.

    Raises:
        ConfigError: as `load_plugins`, or a path that the environment variable cannot hold.
    """
    paths = [Path(file).expanduser().absolute() for file in files]
    if unfit := [path for path in paths if os.pathsep in str(path)]:
        raise ConfigError(f"the plugin {unfit[0]} has {os.pathsep!r} in its path, which separates paths; move it")
    for path in paths:
        load_file(path)
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys(map(str, [*_named(), *paths])))
    load_plugins()


def load_plugins() -> None:
    """Load what the environment names and what is installed, each once.

    Raises:
        ConfigError: one cannot be loaded, registers no quantizer, or a name is taken; one sentence.
    """
    if _loading:  # a plugin that is being imported asks for a method that is not there
        return
    for path in _named():
        load_file(path)
    for point in entry_points(group=GROUP):
        _load_installed(point)


def loaded() -> tuple[Plugin, ...]:
    """The plugins of this process, by their names."""
    return tuple(sorted(_loaded.values(), key=lambda plugin: plugin.name))


def is_method(name: str) -> bool:
    """True if a method of this name is built in or a plugin's; plugins are loaded only if it is not built in."""
    if name not in _registry():
        load_plugins()
    return name in _registry()


def plugin_of(method: str) -> Plugin | None:
    """The loaded plugin that has registered a method; None where the method is built in."""
    return next((plugin for plugin in _loaded.values() if method in plugin.methods), None)


def load_file(path: str | Path) -> Plugin:
    """Run a file as a module and take what it registers; a source that is loaded already is not run again.

    Raises:
        ConfigError: as `load_plugins`.
    """
    path = Path(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the plugin {path} cannot be read ({os.strerror(error.errno or 0)}); name a file") from None
    return _run(path, source)


def _named() -> list[Path]:
    """Absolute paths in the environment; they are made so there too, since other processes may run elsewhere."""
    paths = [Path(part).expanduser().absolute() for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    if paths:
        os.environ[VARIABLE] = os.pathsep.join(map(str, paths))
    return paths


def _run(path: Path, source: bytes) -> Plugin:
    name = f"ibq_plugin_{sha256_of(source)[:16]}"
    if name in _loaded:
        return _loaded[name]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where classes look for their annotations, and pickle for classes
    with _import_of(name, path):
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        plugin = _registered(path.stem, path, source, module)
    for method in plugin.methods:
        copyreg.pickle(_registry()[method].config_class, _pickled)
    return _loaded.setdefault(name, plugin)


def _load_installed(point: EntryPoint) -> None:
    name = point.module
    if name in _loaded or getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
        return  # the latter where the package's own import has come here
    with _import_of(name, f"{point.name} of the package {point.dist.name if point.dist else name}"):
        point.load()
        path = Path(str(sys.modules[name].__file__))
        _loaded[name] = _registered(point.name, path, path.read_bytes(), sys.modules[name], installed=True)


@contextmanager
def _import_of(module: str, origin: object) -> Iterator[None]:
    """Within it a module is imported; what fails is one sentence, and nothing of it stays registered."""
    _loading.add(module)
    try:
        yield
    except Exception as error:
        sys.modules.pop(module, None)
        for method in _methods_of(module):
            del _registry()[method]
        raise _refusal(origin, error) from None
    finally:
        _loading.remove(module)


def _methods_of(module: str) -> tuple[str, ...]:
    """Methods whose classes are of a module, or of one below it."""
    return tuple(method for method, of in _registry().items() if f"{of.__module__}.".startswith(f"{module}."))


def _registered(name: str, path: Path, source: bytes, module: types.ModuleType, *, installed: bool = False) -> Plugin:
    """The plugin that a module is, by what its classes have registered."""
    methods = _methods_of(module.__name__)
    if not methods:
        raise ConfigError(
            "it registers no quantizer of its own; write class Mine(Quantizer, config=MineConfig), with method: "
            "Literal['mine'] = 'mine' in MineConfig"
        )
    return Plugin(name, path, source, methods, _arms(methods, getattr(module, ARMS, None)), installed)


def _arms(methods: tuple[str, ...], given: Any) -> dict[str, dict[str, Any]]:
    if given is None:
        return {method: {"method": method} for method in methods}
    if not (isinstance(given, Mapping) and all(isinstance(of, Mapping) for of in given.values()) and given):
        raise ConfigError(f"{ARMS} is not of the form {{'arm': {{'field': value}}}}; write it so or leave it out")
    arms = {}
    for name, fields in given.items():
        method = fields.get("method", methods[0] if len(methods) == 1 else None)
        if method not in methods:
            raise ConfigError(f"{ARMS}[{name!r}] has method={method!r}; give it one of {', '.join(methods)}")
        known = _registry()[method].config_class.model_fields
        if unknown := [each for each in fields if each not in known]:
            raise ConfigError(f"{ARMS}[{name!r}] has a field {unknown[0]!r}; {nearest(unknown[0], known)}")
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"{ARMS} has the arm {name!r}; name it by a text")
        arms[name] = {"method": method, **fields}
    return arms


def _registry() -> dict[str, Any]:
    from ibq.quantizers.base import Quantizer  # imports torch, which asking for plugins does without

    return Quantizer.registry


def _refusal(what: object, error: Exception) -> ConfigError:
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        return ConfigError(f"the plugin {what} cannot be used: {text}")
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(what):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" in line {line}" if line else ""
    return ConfigError(f"the plugin {what} cannot be imported: {type(error).__name__}{where}: {text}; mend it")


# --- In other processes -----------------------------------------------------------------------------------------------


def _pickled(config: QuantizerConfig) -> tuple[Any, tuple[Any, ...]]:
    """A config with the source of its class, so that a process that had started before has the class too, and the one
    that this process has, whatever the file has become."""
    plugin = plugin_of(config.method)
    assert plugin is not None
    return _restored, (str(plugin.path), plugin.source, type(config).__name__, config.model_dump())


def _restored(path: str, source: bytes, of: str, fields: dict[str, Any]) -> Any:
    plugin = _run(Path(path), source)
    config_class = _registry()[fields["method"]].config_class
    assert fields["method"] in plugin.methods
    return config_class.model_validate(fields)
