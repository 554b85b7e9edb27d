"""The picture of the bench in docs/how-to-explore.md: the object is the mask, attacked beside its control.

Run: python -m benchmarks.screenshot docs/explore.png. It needs Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.explorer import FLAGS, WAIT, explorer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PICTURE = 1  # of the sample photographs


def screenshot(browser: Browser, url: str, width: int = 1280, height: int = 900) -> Image.Image:
    """The bench after an attack on the object, with the control drawn on the clean picture."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.wait_for_selector("#bench[data-ready=yes]")
    thumb = page.locator(".thumb").nth(PICTURE)
    thumb.click()
    page.wait_for_function("n => document.querySelectorAll('.thumb')[n].ariaPressed === 'true'", arg=PICTURE)
    page.check("text=show the control")
    with page.expect_response("**/api/area"):
        page.get_by_label("Mask from", exact=True).select_option("foreground")
    page.locator(".area", has_text="pixels").wait_for()
    page.click("button.primary")
    page.wait_for_selector("section.attack[data-running=no]")
    page.click("button:text-is('Clean')")
    page.mouse.move(5, 5)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.context.close()
    return picture


def main() -> None:
    """Write the picture to the file that is named."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("the bench is drawn by Chromium, which is not installed")
    with explorer() as (url, _), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS.split())
        picture = screenshot(browser, url)
        browser.close()
    # 256 colors keep text sharp, and the file small.
    picture.quantize(256, dither=Image.Dither.NONE).save(Path(sys.argv[1]), optimize=True)


if __name__ == "__main__":
    main()
