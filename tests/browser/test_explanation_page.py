"""The report in a real browser: it draws, it answers its controls, and it asks nobody for anything."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weakspot import Classifier, Linf, explain, sample_images
from weakspot.attacks import pgd

pytestmark = [pytest.mark.browser, pytest.mark.slow]
playwright = pytest.importorskip("playwright.sync_api")

HOSTILE = "<img src=x onerror=\"document.title='broken'\">"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    images, _ = sample_images((96, 96))
    model = Classifier.wrap(
        network, class_names=[HOSTILE, "</script><script>document.title='broken'</script>", "c"]
    )
    pairs = pgd(model, images[:3], model(images[:3]).argmax(1), budget=Linf(0.1), steps=3)
    explanation = explain(model, pairs, names=[HOSTILE, "second", "third"], made={"attack": HOSTILE})
    return explanation.to_html(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield running
        running.close()


class Opened:
    """A page with what went wrong in it."""

    def __init__(self, browser: Any, report: Path, width: int = 1200, scheme: str = "light") -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("body[data-ready=yes]", timeout=20_000)

    def pixels(self, selector: str) -> list[int]:
        pixels: list[int] = self.page.eval_on_selector(
            selector, "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        )
        return pixels

    def overlaid(self, name: str) -> list[int]:
        self.page.select_option("#pair-0 .overlay", name)
        return self.pixels(CLEAN)


def check_injections_are_blocked(browser: Any, path: Path, folder: Path) -> None:
    """A script, a handler and a style that someone put into the page do nothing; the page still works."""
    injected = (
        "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
        '<p id=injected style="position: fixed">.</p><style>#injected { position: fixed }</style>'
    )
    text = path.read_text("utf-8")
    assert text.count("<body>") == 1
    attacked = folder / "attacked.html"
    attacked.write_text(text.replace("<body>", f"<body>{injected}"), "utf-8")
    plain, opened = Opened(browser, path), Opened(browser, attacked)
    assert plain.wrong == []
    assert opened.page.title() == plain.page.title()
    position = "getComputedStyle(document.getElementById('injected')).position"
    assert opened.page.evaluate(position) == "static"
    # The browser reports each of the five: two styles, a script, a picture that is not data, and its handler.
    assert len(opened.wrong) == 5
    assert all("Content Security Policy" in message for message in opened.wrong)


CLEAN, ADVERSARIAL = '#pair-0 canvas[data-image="clean"]', '#pair-0 canvas[data-image="adversarial"]'


@pytest.fixture
def opened(browser: Any, report: Path) -> Opened:
    return Opened(browser, report)


def test_it_opens_offline_without_errors_or_requests(opened: Opened, report: Path) -> None:
    assert opened.wrong == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [report.as_uri()]


def test_only_the_scripts_and_styles_of_the_page_run(browser: Any, report: Path, tmp_path: Path) -> None:
    check_injections_are_blocked(browser, report, tmp_path)


def test_names_that_are_markup_are_shown_and_not_run(opened: Opened) -> None:
    assert "broken" not in opened.page.title().replace(HOSTILE, "")
    assert opened.page.inner_text("#name-0") == HOSTILE
    assert opened.page.query_selector_all("img[onerror]") == []


MAPS = {
    "difference", "cam_label_clean", "cam_target_clean", "cam_label_adversarial", "cam_target_adversarial", "ssim",
    "partition", "vulnerability", "importance", "promotion", "suppression", "effect_kind", "causal_cells",
    "one_pixel_margin",
}  # fmt: skip


def test_every_map_is_drawn(opened: Opened) -> None:
    canvases = opened.page.query_selector_all("#pair-0 canvas.map")
    assert {canvas.get_attribute("data-map") for canvas in canvases} == MAPS
    for canvas in canvases:
        colors = canvas.evaluate(
            "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        name = canvas.get_attribute("data-map")
        assert colors > (0 if name in {"effect_kind", "causal_cells"} else 2), (
            name
        )  # cells may all be of one kind


def test_the_clean_photograph_is_drawn_to_the_bit(opened: Opened) -> None:
    wanted = (sample_images((96, 96))[0][0] * 255).round().byte().permute(1, 2, 0).reshape(-1, 3)
    drawn = torch.tensor(opened.pixels(CLEAN)).reshape(-1, 4)[:, :3]
    assert torch.equal(drawn, wanted.long())


def test_an_overlay_colors_the_photograph_and_its_opacity_can_be_changed(opened: Opened) -> None:
    plain = opened.pixels(CLEAN)
    half = opened.overlaid("importance")
    assert half != plain
    opened.page.fill("#opacity", "0")
    gray = opened.pixels(CLEAN)
    assert all(
        red == green == blue for red, green, blue in zip(gray[0::4], gray[1::4], gray[2::4], strict=True)
    )
    opened.page.fill("#opacity", "100")
    assert opened.pixels(CLEAN) not in (half, gray)
    opened.page.uncheck("#gray")
    opened.page.fill("#opacity", "0")
    assert opened.pixels(CLEAN) == plain


def test_space_blinks_the_images_and_digits_choose_overlays(opened: Opened) -> None:
    clean, adversarial = opened.pixels(CLEAN), opened.pixels(ADVERSARIAL)
    assert clean != adversarial
    opened.page.focus("#pair-0")
    opened.page.keyboard.press("Space")
    # Looked at in one go: half a second later it is the other image.
    opened.page.wait_for_function(
        """([selector, wanted]) => {
          const canvas = document.querySelector(selector);
          const shown = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          const said = document.querySelector("#pair-0 .shown").textContent;
          return said.includes("clean") && shown.every((value, place) => value === wanted[place]);
        }""",
        arg=[ADVERSARIAL, clean],
        timeout=20_000,
    )
    opened.page.keyboard.press("Space")
    assert opened.pixels(ADVERSARIAL) == adversarial
    opened.page.keyboard.press("2")
    assert opened.pixels(CLEAN) != clean
    opened.page.keyboard.press("0")
    assert opened.pixels(CLEAN) == clean


def test_arrows_walk_through_the_images(opened: Opened) -> None:
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.evaluate("document.activeElement.id") == "pair-1"
    opened.page.keyboard.press("ArrowLeft")
    assert opened.page.evaluate("document.activeElement.id") == "pair-0"


def test_zoom_is_linked_and_a_pointer_reads_both_images(opened: Opened) -> None:
    opened.page.select_option("#pair-0 .zoom", "4")
    sizes = opened.page.eval_on_selector_all(
        "#pair-0 canvas.view, #pair-0 canvas.map", "all => all.map(c => [c.width, c.height])"
    )
    assert sizes == [[24, 24]] * (2 + len(MAPS))
    opened.page.hover(CLEAN)
    shown = opened.page.inner_text("#pair-0 .readout")
    row, column = (int(number) for number in re.findall(r"(?:row|column) (\d+)", shown))
    assert {row, column} <= {47, 48}
    wanted = (sample_images((96, 96))[0][0, :, row, column] * 255).round().int().tolist()
    assert "clean {} {} {} ·".format(*wanted) in shown


def test_the_layer_browser_shows_each_layer(opened: Opened) -> None:
    slider, shown = "#pair-0 .layer-browser input", "#pair-0 .layer-browser .step"
    last = opened.page.inner_text(shown)
    before = opened.pixels("#pair-0 canvas.layer")
    assert len(set(before)) > 2
    assert last.startswith("1 of 1: 1, 24")
    opened.page.focus(slider)
    opened.page.keyboard.press("ArrowLeft")
    assert opened.page.inner_text(shown) == last  # a network of one layer has nowhere to go
    shown = opened.page.inner_text("#pair-0 .layer-browser .value >> nth=0")
    assert float(shown) > 0


def test_the_contact_sheet_can_be_sorted(opened: Opened) -> None:
    opened.page.select_option("#sort", "margin_drop")
    drops = opened.page.eval_on_selector_all(
        "#sheet li", "all => all.map(li => Number(li.dataset.marginDrop))"
    )
    assert drops == sorted(drops, reverse=True)
    offered = opened.page.eval_on_selector_all("#sort option", "all => all.map(option => option.value)")
    assert "relation_p" not in offered  # three images have no p


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_its_window(browser: Any, report: Path, width: int) -> None:
    page = Opened(browser, report, width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark_mode_are_followed(browser: Any, report: Path) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        page = Opened(browser, report, scheme=scheme).page
        colors[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colors == {"light": "rgb(251, 250, 247)", "dark": "rgb(20, 23, 26)"}


def test_pictures_have_alternative_text_and_controls_have_names(opened: Opened) -> None:
    unnamed = opened.page.eval_on_selector_all(
        "canvas:not([aria-hidden]), img",
        "all => all.filter(e => !(e.getAttribute('aria-label') || e.alt)).length",
    )
    assert unnamed == 0
    assert (
        opened.page.eval_on_selector_all("input, select", "all => all.filter(e => !e.labels.length).length")
        == 0
    )
