"""Picture a sweep's report in a browser: `python docs/make_report_picture.py docs/images/report.png sweep.html`.

It shows the page's answer and its first heat map. Chromium is the system's (`make setup-browser`).
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHOWN = """
    main > section:not(#answer, #part-2), #part-2 > :not(figure:first-of-type), .contents, details, footer
    { display: none }
    .page { padding: 1.5rem } #part-2 { margin-top: 1.5rem }
"""


def main() -> None:
    """Take it."""
    picture, report = map(Path, sys.argv[1:])
    chromium = next(path for path in map(shutil.which, BROWSERS) if path is not None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 880, "height": 600})
        page.goto(report.resolve().as_uri())
        page.add_style_tag(content=SHOWN)
        page.locator(".page").screenshot(path=picture)
        browser.close()
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
