"""The report in headless Chromium, every page in a large and a small window, light and dark: everything loads, every
link leads somewhere, nothing complains, nothing leaves the machine, nothing is cut off."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urldefrag

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Response
from smoke_study import AT_SMOKE

from experiments.study import ROOT

pytestmark = pytest.mark.browser
SNAPSHOTS = sorted((ROOT / "reports" / "published").glob("*/index.html"))
PATIENCE_MS = 600_000
"""Beyond which a page hangs, however loaded the machine is."""
SIZES = [{"width": 1280, "height": 900}, {"width": 390, "height": 844}]
LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => 'broken image: ' + i.src)"
WIDE = "document.documentElement.scrollWidth > innerWidth ? document.documentElement.scrollWidth : 0"
PAPER = "getComputedStyle(document.body).backgroundColor"


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Visit:
    """A walk through all pages of a folder, from its first one along the links."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self.folder, self.problems, self.seen, self.links = (
            folder,
            list[str](),
            dict[str, set[str]](),
            dict[str, list[str]](),
        )
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
        Thread(target=server.serve_forever, daemon=True).start()
        self.origin = f"http://127.0.0.1:{server.server_port}/"
        context = browser.new_context()
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("request", self._request)
        page.on("response", self._response)
        page.on(
            "console",
            lambda m: (
                self._note(f"console: {m.text}") if m.type == "error" and "favicon" not in str(m.location) else None
            ),
        )
        page.on("pageerror", lambda error: self._note(f"error: {error}"))
        waiting = [f"{self.origin}{path.relative_to(folder).as_posix()}" for path in sorted(folder.rglob("*.html"))]
        for address in waiting:
            self._look_at(page, address)
        self._follow(context)
        context.close()
        server.shutdown()
        server.server_close()

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "data:")):
            self._note(f"leaves: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 400 and "favicon" not in response.url:
            self._note(f"{response.status}: {response.url}")

    def _look_at(self, page: Page, address: str) -> None:
        page.goto(address, wait_until="load")
        papers = set()
        for size in SIZES:
            page.set_viewport_size(size)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                if width := page.evaluate(WIDE):
                    self._note(f"{address} is {width} wide in a window of {size['width']}, {scheme}")
                papers.add(page.evaluate(PAPER))
        if len(papers) != 2:
            self._note(f"{address} looks the same in light and dark")
        if page.evaluate("document.body.innerText.length") < 500:
            self._note(f"{address} is empty")
        self.problems += page.evaluate(BROKEN)
        self.seen[address] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        self.links[address] = page.evaluate(LINKS)

    def _follow(self, context: BrowserContext) -> None:
        """Every link leads to a file of the folder, every anchor to an element of its page."""
        answers: dict[str, int] = {}
        for source, links in self.links.items():
            for link in links:
                address, anchor = urldefrag(link)
                if not link.startswith(self.origin):
                    self._note(f"{source} links to {link}")
                elif address not in self.seen and address not in answers:
                    answers[address] = context.request.head(address).status
                if answers.get(address, 200) >= 400:
                    self._note(f"{source} links to {link}, which is not there")
                if anchor and address in self.seen and anchor not in self.seen[address]:
                    self._note(f"{source} links to {link}, which is no element there")


@pytest.mark.usefixtures("executed")
def test_every_page_of_the_smoke_report(browser: Browser, first_page: Path) -> None:
    visit = Visit(browser, first_page.parent)
    assert visit.problems == []
    names = {address.removeprefix(visit.origin) for address in visit.seen}
    assert {"index.html", *(f"{name}.html" for name in AT_SMOKE)} <= names
    assert {f"notebooks/{ablation.notebook}.html" for ablation in AT_SMOKE.values() if ablation.notebook} <= names
    reached = {urldefrag(link)[0] for links in visit.links.values() for link in links}
    assert set(visit.seen) <= reached


@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=lambda path: path.parent.name)
def test_every_page_of_a_published_report(browser: Browser, snapshot: Path) -> None:
    assert Visit(browser, snapshot.parent).problems == []


def test_the_quick_report_is_published() -> None:
    assert "quick" in [path.parent.name for path in SNAPSHOTS]


def test_problems_are_seen(browser: Browser, tmp_path: Path) -> None:
    """Every kind of fault of a page is found."""
    (tmp_path / "index.html").write_text(
        "<!doctype html><h1 id='here'>Faults</h1><img src='absent.png'><a href='#nowhere'>1</a><a "
        "href='absent.html'>2</a>"
        "<a href='https://example.org/'>3</a><div style='width:2000px'>wide</div><script>throw new "
        "Error('thrown')</script>"
        "<img src='http://127.0.0.2:9/foreign.png'>"
    )
    problems = "\n".join(Visit(browser, tmp_path).problems)
    for fault in (
        "404: ",
        "broken image: ",
        "#nowhere, which is no",
        "absent.html, which is not",
        "links to https://example.org/",
    ):
        assert fault in problems
    for fault in (
        "is 2",
        "wide in a window of 1280",
        "error: thrown",
        "leaves: http://127.0.0.2:9",
        "looks the same",
        "is empty",
    ):
        assert fault in problems
