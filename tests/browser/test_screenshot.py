"""The picture of the bench in README and docs is what the program shows today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.explorer import explorer
from benchmarks.screenshot import screenshot

pytestmark = [pytest.mark.browser, pytest.mark.slow]

DOCS = Path(__file__).parents[2] / "docs"


def tiles(picture: Image.Image) -> NDArray[np.float64]:
    """Mean colors (45, 64, 3) of tiles of 20 pixels: fonts of other machines hardly change them."""
    small = picture.convert("RGB").resize((64, 45), Image.Resampling.BOX)
    return np.asarray(small, np.float64)


def test_the_screenshot_of_the_docs_is_that_of_today(browser: Any) -> None:
    with explorer() as (url, _):
        made = screenshot(browser, url)
    with Image.open(DOCS / "explore.png") as kept:
        assert kept.size == made.size
        differs = np.abs(tiles(kept) - tiles(made)).max(2) > 48
    assert differs.mean() < 0.05, "make it again: python -m benchmarks.screenshot docs/explore.png"
