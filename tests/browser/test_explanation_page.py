"""The report in a real browser: it draws, it answers its controls, and it asks nobody for anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weakspot import Classifier, Linf, explain, sample_images
from weakspot.attacks import pgd

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = "<img src=x onerror=\"document.title='broken'\">"


def write_report(folder: Path, class_names: list[str], names: list[str]) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    images, _ = sample_images((96, 96))
    model = Classifier.wrap(network, class_names=class_names)
    pairs = pgd(model, images, model(images).argmax(1), budget=Linf(0.1), steps=3)
    return explain(model, pairs, names=names, made={"attack": names[0]}).to_html(folder / "report.html")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = [HOSTILE, "</script><script>document.title='broken'</script>", "c"]
    return write_report(
        tmp_path_factory.mktemp("report"), classes, [HOSTILE, "second", "third", f"{'long-' * 30}.png"]
    )


@pytest.fixture(scope="module")
def plain_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["chelsea.png", "coffee.png", "rocket.png", "motorcycle.png"]
    return write_report(tmp_path_factory.mktemp("plain"), ["Egyptian cat", "espresso", "missile"], names)


class Opened:
    """A page with what went wrong in it."""

    def __init__(self, browser: Any, report: Path, width: int = 1200, scheme: str = "light") -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        context.set_default_timeout(60_000)
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("body[data-ready=yes]")

    def pixels(self, selector: str) -> list[int]:
        pixels: list[int] = self.page.eval_on_selector(
            selector, "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        )
        return pixels

    def overlaid(self, name: str) -> list[int]:
        self.page.select_option("#overlay", name)
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


def drawn_maps(opened: Opened) -> list[str]:
    """Names of the maps of the first pair, in the order of the page; those that show nothing are sentences."""
    names: list[str] = opened.page.eval_on_selector_all(
        "#pair-0 canvas.map", "all => all.map(canvas => canvas.dataset.map)"
    )
    return names


def open_all(opened: Opened) -> None:
    opened.page.eval_on_selector_all("details", "all => all.forEach(section => { section.open = true; })")
    opened.page.wait_for_function(
        "() => [...document.querySelectorAll('#pair-0 canvas.map')].every(c => c.width === 96)"
    )


def test_every_map_is_drawn_when_its_section_opens(opened: Opened) -> None:
    names = drawn_maps(opened)
    assert {"difference", "vulnerability", "cam_label_clean"} <= set(names)
    assert len(names) == len(set(names))
    open_all(opened)
    for canvas in opened.page.query_selector_all("#pair-0 canvas.map"):
        colors = canvas.evaluate(
            "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        assert colors > 2, canvas.get_attribute("data-map")


def test_the_clean_photograph_is_drawn_to_the_bit(opened: Opened) -> None:
    wanted = (sample_images((96, 96))[0][0] * 255).round().byte().permute(1, 2, 0).reshape(-1, 3)
    drawn = torch.tensor(opened.pixels(CLEAN)).reshape(-1, 4)[:, :3]
    assert torch.equal(drawn, wanted.long())


def test_an_overlay_colors_the_photograph_and_its_opacity_can_be_changed(opened: Opened) -> None:
    plain = opened.pixels(CLEAN)
    half = opened.overlaid("vulnerability")
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
          return said.includes("Clean") && shown.every((value, place) => value === wanted[place]);
        }""",
        arg=[ADVERSARIAL, clean],
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
    open_all(opened)
    opened.page.select_option("#zoom", "4")
    sizes = opened.page.eval_on_selector_all(
        "#pair-0 canvas.view, #pair-0 canvas.map", "all => all.map(c => [c.width, c.height])"
    )
    assert sizes == [[24, 24]] * (2 + len(drawn_maps(opened)))
    opened.page.hover(CLEAN)
    shown = opened.page.inner_text("#readout")
    row, column = (int(number) for number in re.findall(r"(?:row|column) (\d+)", shown))
    assert {row, column} <= {47, 48}
    wanted = (sample_images((96, 96))[0][0, :, row, column] * 255).round().int().tolist()
    assert "clean {} {} {} ·".format(*wanted) in shown


