"""Places on the explorer's bench, in a real browser: the weak-spot map, and an attack that is erased in a place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.browser.explorer_page import NAMES, SIZE, BenchPage, box_mask, corner_images, expect, logits_of
from weakspot.explorer.service import Service

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # The network is blind outside its corner, where controls often lie.
    pytest.mark.filterwarnings("ignore:the gradient of CornerNetwork is zero"),
]


def test_a_cell_of_the_weak_spot_map_becomes_the_mask(bench: BenchPage) -> None:
    bench.unfold("Weak-spot map")
    bench.page.click("text=Estimate only")
    expect(bench.page.locator(".fold .sentence").first).to_contain_text("Estimates")
    texts = bench.page.locator(".cells .spot text").all_text_contents()
    assert len(texts) == 49
    assert texts[-1] == "?"  # the network is blind there
    bench.page.click(".cells .spot >> nth=8")
    mask = bench.saved_mask()
    rows, columns = (torch.arange(side) * 7 // side for side in SIZE)
    assert (mask == ((rows == 1)[:, None] & (columns == 1)).numpy()).all()
    bench.page.click("text=Hide the map")
    expect(bench.page.locator(".cells .spot")).to_have_count(0)


def test_cells_are_searched_and_say_that_they_are_verified(bench: BenchPage) -> None:
    bench.unfold("Weak-spot map")
    bench.page.click("text=Map the weak spots")
    expect(bench.page.locator(".fold .sentence").first).to_contain_text("Weakest of 49 cells")
    assert "does not mean that none exists" in bench.text(".fold .sentence >> nth=0")
    bench.page.click(".cells .spot >> nth=48")
    expect(bench.page.locator(".fold .sentence").first).to_contain_text("column 7: not found.")


@pytest.mark.parametrize(
    ("budget", "unit", "number"),
    [
        ("linf:4/255", "in gray levels of 255", r"\d+|\d\.\d"),
        ("l2:1", "as a length with values in [0, 1]", r"0\.0?\d\d"),
    ],
)
def test_the_map_names_the_unit_of_its_numbers(bench: BenchPage, budget: str, unit: str, number: str) -> None:
    bench.unfold_settings()
    bench.page.fill("label:has-text('Change each value') input", budget)
    bench.unfold("Weak-spot map")
    note = bench.page.locator(".fold .note", has_text="How little must change")
    expect(note).to_contain_text("for the decision to change; the smallest")  # no map yet
    bench.page.click("text=Estimate only")
    expect(note).to_contain_text(f"for the decision to change, {unit}; the smallest")
    shown = bench.page.locator(".cells .spot text").first.text_content()
    assert re.fullmatch(number, str(shown)), shown
    bench.page.click("text=Hide the map")
    expect(note).to_contain_text("for the decision to change; the smallest")


def test_erasing_the_attack_everywhere_brings_the_decision_back(bench: BenchPage) -> None:
    bench.unfold_settings()
    bench.page.fill("label:has-text('Change each value') input", "linf:40/255")
    bench.attack()
    assert bench.text("figure.side.attack .says").startswith("Fooled")
    label = NAMES[int(logits_of(corner_images()[0]).argmax())]
    bench.unfold("Undo a place")
    bench.page.click("text=Erase the attack with the brush")
    bench.drag((40, 30), (44, 35))  # where the network is blind
    says = bench.page.locator(".fold .sentence").nth(1)
    expect(says).to_contain_text("not restored")
    bench.page.keyboard.press("i")
    expect(bench.page.locator(".decision h2")).to_contain_text(label)
    expect(says).to_contain_text("the decision is restored")
    bench.page.click("text=Put the attack back")
    expect(bench.page.locator(".area")).to_have_text("No mask: an attack may change the whole image.")


def test_a_page_says_so_if_another_one_has_attacked_its_picture(
    bench: BenchPage, browser: Any, service: Service
) -> None:
    bench.open_mask(box_mask(0, 0, 13, 13))
    bench.attack()
    bench.unfold("Undo a place")
    bench.page.click("text=Erase the attack in the mask")
    says = bench.page.locator(".fold .sentence").nth(1)
    expect(says).to_contain_text("Without the perturbation in this place")
    bench.page.click("text=Put the attack back")
    other = BenchPage(browser, service.url)
    other.open_mask(box_mask(20, 20, 30, 30))
    other.attack()
    bench.page.click("text=Erase the attack in the mask")
    message = bench.page.locator(".message")
    expect(message).to_have_text("Another page has attacked this picture since (attack it again)")
    bench.attack()
    bench.page.click("text=Erase the attack in the mask")
    expect(says).to_contain_text("Without the perturbation in this place")
    assert other.wrong == []
