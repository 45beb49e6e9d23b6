"""One core, one seed, one small tokenizer for all tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from ibq import plugins
from ibq.config import TrainConfig
from ibq.quantizers import Quantizer

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before ibq.ops.triton_kernels is imported
torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=30)
settings.load_profile("repeatable")

MakeConfig = Callable[..., TrainConfig]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers: one trains the smoke study and runs all tests that read it; meanwhile the other runs the rest,
    module by module."""
    for item in items:
        if "two_processes" in item.fixturenames:
            item.add_marker(pytest.mark.processes)
    items.sort(key=lambda item: "trained" not in item.fixturenames)
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            group = "trained" if "trained" in item.fixturenames else item.path.stem
            # what the mark does; pytest-xdist 3.8 writes it where pytest 9.2 does not read it
            if hasattr(type(getattr(item, "_id", None)), "parse"):
                item._id = type(item._id).parse(f"{item.nodeid}@{group}")
            else:
                item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test loads as plugins is forgotten after it."""
    monkeypatch.setattr(Quantizer, "registry", dict(Quantizer.registry))
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setenv(plugins.VARIABLE, "")


@pytest.fixture(scope="session")
def tiny() -> MakeConfig:
    """Makes the smallest config that still has every part; takes a method and changes by dotted path."""

    def make(method: str = "ibq", **dotted: Any) -> TrainConfig:
        model = {
            "base_channels": 4,
            "channel_multipliers": (1, 2, 2),
            "res_blocks": 1,
            "z_channels": 8,
            "norm_groups": 4,
        }
        quantizer = {"method": method, "codebook_size": 16, "code_dim": 8}
        config = TrainConfig.parse({"model": model, "quantizer": quantizer, "steps": 8, "batch_size": 4})
        return config.with_fields(**dotted)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, which asks nothing of any network by itself."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "Chromium is not installed; apt-get install chromium"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=[*quiet, "--disable-sync"])
        yield started
        started.close()
