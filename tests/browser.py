"""A page in a headless browser, for tests marked ``browser``."""

import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

# Root has no sandbox; the others keep the browser from asking for anything that the page does not.
FLAGS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture
def page() -> Iterator:
    """An empty page. Fails the test on a console error, an uncaught exception, or a request to elsewhere."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.fail("browser tests: expected chromium on PATH, got none")
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        opened = browser.new_page(viewport={"width": 1100, "height": 1000})
        opened.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("request", lambda request: complaints.extend(outside(request.url)))
        yield opened
        browser.close()
    assert complaints == []


def outside(url: str) -> list[str]:
    """The URL, if it leads away from this machine."""
    parts = urlsplit(url)
    return [] if parts.scheme in ("data", "blob", "file", "about") or parts.hostname == "127.0.0.1" else [url]
