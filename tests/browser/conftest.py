"""A headless Chromium, and pages opened in it that must not complain or ask for anything."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chrome")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
REQUIRED = "WATTRACE_BROWSER_REQUIRED"  # set where a missing browser is a mistake, as in .ci/run


# Not longer than a file's tests: while it is there, a loop runs in this thread, and others cannot run theirs.
@pytest.fixture(scope="module")
def browser():
    """Chromium from the PATH, or the one that WATTRACE_BROWSER names."""
    path = os.environ.get("WATTRACE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        why = f"no Chromium: none of {', '.join(NAMES)} is on the PATH; 'make setup-browser' installs one"
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser) -> Callable:
    """Open a file in a tab of its own, `with opened(path, viewport=PHONE) as page`: quiet to its end, and offline."""

    @contextmanager
    def opened(path: Path, **options) -> Iterator:
        context = browser.new_context(**{"viewport": DESKTOP, "offline": True, **options})
        page = context.new_page()
        said, asked, url = [], [], path.as_uri()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url.split("#")[0]))
        page.goto(url)
        try:
            yield page
            assert said == [], "a console without errors"
            assert set(asked) == {url}, "no request but for the page"
        finally:
            context.close()

    return opened
