"""The unit page in a real browser: sorting, filtering, and names that are no markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser.test_explanation_page import (
    HOSTILE,
    Opened,
    check_injections_are_blocked,
)
from tests.dissection.test_units import planted, seeing
from weakspot.dissection import dissect_layers
from weakspot.dissection.unit_examples import show_units
from weakspot.report.unit_page import unit_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    dataset = planted(tmp_path / "set")
    label = dataset / "label.csv"
    label.write_text(label.read_text().replace("red", HOSTILE.replace('"', "'")))
    model = seeing((32, 32))
    layers = dissect_layers(model, ["look"], dataset, quantile=0.07)
    pictures = {"look": show_units(model, layers["look"], dataset, [0, 1, 2, 3])}
    content = unit_page(layers, pictures, model=HOSTILE, made={"set": HOSTILE})
    (tmp_path / "units.html").write_text(content, "utf-8")
    return tmp_path / "units.html"


@pytest.fixture
def page(path: Path, browser: Any) -> Opened:
    return Opened(browser, path)


def units(page: Opened) -> list[int]:
    shown: list[int] = page.page.eval_on_selector_all(
        "tbody tr:not([hidden])", "rows => rows.map(row => Number(row.dataset.unit))"
    )
    return shown


def test_units_can_be_sorted_and_filtered_and_nothing_hostile_runs(page: Opened) -> None:
    assert page.wrong == []
    assert len(page.asked) == 1
    assert page.page.title().startswith("weakspot: units of <img")
    # Units that detect no concept are counted, not listed; the list is folded.
    assert set(units(page)) == {0, 1}
    assert "2 of 4 units detect a concept" in page.page.inner_text("main")
    assert "The other 2 are not shown." in page.page.inner_text("main")
    assert page.page.locator(".examples figure").count() == 2
    assert not page.page.is_visible("table.units")
    page.page.click("summary:has(strong:text-is('Units'))")
    page.page.click("button[data-key=unit]")
    assert units(page) == [1, 0]
    page.page.click("button[data-key=unit]")
    assert units(page) == [0, 1]
    page.page.select_option(".concepts", "green")
    assert units(page) == [1]
    drawn = page.page.eval_on_selector_all("table img", "all => all.every(one => one.loading === 'lazy')")
    assert drawn
    assert page.page.locator("tr[data-unit='1'] img").count() == 4


def test_only_the_scripts_and_styles_of_the_page_run(
    path: Path,
    browser: Any,
    tmp_path: Path,
) -> None:
    check_injections_are_blocked(browser, path, tmp_path)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_short_before_unfolding_and_fits_its_window(
    path: Path,
    browser: Any,
    width: int,
) -> None:
    page = Opened(browser, path, width).page
    assert page.evaluate("document.documentElement.scrollHeight") <= 2500
    page.eval_on_selector_all("details", "all => all.forEach(section => { section.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
