"""The report in headless Chromium: everything loads, nothing complains, nothing leaves the machine, nothing is cut off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, sync_playwright

from experiments import notebooks, report
from experiments.ablations import ABLATIONS
from experiments.study import ROOT

pytestmark = pytest.mark.browser
SNAPSHOTS = sorted((ROOT / "reports" / "published").glob("*/index.html"))
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "Chromium is not installed; apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield browser
        browser.close()


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def smoke_report(trained: tuple) -> Path:
    study = trained[0]
    notebooks.execute_changed(study, say=lambda _: None)
    return report.write(study)


def problems(browser: Browser, folder: Path, name: str, width: int, scheme: str) -> list[str]:
    """Everything wrong with a page: failed or foreign requests, console errors, broken images, a page wider than the window."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{server.server_port}"
    found: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("request", lambda r: found.append(f"leaves: {r.url}") if not r.url.startswith((origin, "data:")) else None)
    page.on("response", lambda r: found.append(f"{r.status}: {r.url}") if r.status >= 400 and "favicon" not in r.url else None)
    page.on("console", lambda m: found.append(f"console: {m.text}") if m.type == "error" and "favicon" not in str(m.location) else None)
    page.on("pageerror", lambda e: found.append(f"error: {e}"))
    page.goto(f"{origin}/{name}", wait_until="networkidle")
    found += page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => 'broken image: ' + i.src)")
    found += page.evaluate("document.documentElement.scrollWidth > innerWidth ? ['wider than the window'] : []")
    assert page.evaluate("document.body.innerText.length") > 500
    context.close()
    server.shutdown()
    server.server_close()
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["index.html", *(f"notebooks/{ablation.notebook}.html" for ablation in ABLATIONS.values())])
def test_smoke_report(browser: Browser, smoke_report: Path, name: str, width: int, scheme: str) -> None:
    assert problems(browser, smoke_report.parent, name, width, scheme) == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=lambda path: path.parent.name)
def test_published_report(browser: Browser, snapshot: Path, width: int) -> None:
    for page in sorted(snapshot.parent.rglob("*.html")):
        assert problems(browser, snapshot.parent, str(page.relative_to(snapshot.parent)), width, "light") == []


def test_the_quick_report_is_published() -> None:
    assert "quick" in [path.parent.name for path in SNAPSHOTS]
