"""The page of reconstructions in headless Chromium: large and small window, light and dark; nothing is cut off, broken
or fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from ibq import Tokenizer
from ibq.cli import reconstruct
from ibq.cli.app import app

pytestmark = pytest.mark.browser
SIZES = [{"width": 1280, "height": 900}, {"width": 390, "height": 844}, {"width": 320, "height": 600}]
NAMES = ["two\nlines.png", "<script>throw 1.png", "\"q\" 'r' & #1 100%?.png", "n" * 180 + ".png", "ü/wide.png"]


@pytest.fixture(scope="module")
def page_file(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    Tokenizer(tiny(**{"data.name": "photos"})).save(folder / "model")
    for number, name in enumerate(NAMES):
        path = folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (32, 256 if "wide" in name else 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    (folder / "pictures" / "broken.png").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "PICTURES_A_PAGE", 3)
        paths = [str(folder / name) for name in ("model", "pictures", "out")]
        assert not app(["reconstruct", *paths], standalone_mode=False)
    return folder / "out" / "index.html"


def test_the_page_in_a_browser(page_file: Path, browser: Browser) -> None:
    problems: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    page.on(
        "request",
        lambda r: (
            None if r.url.startswith((page_file.parent.as_uri(), "data:")) else problems.append(f"leaves: {r.url}")
        ),
    )
    for name, pictures in (("index.html", 3), ("index-2.html", 2)):
        page.goto((page_file.parent / name).as_uri())
        papers = set()
        for size in SIZES:
            page.set_viewport_size(size)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(papers) == 2
        page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.evaluate("document.images.length") == 3 * pictures
        links = page.evaluate("[...document.querySelectorAll('a[href]')].map(link => link.href)")
        assert all(link.startswith(page_file.parent.as_uri()) for link in links)
    page.close()
    assert problems == []
