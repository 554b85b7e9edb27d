"""The probe beside the cursor, and its heat map, in a real browser, against the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.browser.explorer_page import (
    CORNER,
    NAMES,
    SIZE,
    BenchPage,
    box_mask,
    corner_images,
    expect,
    first_number,
    logits_of,
    to_pixels,
)

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def shown_logits(bench: BenchPage) -> dict[str, float]:
    rows = bench.page.locator(".tip tbody tr").all()
    return {
        row.locator("th").inner_text(): first_number(row.locator("td").first.inner_text()) for row in rows
    }


def check_probe(bench: BenchPage, top: int, left: int, side: int, color: tuple[int, int, int]) -> None:
    """The tip equals a forward pass of the edited image, to its two decimals."""
    image = corner_images()[0].clone()
    image[:, top : top + side, left : left + side] = torch.tensor(color)[:, None, None] / 255
    logits = logits_of(image)
    shown = shown_logits(bench)
    assert set(shown) == set(NAMES)
    slack = 0.0051 + 1e-4 * float(logits.max() - logits.min())
    for name, value in shown.items():
        assert abs(value - float(logits[NAMES.index(name)])) <= slack


def test_logits_beside_the_cursor_are_the_models(bench: BenchPage) -> None:
    bench.point(5, 7)
    expect(bench.page.locator(".tip strong")).to_have_text("Row 7, column 5")
    check_probe(bench, 7, 5, 1, (0, 0, 0))
    bench.page.select_option("label:has-text('Change') select", "9")
    bench.page.fill("input[aria-label='Color of the probe']", "#ff2000")
    bench.point(8, 12)
    expect(bench.page.locator(".tip strong")).to_have_text("Row 12, column 8, 9 \u00d7 9 pixels")
    check_probe(bench, 8, 4, 9, (255, 32, 0))
    box, tip = bench.canvas.bounding_box(), bench.page.locator(".tip").bounding_box()
    assert tip["x"] >= box["x"]
    assert tip["x"] + tip["width"] <= box["x"] + box["width"] + 1


def test_the_probe_follows_the_arrow_keys(bench: BenchPage) -> None:
    bench.canvas.focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowLeft"):
        bench.page.keyboard.press(key)
    expect(bench.page.locator(".tip strong")).to_have_text("Row 19, column 14")
    check_probe(bench, 19, 14, 1, (0, 0, 0))


def test_the_mask_is_probed_in_one_color(bench: BenchPage) -> None:
    bench.open_mask(box_mask(2, 3, 11, 12))
    bench.page.click("text=Color the mask")
    expect(bench.page.locator(".tip strong")).to_have_text("The mask")
    check_probe(bench, 3, 2, 10, (0, 0, 0))


def test_a_warning_moves_nothing(bench: BenchPage) -> None:
    before = bench.canvas.bounding_box()
    bench.page.click("text=Color the mask")
    expect(bench.page.locator(".message")).to_have_text("Paint a mask first.")
    expect(bench.page.locator(".message")).to_be_visible()
    assert bench.canvas.bounding_box() == before


def test_the_probe_says_that_it_changes_the_clean_picture(bench: BenchPage) -> None:
    bench.attack()
    bench.point(5, 7)
    expect(bench.page.locator(".tip strong")).to_have_text("Clean picture: row 7, column 5")
    check_probe(bench, 7, 5, 1, (0, 0, 0))
    expect(bench.page.locator(".heat-key")).to_be_hidden()
    bench.choose(1)
    expect(bench.page.locator(".tip")).to_be_hidden()


def test_a_heat_map_fills_in_and_is_blank_where_the_network_is_blind(bench: BenchPage) -> None:
    bench.page.select_option("label:has-text('Change') select", "5")
    bench.point(40, 30)
    expect(bench.page.locator(".heat-key")).to_contain_text("places")
    drawn = bench.pixels().astype(int)
    clean = to_pixels(corner_images()[0]).astype(int)
    changed = (drawn != clean).any(2)
    cross = np.zeros(SIZE, bool)
    cross[28:33, 36:45] = True
    assert changed[: CORNER - 2, : CORNER - 2].mean() > 0.5
    assert not (changed & ~cross)[CORNER + 8 :, CORNER + 8 :].any()
    # Purple or green over the picture, not the colors of the mask and its control.
    toward = np.array([[118, 42, 131], [27, 120, 55]])[:, None] - clean[changed & ~cross]
    moved = (drawn - clean)[changed & ~cross]
    share = (moved * toward).sum(2, keepdims=True) / (toward * toward).sum(2, keepdims=True)
    assert np.abs(moved - share * toward).max(2).min(0).max() <= 1
    bench.page.uncheck("text=heat map")
    expect(bench.page.locator(".heat-key")).to_be_hidden()
