"""The numbers in the cells of the weak-spot map of a report: what they say, by pointer and by keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.browser.test_explanation_page import Opened
from weakspot import Classifier, Linf, explain, weak_spots
from weakspot.attacks import pgd
from weakspot.report.map_views import cell_edges

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def corner() -> tuple[Classifier, torch.Tensor]:
    """A linear network that reads only the first rows and columns of an image that is not square."""
    torch.manual_seed(0)
    weights = torch.zeros(2, 3, 30, 44)
    weights[0, :, :9, :13], weights[1, :, :9, :13] = 0.02, -0.02
    reading = nn.Linear(3 * 30 * 44, 2)
    with torch.no_grad():
        reading.weight.copy_(weights.flatten(1))
        reading.bias.copy_(torch.tensor([-4.0, 4.0]))
    network = nn.Sequential(nn.Flatten(), reading).eval()
    return Classifier.wrap(network, class_names=["bright", "dark"]), torch.full((1, 3, 30, 44), 0.6)


@pytest.fixture
def opened(browser: Any, corner: tuple[Classifier, torch.Tensor], tmp_path: Path) -> Opened:
    model, images = corner
    pairs = pgd(model, images, model(images).argmax(1), budget=Linf(0.1), steps=2)
    explanation = explain(model, pairs, analyses=["weak_spots"])
    return Opened(browser, explanation.to_html(tmp_path / "report.html"))


def test_each_cell_shows_its_own_estimate(opened: Opened, corner: tuple[Classifier, torch.Tensor]) -> None:
    model, images = corner
    labels = model(images).argmax(1)
    estimate = weak_spots(model, images, labels, grid=7, effort="estimate").first_order[0]
    shown = opened.page.eval_on_selector_all(
        "svg.spots .spot text", "all => all.map(text => text.textContent)"
    )
    wanted = ["?" if not size < 1 else f"{255 * size:.0f}" for size in estimate.flatten().tolist()]
    assert shown == wanted
    assert set(wanted) > {"?"}  # the network reads only a corner
    assert opened.wrong == []


def test_cells_lie_where_the_program_puts_them(opened: Opened) -> None:
    boxes = opened.page.eval_on_selector_all(
        "svg.spots rect",
        "all => all.map(r => ['y', 'x', 'height', 'width'].map(n => Number(r.getAttribute(n))))",
    )
    tops, lefts = cell_edges((30, 44), 7)
    assert (len(tops), len(lefts)) == (8, 8)
    assert boxes == [
        [top, left, tops[row + 1] - top, lefts[column + 1] - left]
        for row, top in enumerate(tops[:-1])
        for column, left in enumerate(lefts[:-1])
    ]


def test_the_outline_of_the_square_hides_no_number(opened: Opened) -> None:
    """The smallest square lies in the weakest cell, whose number matters most."""
    later = opened.page.eval_on_selector_all(
        ".outlined svg", "all => all.map(svg => svg.getAttribute('class'))"
    )
    assert later[:2] == ["square", "spots"]


def test_a_cell_says_what_it_needs_and_that_this_is_an_estimate(opened: Opened) -> None:
    first = opened.page.text_content("svg.spots .spot text")
    opened.page.click("svg.spots .spot")
    said = opened.page.inner_text("#readout")
    assert said == (
        f"Cell in row 1, column 1: a change of about {first}/255 here would be enough if the network were linear. "
        "This estimate is not verified."
    )
    opened.page.click("svg.spots .spot:last-child")
    assert "no change here would be enough" in opened.page.inner_text("#readout")


def test_cells_are_one_stop_for_tab_and_arrows_walk_through_them(opened: Opened) -> None:
    stops = "svg.spots .spot[tabindex='0']"
    assert opened.page.locator(stops).count() == 1
    opened.page.focus(stops)
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "Enter"):
        opened.page.keyboard.press(key)
    assert "Cell in row 3, column 1:" in opened.page.inner_text("#readout")
    assert opened.page.locator(stops).count() == 1
