"""Everything a person can do on the explorer's bench, in a real browser, against the model itself."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.browser.explorer_page import (
    NAMES,
    SAMPLES,
    SIZE,
    BenchPage,
    box_mask,
    corner_classifier,
    corner_images,
    expect,
    first_number,
    logits_of,
    to_pixels,
)
from weakspot import regions
from weakspot.explorer.service import Service

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # The network is blind outside its corner, where controls often lie.
    pytest.mark.filterwarnings("ignore:the gradient of CornerNetwork is zero"),
]


# ---------------------------------------------------------------- 1: picture, class, other pictures


def test_the_first_screen_shows_picture_class_and_what_to_do(bench: BenchPage) -> None:
    image = corner_images()[0]
    assert (bench.pixels() == to_pixels(image)).all()
    probabilities = logits_of(image).softmax(0)
    best = int(probabilities.argmax())
    assert bench.text(".decision h2").startswith(NAMES[best])
    shown = [first_number(text) for text in bench.page.locator(".bars .number").all_inner_texts()]
    wanted = (100 * probabilities.sort(descending=True).values).tolist()
    assert all(abs(one - other) <= 0.51 for one, other in zip(shown, wanted, strict=True))
    assert "paint a mask" in bench.text(".next")
    box = bench.canvas.bounding_box()
    assert box["y"] + box["height"] <= 900
    assert "token" not in bench.page.url


def test_another_picture_is_chosen_added_or_dropped(bench: BenchPage) -> None:
    bench.choose(1)
    assert (bench.pixels() == to_pixels(corner_images()[1])).all()
    assert bench.page.locator(".thumb img").nth(1).get_attribute("alt") == SAMPLES[1]  # a name, not markup
    added = np.full((*SIZE, 3), 90, np.uint8)
    added[:10] = (200, 30, 60)
    buffer = io.BytesIO()
    Image.fromarray(added).save(buffer, "PNG")
    count = bench.page.locator(".thumb").count()
    bench.page.set_input_files(
        "input[aria-label='Add a picture']",
        {"name": "new.png", "mimeType": "image/png", "buffer": buffer.getvalue()},
    )
    expect(bench.page.locator(".thumb")).to_have_count(count + 1)
    expect(bench.page.locator(".thumb").last).to_have_attribute("aria-pressed", "true")
    assert (bench.pixels() == added).all()
    dropped = bench.page.evaluate_handle(
        "text => { const moved = new DataTransfer(); moved.items.add(new File([text], 'no.png')); return moved; }",
        "no picture",
    )
    bench.page.dispatch_event("#bench", "drop", {"dataTransfer": dropped})
    expect(bench.page.locator(".message")).to_contain_text("picture")


class Held:
    """Requests of one kind, which wait until the test lets them go on."""

    def __init__(self, bench: BenchPage, name: str) -> None:
        self.bench, self.released = bench, False
        self.waiting: list[Any] = []
        bench.page.route(f"**/api/{name}", self.hold)

    def hold(self, route: Any) -> None:
        if self.released:
            route.continue_()
        else:
            self.waiting.append(route)

    def release(self) -> None:
        self.bench.wait_until(lambda: bool(self.waiting))
        self.released = True
        for route in self.waiting:
            route.continue_()


def test_what_is_asked_while_a_picture_opens_is_about_that_picture(
    bench: BenchPage, service: Service
) -> None:
    """Slow answers of one picture are never shown on another."""
    picture = Held(bench, "image")
    bench.page.click(".thumb >> nth=1")
    bench.page.select_option("select[aria-label='Mask from']", "cam")
    picture.release()
    expect(bench.page.locator(".area")).to_contain_text("pixels")
    assert (bench.pixels("figure.side.attack canvas") == to_pixels(corner_images()[1])).all()
    own = regions.cam(corner_classifier(), corner_images()[1:], bench_label(service, 1), fraction=0.3)
    assert (torch.from_numpy(bench.saved_mask()) == own[0, 0]).all()
    mask = Held(bench, "mask")
    bench.page.select_option("select[aria-label='Mask from']", "border")
    bench.wait_until(lambda: bool(mask.waiting))
    bench.choose(0)
    # What to do next is said again when the answer has been dealt with.
    bench.page.evaluate("document.querySelector('.next').textContent = ''")
    mask.release()
    expect(bench.page.locator(".next")).not_to_be_empty()
    assert not bench.saved_mask().any()


def bench_label(service: Service, number: int) -> torch.Tensor:
    return service.desk.bench.exhibit(number).label_tensor  # type: ignore[union-attr]


# ---------------------------------------------------------------- 4: attack and control


def test_the_mask_is_attacked_beside_its_control(bench: BenchPage) -> None:
    bench.open_mask(box_mask(0, 0, 13, 13))
    bench.page.check("text=show the control")
    bench.unfold_settings()
    bench.page.fill("label:has-text('Change each value') input", "linf:40/255")
    sentence = bench.attack()
    assert "Only the mask was enough; one other place is no test." in sentence
    clean, attacked = corner_images()[0], bench.pixels("figure.side.attack canvas")
    # The picture on the page, taken as an image, has the margin and the class that stand below it.
    seen = torch.from_numpy(attacked.copy()).permute(2, 0, 1) / 255
    logits, label = logits_of(seen), int(logits_of(clean).argmax())
    margin = float(logits[label] - logits[torch.arange(4) != label].max())
    assert abs(bench.number("figure.side.attack .margin") - margin) <= 0.05 + 0.02 * abs(margin)
    assert bench.text("figure.side.attack .says").startswith(f"Fooled: {NAMES[int(logits.argmax())]}")
    assert bench.text("figure.side.control .says").startswith("Not fooled")
    changed = (attacked != to_pixels(clean)).any(2)
    assert changed.any()
    assert not (changed & ~box_mask(0, 0, 13, 13)).any()
    expect(bench.page.locator(".chart polyline")).to_have_count(2)
    assert bench.number(".chart .lowest") <= bench.number("figure.side.attack .margin") + 0.01
    expect(bench.page.locator(".chart .note")).to_contain_text(re.compile(r"over \d+ evaluations"))
    before = bench.pixels()
    bench.page.click("button:text-is('Control')")
    expect(bench.page.locator(".decision")).to_contain_text("Attacked at the control")
    assert (bench.pixels() != before).any()
    bench.page.click("button:text-is('Difference')")
    expect(bench.page.locator("button:text-is('Difference')")).to_have_attribute("aria-pressed", "true")
    blink = bench.page.locator("button:text-is('Blink')")
    for pressed in ("true", "false"):
        blink.click()
        expect(blink).to_have_attribute("aria-pressed", pressed)


def test_a_result_says_when_the_mask_is_no_longer_its_own(
    bench: BenchPage, browser: Any, service: Service
) -> None:
    drawn = box_mask(1, 1, 9, 9)
    bench.open_mask(drawn)
    old = bench.page.locator(".attack .old")
    bench.attack()
    expect(old).to_be_empty()
    again = BenchPage(browser, service.url)  # the program remembers the attack
    expect(again.page.locator(".attack .sentence")).to_have_text(bench.text(".attack .sentence"))
    assert (again.saved_mask() == drawn).all()
    assert "seed 0" in again.text(".attack")
    again.page.close()
    bench.page.keyboard.press("i")
    expect(old).to_have_text("The result is that of an earlier mask.")
    expect(bench.page.locator(".next")).to_contain_text(
        "The result is that of an earlier mask. To attack anew"
    )
    bench.page.keyboard.press("i")
    expect(old).to_be_empty()
    bench.page.keyboard.press("0")
    expect(old).to_have_text("The result is that of an earlier mask.")
    bench.attack()
    expect(old).to_be_empty()
    bench.page.keyboard.press("i")  # all pixels: an attack on the whole image
    expect(bench.page.locator(".area")).to_contain_text("100% of the image")
    expect(old).to_be_empty()
    bench.open_mask(drawn)
    expect(old).to_have_text("The result is that of the whole image, not of the mask.")
    bench.page.keyboard.press("0")
    expect(old).to_be_empty()


def test_without_a_mask_the_whole_image_is_attacked_and_has_no_control(bench: BenchPage) -> None:
    assert bench.text("button.primary") == "Attack the whole image"
    bench.unfold_settings()
    for attack, about in (("fmn", "fmn: looks for the smallest change."), ("few_pixel", "few_pixel. ")):
        bench.page.select_option("label:has-text('Attack') select", attack)
        assert bench.text("section.attack > p.note >> nth=0").startswith(about)
    bench.page.select_option("label:has-text('Attack') select", "pgd")
    assert bench.attack().startswith("Whole image")
    assert "place of equal area" not in bench.text(".attack .sentence")
    expect(bench.page.locator("figure.side.control")).to_be_hidden()


def test_an_attack_toward_a_target_and_one_that_is_not_known(bench: BenchPage) -> None:
    bench.unfold_settings()
    label = int(logits_of(corner_images()[0]).argmax())
    other = NAMES[(label + 1) % 4]
    bench.page.fill("label:has-text('Target class') input", "zebra")
    bench.page.click("button.primary")
    expect(bench.page.locator(".message")).to_contain_text("No class is called “zebra”")
    bench.page.fill("label:has-text('Target class') input", other)
    bench.page.fill("label:has-text('Change each value') input", "linf:60/255")
    bench.attack()
    assert bench.text("figure.side.attack .says").startswith(f"Fooled: {other}")
    # The curve is about the target, the number below the picture about the label.
    assert f"Below the line, the network says {other}." in bench.text(".chart")
    assert bench.number("figure.side.attack .margin") < 0


def test_stop_keeps_the_best_so_far(bench: BenchPage) -> None:
    bench.open_mask(box_mask(0, 0, 13, 13))
    bench.unfold_settings()
    bench.page.fill("label:has-text('Steps') input", "1000000")
    bench.page.click("button.primary")
    expect(bench.page.locator("figure.side.attack .says")).to_contain_text("step")
    bench.page.click("button.primary")  # it says Stop
    expect(bench.page.locator(".attack .sentence")).to_contain_text("Stopped early.")
    expect(bench.page.locator("button.primary")).to_have_text("Attack inside the mask")
    bench.page.click("button:text-is('Attacked')")


def test_a_budget_that_cannot_be_read_is_one_sentence(bench: BenchPage) -> None:
    bench.unfold_settings()
    bench.page.fill("label:has-text('Change each value') input", "linf:200")
    bench.page.click("button.primary")
    expect(bench.page.locator(".message")).to_contain_text("200")
    expect(bench.page.locator("button.primary")).to_have_text("Attack the whole image")


# ---------------------------------------------------------------- 5, 6: panels, layers


def test_panels_are_those_of_the_report_and_wait_until_they_are_opened(bench: BenchPage) -> None:
    bench.unfold("Explain the attack")
    bench.unfold("Where does the network look?")
    expect(bench.page.locator(".fold .inside p").first).to_contain_text("attack the image first")
    bench.attack()
    bench.unfold("Where does the network look?")
    canvas = bench.page.locator(".inside canvas.map").first
    expect(canvas).to_have_attribute("width", str(SIZE[1]))
    assert len(np.unique(bench.pixels(".inside canvas.map"))) > 2
    canvas.hover()
    expect(bench.page.locator(".inside .readout")).to_contain_text("row")


def test_layers_and_units_are_scrubbed(bench: BenchPage) -> None:
    bench.attack()
    bench.unfold("Layers and units")
    slider = bench.page.locator("input[aria-label='Layer']")
    expect(slider).to_be_visible()
    expect(bench.page.locator(".units button").first).to_be_visible()
    slider.fill("0")
    expect(bench.page.locator(".step").last).to_contain_text("1 of")
    expect(bench.page.locator(".units button")).to_have_count(8)
    bench.page.click(".units button >> nth=0")
    expect(bench.page.locator(".unit .sentence")).to_contain_text("Without unit")
    assert len(np.unique(bench.pixels(".unit canvas"))) > 2


# ---------------------------------------------------------------- 8: links and copies


def test_a_link_restores_mask_and_settings(bench: BenchPage, browser: Any) -> None:
    bench.choose(1)
    bench.page.keyboard.press("b")
    bench.drag((5, 5), (20, 9))
    bench.unfold_settings()
    bench.page.fill("label:has-text('Change each value') input", "linf:3/255")
    bench.page.fill("label:has-text('Seed') input", "7")
    bench.page.keyboard.press("Tab")
    drawn = bench.saved_mask()
    bench.page.click("text=Copy link")
    expect(bench.page.locator("dialog pre")).to_contain_text("http://127.0.0.1")
    link = bench.text("dialog pre")
    assert "token" not in link
    other = bench.context.new_page()
    other.goto(link)
    expect(other.locator("#bench[data-ready=yes]")).to_be_visible()
    expect(other.locator(".thumb >> nth=1")).to_have_attribute("aria-pressed", "true")
    assert other.input_value("label:has-text('Change each value') input") == "linf:3/255"
    assert other.input_value("label:has-text('Seed') input") == "7"
    bench.page.click("dialog >> text=Close")
    bench.page = other
    assert (bench.saved_mask() == drawn).all()


def test_an_address_without_a_mask_brings_no_earlier_mask_back(bench: BenchPage) -> None:
    bench.open_mask(box_mask(1, 1, 9, 9))
    bench.attack()
    bench.wait_until(lambda: "mask=" in bench.page.url)
    bench.page.keyboard.press("0")
    bench.wait_until(lambda: "mask=" not in bench.page.url)
    bench.page.reload()
    expect(bench.page.locator("#bench[data-ready=yes]")).to_be_visible()
    expect(bench.page.locator(".attack .old")).to_have_text("The result is that of an earlier mask.")
    assert not bench.saved_mask().any()


def test_the_attack_is_copied_as_command_and_as_python(bench: BenchPage) -> None:
    bench.open_mask(box_mask(0, 0, 13, 13))
    bench.page.click("text=Copy as command")
    expect(bench.page.locator("dialog pre")).to_contain_text("weakspot attack first.png")
    assert "--region mask.png" in bench.text("dialog pre")
    assert "--region control.png" in bench.text("dialog pre")
    bench.page.keyboard.press("Escape")
    bench.page.click("text=Copy as Python")
    expect(bench.page.locator("dialog pre")).to_contain_text("import weakspot")
