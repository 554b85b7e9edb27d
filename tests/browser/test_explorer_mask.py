"""The mask of the explorer: what is drawn is what is saved, sent and read, by pointer, finger and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.browser.explorer_page import SIZE, BenchPage, box_mask, expect, mask_file
from weakspot.explorer.service import Service

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def disc(x: int, y: int, size: int) -> NDArray[np.bool_]:
    """The pixels whose centers lie in a disc of this many pixels across."""
    middle = 0.0 if size % 2 else 0.5
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.asarray((rows - y + middle) ** 2 + (columns - x + middle) ** 2 <= (size / 2) ** 2)


def wait_until_sent(bench: BenchPage, service: Service, wanted: NDArray[np.bool_]) -> None:
    """Until the program has received this mask."""

    def sent() -> bool:
        brushed = service.desk.bench.brushed  # type: ignore[union-attr]
        return brushed is not None and np.array_equal(brushed[0, 0].cpu(), wanted)

    bench.wait_until(sent)


def test_a_rectangle_is_saved_sent_and_shown_as_it_was_drawn(bench: BenchPage, service: Service) -> None:
    clean = bench.pixels().astype(int)
    bench.page.click("text=Rectangle")
    bench.drag((30, 20), (10, 5))
    wanted = box_mask(10, 5, 30, 20)
    expect(bench.page.locator(".area")).to_have_text(
        f"The mask covers {100 * wanted.mean():.0f}% of the image: {wanted.sum()} pixels."
    )
    assert (bench.saved_mask() == wanted).all()
    wait_until_sent(bench, service, wanted)
    bench.point(47, 39)
    shown = (np.abs(bench.pixels().astype(int) - clean) > 3).any(2)
    assert shown[5:21, 10:31].all()
    assert not shown[:5].any()


def test_a_stroke_is_a_disc_moved_along_a_line(bench: BenchPage, service: Service) -> None:
    bench.page.keyboard.press("b")
    for _ in range(4):
        bench.page.keyboard.press("]")
    assert bench.text(".tools output") == "12 px"
    bench.drag((12, 20), (30, 20))
    wanted = np.zeros(SIZE, bool)
    for x in range(12, 31):
        wanted |= disc(x, 20, 12)
    assert (bench.saved_mask() == wanted).all()
    bench.page.keyboard.press("e")
    bench.drag((20, 20))
    wanted &= ~disc(20, 20, 12)
    assert (bench.saved_mask() == wanted).all()
    expect(bench.page.locator(".area")).to_contain_text(f"{wanted.sum()} pixels")
    wait_until_sent(bench, service, wanted)


def test_undo_and_redo_walk_through_everything_that_changes_the_mask(bench: BenchPage) -> None:
    states = [np.zeros(SIZE, bool)]
    bench.page.keyboard.press("r")
    bench.drag((3, 3), (20, 20))
    states.append(bench.saved_mask())
    bench.page.keyboard.press("i")
    states.append(bench.saved_mask())
    assert (states[-1] == ~states[-2]).all()
    bench.open_mask(box_mask(1, 1, 7, 30))
    states.append(bench.saved_mask())
    bench.page.keyboard.press("0")
    states.append(bench.saved_mask())
    assert not states[-1].any()
    for state in reversed(states[:-1]):
        bench.page.keyboard.press("Control+z")
        assert (bench.saved_mask() == state).all()
    assert bench.page.is_disabled("button:text-is('Undo')")
    for state in states[1:]:
        bench.page.keyboard.press("Control+y")
        # A browser allows a page only about ten files in a row.
        told = f"{state.sum():,} pixels" if state.any() else "No mask"
        expect(bench.page.locator(".area")).to_contain_text(told)
    assert bench.page.is_disabled("button:text-is('Redo')")


@pytest.mark.parametrize("seed", range(3))
def test_a_file_comes_out_as_it_went_in(bench: BenchPage, seed: int) -> None:
    mask = np.random.default_rng(seed).random(SIZE) < (0.5, 0.02, 0.98)[seed]
    bench.open_mask(mask)
    assert (bench.saved_mask() == mask).all()


def test_a_file_of_another_size_or_kind_is_refused_in_one_sentence(bench: BenchPage) -> None:
    bench.page.set_input_files("input[aria-label='Open a mask file']", mask_file(np.ones((40, 40), bool)))
    expect(bench.page.locator(".message")).to_have_text(
        "The mask must be 48 \u00d7 40 pixels like the picture, got 40 \u00d7 40"
    )
    text = {"name": "mask.png", "mimeType": "image/png", "buffer": b"no picture"}
    bench.page.set_input_files("input[aria-label='Open a mask file']", text)
    expect(bench.page.locator(".message")).to_have_text("The mask must be a picture file")
    assert not bench.saved_mask().any()


@pytest.mark.parametrize("kind", ["cam", "superpixels", "superpixel", "border", "background", "foreground"])
def test_masks_come_from_the_program(bench: BenchPage, service: Service, kind: str) -> None:
    bench.page.select_option("select[aria-label='Mask from']", kind)
    expect(bench.page.locator(".area, .message:visible").filter(has_text="pixels").or_(
        bench.page.locator(".message:visible")
    ).first).to_be_visible()  # fmt: skip
    if bench.page.is_visible(".message") and not bench.saved_mask().any():
        # A picture of noise may have no background: said in one sentence.
        assert bench.text(".message").endswith((".", ")")) or "empty" in bench.text(".message")
        return
    expect(bench.page.locator(".area")).to_contain_text("pixels")
    wait_until_sent(bench, service, bench.saved_mask())


@pytest.mark.filterwarnings("ignore:the gradient of CornerNetwork is zero")
def test_the_brush_is_used_with_the_keyboard_alone(bench: BenchPage) -> None:
    """From the first Tab to a saved mask, an attack and its control."""
    press = bench.page.keyboard.press
    for _ in range(60):
        press("Tab")
        if bench.page.evaluate("document.activeElement.className") == "picture":
            break
    else:
        pytest.fail("Tab does not reach the picture")
    press("b")
    for key in ("ArrowLeft", *["Shift+ArrowLeft"] * 2, *["Shift+ArrowUp"] * 2, "Space"):
        press(key)
    # The first arrow shows the cursor in the middle, (24, 20).
    assert (bench.saved_mask() == disc(4, 0, 2)).all()
    bench.canvas.focus()
    press("r")
    for key in ("Space", *["ArrowRight"] * 5, *["ArrowDown"] * 3, "Space"):
        press(key)
    assert (bench.saved_mask() == disc(4, 0, 2) | box_mask(4, 0, 9, 3)).all()
    for _ in range(60):
        press("Tab")
        if bench.page.evaluate("document.activeElement.textContent") == "Attack inside the mask":
            break
    else:
        pytest.fail("Tab does not reach the attack")
    press("Enter")
    expect(bench.page.locator(".attack .sentence")).to_contain_text("place of equal area")


def test_every_key_does_what_the_help_says(bench: BenchPage) -> None:
    pressed = {"p": "Probe", "b": "Brush", "e": "Eraser", "r": "Rectangle"}
    for key, name in pressed.items():
        bench.page.keyboard.press(key)
        assert bench.page.get_attribute(f"button:text-is('{name}')", "aria-pressed") == "true"
    bench.page.keyboard.press("b")
    sizes = [bench.text(".tools output")]
    for key in "]]]":
        bench.page.keyboard.press(key)
        sizes.append(bench.text(".tools output"))
    assert sizes == ["2 px", "3 px", "5 px", "8 px"]
    bench.page.keyboard.press("?")
    assert bench.page.is_visible("dialog.keys-help")
    keys = bench.page.locator("dialog.keys-help kbd").all_inner_texts()
    assert {"B", "E", "R", "[", "]", "Ctrl-Z", "Ctrl-Y", "I", "0", "?"} <= set(keys)
    bench.page.keyboard.press("b")  # not behind the dialog
    bench.page.keyboard.press("Escape")
    expect(bench.page.locator("dialog.keys-help")).to_be_hidden()


def test_keys_are_letters_where_something_is_written(bench: BenchPage) -> None:
    bench.unfold_settings()
    bench.page.click("label:has-text('Target class') input")
    bench.page.keyboard.type("ebri0")
    assert bench.page.input_value("label:has-text('Target class') input") == "ebri0"
    assert bench.page.get_attribute("button:text-is('Probe')", "aria-pressed") == "true"
    assert not bench.saved_mask().any()


def test_a_finger_paints(browser: Any, service: Service) -> None:
    bench = BenchPage(browser, service.url, 390, has_touch=True, is_mobile=True)
    brush = bench.page.locator("button:text-is('Brush')")
    brush.tap()
    expect(brush).to_have_attribute("aria-pressed", "true")
    x, y = bench.place(20, 20)
    bench.page.touchscreen.tap(x, y)
    expect(bench.page.locator(".area")).to_contain_text("4 pixels")
    assert (bench.saved_mask() == disc(20, 20, 2)).all()
    assert bench.wrong == []
