"""A picture of a saved report, taken by a headless Chromium.

    python -m experiments.screenshot REPORT.html PICTURE.png

Needs playwright (extra `dev`) and Debian's chromium.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

from absl import app, flags
from PIL import Image

DARK = flags.DEFINE_bool("dark", False, "In the dark scheme.")
WIDTH = flags.DEFINE_integer("width", 1200, "Of the window in pixels.", 300)
HEIGHT = flags.DEFINE_integer("height", 1600, "Of the window in pixels; 0 for the whole page.", 0)
SECTION = flags.DEFINE_string("section", None, "Begin at this section, e.g. channels.")


def browser(playwright: Any) -> Any:
    """A headless Chromium of the system.

    Raises:
        FileNotFoundError: none is installed.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise FileNotFoundError("No chromium is installed: apt-get install chromium.")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


def main(argv: list[str]) -> None:
    """Open, wait for the charts, and save with a palette, which a picture of text loses nothing by."""
    if len(argv) != 3:
        raise app.UsageError("Pass the report and the picture to write.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        size: Any = {"width": WIDTH.value, "height": HEIGHT.value or 1600}
        page = browser(playwright).new_page(viewport=size, color_scheme="dark" if DARK.value else "light")
        page.goto(Path(argv[1]).resolve().as_uri())
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        if SECTION.value:  # the charts above have their height by now
            page.evaluate("id => document.getElementById(id).scrollIntoView({behavior: 'instant'})", SECTION.value)
        picture = page.screenshot(full_page=HEIGHT.value == 0)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(argv[2], optimize=True)


if __name__ == "__main__":
    app.run(main)