def test_the_layer_browser_shows_each_layer(opened: Opened) -> None:
    open_all(opened)
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


@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("unfolded", [False, True])
def test_the_page_fits_its_window(browser: Any, report: Path, width: int, unfolded: bool) -> None:
    opened = Opened(browser, report, width)
    if unfolded:
        open_all(opened)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_four_images_are_at_most_2500_pixels_high_before_unfolding(browser: Any, plain_report: Path) -> None:
    page = Opened(browser, plain_report, 1280).page
    assert page.evaluate("document.documentElement.scrollHeight") <= 2500


def test_on_paper_everything_is_open_and_in_order(opened: Opened) -> None:
    folded = opened.page.query_selector_all("details:not([open])")
    assert folded
    opened.page.emulate_media(media="print")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert opened.page.query_selector_all("details:not([open])") == []
    places = opened.page.eval_on_selector_all(
        "article.pair, article.pair details, .next, .made details",
        "all => all.map(part => part.getBoundingClientRect().top)",
    )
    assert places == sorted(places)
    opened.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert len(opened.page.query_selector_all("details:not([open])")) == len(folded)


def test_a_link_to_a_term_opens_the_glossary(opened: Opened) -> None:
    opened.page.click("#pair-0 .questions details:last-child summary")
    opened.page.click("#pair-0 .scores tbody tr:first-child a")
    assert opened.page.evaluate("document.querySelector('dt:target').closest('details').open")
    assert opened.page.evaluate(
        "document.querySelector('dt:target').getBoundingClientRect().top < innerHeight"
    )


def test_sections_open_by_keyboard_and_space_does_not_blink_there(opened: Opened) -> None:
    opened.page.focus("#pair-0 summary")
    opened.page.keyboard.press("Space")
    assert opened.page.evaluate("document.querySelector('#pair-0 details').open")
    assert opened.page.get_attribute("#blink", "aria-pressed") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_level_aa(browser: Any, report: Path, scheme: str) -> None:
    opened = Opened(browser, report, scheme=scheme)
    open_all(opened)
    low = opened.page.evaluate(CONTRAST)
    assert low == []


# Text whose contrast with the nearest colored background is under 4.5 to 1 (WCAG 2.1, 1.4.3).
CONTRAST = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const low = [];
  for (const part of document.querySelectorAll("body *")) {
    if (!part.offsetParent || ![...part.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    let back = part;
    while (back && (parse(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement;
    const behind = light(parse(getComputedStyle(back || document.body).backgroundColor));
    const ink = light(parse(getComputedStyle(part).color));
    const ratio = (Math.max(ink, behind) + 0.05) / (Math.min(ink, behind) + 0.05);
    if (ratio < 4.5) low.push([part.tagName, part.className, part.textContent.trim().slice(0, 40), ratio]);
  }
  return low;
}"""


def test_light_and_dark_mode_are_followed(browser: Any, report: Path) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        page = Opened(browser, report, scheme=scheme).page
        colors[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colors == {"light": "rgb(251, 250, 247)", "dark": "rgb(20, 23, 26)"}


def test_pictures_have_alternative_text_and_controls_have_names(opened: Opened) -> None:
    unnamed = opened.page.eval_on_selector_all(
        "canvas:not([aria-hidden])", "all => all.filter(e => !e.getAttribute('aria-label')).length"
    )
    assert unnamed == 0
    # Thumbnails stand beside the same words.
    assert opened.page.eval_on_selector_all("img", "all => all.every(e => e.getAttribute('alt') === '')")
    said = opened.page.get_attribute(ADVERSARIAL, "aria-label") or ""
    assert "The attack" in said
    assert len(said) > len("adversarial image") + len(HOSTILE)
    assert (
        opened.page.eval_on_selector_all("input, select", "all => all.filter(e => !e.labels.length).length")
        == 0
    )
