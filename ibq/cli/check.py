"""ibq check: a quantizer tried by every rule of the contract, what breaks it in words, and what a step costs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ibq import plugins
from ibq.cli.settings import changes
from ibq.errors import ConfigError, nearest
from ibq.quantizers import Quantizer, QuantizerConfig, build_quantizer
from ibq.quantizers.contract import RULES, broken, demand
from ibq.quantizers.contract.cost import TOKENS, costs
from ibq.quantizers.contract.outputs import reach
from ibq.quantizers.contract.processes import DEMAND, two_processes
from ibq.quantizers.contract.state import is_random
from ibq.quantizers.contract.trial import seeded

SMALL, LARGE = {"codebook_size": 64, "code_dim": 6}, {"codebook_size": 1024, "code_dim": 64}
"""Sizes that rules are tried at, and that a step is measured at, where a method and the user have no others."""
WIDTH, NAMES = 118, 18


class Subject(NamedTuple):
    """A quantizer to be tried: its name for people, its method, and the fields that differ from the defaults."""

    name: str
    method: str
    fields: Mapping[str, Any]

    def config(self, sizes: Mapping[str, int]) -> QuantizerConfig:
        """Its config at some sizes, unless it has its own.

        Raises:
            ConfigError: the config refuses them.
        """
        implied = Quantizer.registry[self.method].config_class.sizes(sizes["codebook_size"])
        fields = {"method": self.method, **sizes, **implied, **self.fields}
        try:
            return build_quantizer(fields).config
        except ConfigError as error:
            K, D = fields["codebook_size"], fields["code_dim"]
            raise ConfigError(
                f"{self.name} cannot be tried at codebook_size={K}, code_dim={D}: {error}; give what it needs by --set "
                f"field=value"
            ) from None


def check(given: Sequence[str], set_: list[str] | None) -> bool:
    """Print what each quantizer keeps and breaks; True if none breaks a rule.

    Args:
        given: files of plugins and names of methods.
        set_: "field=value" of all their configs.

    Raises:
        ConfigError: a file that is no plugin, a method that does not exist, or a config that contradicts itself.
    """
    fields = changes(set_)
    subjects = [subject for name in given for subject in _subjects(name, fields)]
    kept = [_keeps_all(subject, subject.config(SMALL)) for subject in subjects]
    return all(kept)


def _subjects(name: str, fields: Mapping[str, Any]) -> list[Subject]:
    if Path(name).suffix == ".py" or Path(name).is_file():
        plugins.use([name])
        plugin = plugins.load_file(Path(name).absolute())
        arms = dict(plugin.arms)
        shown = {arm["method"] for arm in arms.values()}
        arms |= {method: {"method": method} for method in plugin.methods if method not in shown}
        return [Subject(f"{arm} of {plugin}", of["method"], {**of, **fields}) for arm, of in arms.items()]
    if not plugins.is_method(name):
        raise ConfigError(f"{name!r} is neither a file nor a method; {nearest(name, Quantizer.registry)}")
    return [Subject(name, name, fields)]


def _keeps_all(subject: Subject, config: QuantizerConfig) -> bool:
    print(f"{subject.name}: K = {config.codebook_size:,}, D = {config.code_dim}", flush=True)
    failures = [_report(rule, demand(rule), broken(rule, config)) for rule in RULES]
    failures.append(_report("two processes", DEMAND, two_processes([config])[0]))
    for fact in _facts(subject, config):
        _print(fact, 2)
    count = sum(failures)
    print(
        f"  breaks {count} of {len(failures)} rules\n" if count else f"  keeps all {len(failures)} rules\n", flush=True
    )
    return not count


def _report(rule: str, demands: str, sentences: Sequence[str]) -> bool:
    """True if the rule is broken."""
    _print(f"{'BROKEN' if sentences else 'kept':<7} {rule:<{NAMES}}  {demands}", 2, NAMES + 12)
    for sentence in sentences:
        _print(sentence, NAMES + 12)
    return bool(sentences)


def _facts(subject: Subject, config: QuantizerConfig) -> Iterator[str]:
    """What is worth knowing and breaks no rule."""
    try:
        with seeded(0):
            yield reach(config)
            if is_random(config):
                yield "training draws random numbers, so that two processes hold the same, but not what one trains"
        large = subject.config(LARGE)
        vq = build_quantizer({"method": "vq", "codebook_size": large.codebook_size, "code_dim": large.code_dim}).config
        own, of_vq = costs(large, vq)
    except Exception as error:  # a broken rule has said more
        yield f"a step is not measured: {type(error).__name__}: {' '.join(str(error).split())}"
        return
    yield (
        f"a step of {TOKENS:,} tokens at K = {large.codebook_size:,}, D = {large.code_dim} on the CPU takes "
        f"{1e3 * own.seconds:.1f} ms, {own.seconds / of_vq.seconds:.1f} times vq's, and at most "
        f"{own.peak_bytes / 2**20:.1f} MiB, {own.peak_bytes / of_vq.peak_bytes:.1f} times vq's"
    )


def _print(text: str, first: int, further: int | None = None) -> None:
    further = first if further is None else further
    print(textwrap.fill(text, WIDTH, initial_indent=" " * first, subsequent_indent=" " * further), flush=True)
