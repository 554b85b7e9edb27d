"""The gallery in a real browser: filters, brushes, pictures, findings, and the way to the bench."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import weakspot
from tests.audit.fixtures import NETWORKS, TINY, draw_pictures, small_plan, store_records
from tests.browser.explorer_page import WAIT, expect
from tests.browser.test_explanation_page import HOSTILE
from weakspot.audit import ModelPlan, audit, open_run
from weakspot.explorer.bench import Bench
from weakspot.explorer.desk import Desk
from weakspot.explorer.gallery import Gallery
from weakspot.explorer.gallery_desk import RecordDesk, gallery_questions
from weakspot.explorer.service import Service

axe = pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = [pytest.mark.browser, pytest.mark.slow]
REASON = "The model of the run, lost:build, cannot be loaded."
SERIOUS = {"serious", "critical"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two runs of 30 pictures, and one whose names are markup."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "audited_networks.py").write_text(NETWORKS)
    pictures = draw_pictures(folder / "pictures", 30)
    other = ModelPlan("audited_networks:other", size=(24, 24), classes=TINY.classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name, model in (("first", TINY), ("second", other)):
            audit(small_plan(pictures, model=model, labels="predictions"), folder / name)
        shutil.copytree(folder / "first", folder / "hostile")
        records = open_run(folder / "hostile").records
        renamed = records.assign(image=HOSTILE + records["image"], label_name=HOSTILE)
        store_records(folder / "hostile", renamed)
        yield folder


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[Any]:
    """Name -> link: one run, two runs, hostile names, and a run without a model."""
    model = weakspot.load("audited_networks:build", input_size=(24, 24), class_names=TINY.classes)
    opened = {name: open_run(runs / name) for name in ("first", "second", "hostile")}
    desks: dict[str, Desk | RecordDesk] = {
        "one": Desk(Bench(model), gallery_questions(Gallery(opened["first"]))),
        "two": Desk(Bench(model), gallery_questions(Gallery(opened["first"], opened["second"]))),
        "hostile": Desk(Bench(model), gallery_questions(Gallery(opened["hostile"]))),
        "bare": RecordDesk(Gallery(opened["first"]), REASON),
    }
    services = {name: Service.prepare(desk, port=0) for name, desk in desks.items()}
    for service in services.values():
        service.start()
    try:
        yield services
    finally:
        for service in services.values():
            service.close()


class Shown:
    """The gallery in a browser, with what went wrong and which hosts were asked."""

    def __init__(
        self, browser: Any, service: Service, width: int = 1280, scheme: str = "light", fragment: str = ""
    ) -> None:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(WAIT)
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url.partition("/api")[0]))
        self.page.goto(f"{service.url}#{fragment}" if fragment else service.url)
        self.page.wait_for_selector(".tile img:not([hidden])")
        self.settle()
        self.home = service.url.partition("/?")[0]

    def count(self) -> int:
        """How many records the page says there are."""
        words = self.page.inner_text(".count").split()
        return 0 if words[0] == "No" else int(words[0].replace(",", ""))

    def settle(self) -> None:
        """Wait until everything that was asked for is shown."""
        self.page.wait_for_selector(".gallery-view[aria-busy=false]", state="attached")

    def wait_for_count(self, expected: int) -> None:
        """Wait until the page says that there are so many."""
        start = "No record" if expected == 0 else f"{expected:,} record"
        self.page.wait_for_function(
            "(start) => document.querySelector('.count').textContent.startsWith(start)", arg=start
        )
        self.settle()

    def check(self) -> None:
        """Nothing went wrong, and no other host was asked."""
        assert self.wrong == []
        assert {url for url in self.asked if url.startswith("http")} - {self.home} == {
            url for url in self.asked if url.startswith(f"{self.home}/")
        }


def matching(run: Path, condition: str) -> int:
    count: int = open_run(run).sql(f"select count(*) from outcomes where {condition}").fetchall()[0][0]  # noqa: S608
    return count


def test_filters_narrow_the_records_and_are_cleared(browser: Any, served: Any, runs: Path) -> None:
    shown = Shown(browser, served["one"])
    page = shown.page
    assert shown.count() == 120
    page.click(".values button:has-text('cam')")
    shown.wait_for_count(60)
    page.click(".values button:has-text('pgd')")
    shown.wait_for_count(30)
    page.click("details.values:has(summary:text-is('fooled')) button:has-text('no')")
    shown.wait_for_count(matching(runs / "first", "region = 'cam' and attack = 'pgd' and not fooled"))
    page.click("text=clear all filters")
    shown.wait_for_count(120)
    assert not page.is_visible("text=clear all filters")
    shown.check()


def test_a_brush_by_mouse_and_by_keyboard_filters_by_a_score(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["one"])
    page = shown.page
    histogram = page.locator(".histogram").first
    page.wait_for_selector(".histogram .bar")
    box = histogram.locator("svg").bounding_box()
    page.mouse.move(box["x"] + 0.02 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20, steps=6)
    page.mouse.up()
    shown.settle()
    brushed = shown.count()
    heights = histogram.locator(".bar:not(.out)").count()
    assert 0 < brushed < 120
    assert heights < histogram.locator(".bar").count()
    histogram.locator("button:has-text('clear')").click()
    shown.wait_for_count(120)
    # The same brush with the keys alone.
    histogram.locator("input").nth(1).focus()
    for _ in range(29 - 15):
        page.keyboard.press("ArrowLeft")
    shown.wait_for_count(brushed)
    assert histogram.locator("input").nth(1).get_attribute("aria-valuetext")
    shown.check()


def test_records_are_sorted_and_turned_page_by_page(browser: Any, served: Any, runs: Path) -> None:
    shown = Shown(browser, served["one"])
    page = shown.page
    page.select_option("label:has-text('sorted by') select", "margin_adversarial")
    page.select_option("label:has-text('order') select", "down")
    shown.settle()
    assert page.inner_text(".count") == "120 records: 1 to 50"
    seen: list[str] = []
    for _ in range(3):
        seen += [tile.inner_text() for tile in page.query_selector_all(".tile strong")]
        if page.is_enabled("text=next page"):
            page.click("text=next page")
            shown.settle()
    query = "select image from outcomes order by margin_adversarial desc, index, attack desc, region desc"
    assert sorted(seen) == sorted(row[0] for row in open_run(runs / "first").sql(query).fetchall())
    assert len(seen) == 120
    page.click("text=previous page")
    shown.settle()
    assert page.inner_text(".count") == "120 records: 51 to 100"
    shown.check()


def test_a_click_on_a_record_brings_its_image_to_the_bench(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["one"])
    page = shown.page
    steps, target = (
        page.locator(f".attack label:has-text('{name}') input") for name in ("Steps", "Target class")
    )
    steps.evaluate("one => { one.value = 77; }")  # of another record
    target.evaluate("one => { one.value = 'cat'; }")
    page.click(".tile >> nth=7 >> button")
    page.wait_for_selector("#bench .thumb", state="visible")
    page.wait_for_selector("#bench .bars li", state="visible")
    assert len(page.query_selector_all("#bench .thumb")) == 1
    assert not page.is_visible(".tiles")
    expect(page.locator(".attack .note:has-text('those of the record')")).to_be_visible()
    assert target.input_value() == ""
    page.click("#tabs button:has-text('Gallery')")
    assert page.is_visible(".tiles")
    page.click(".tile >> nth=0 >> button")  # by pgd; the one before was by few_pixel, which has no steps
    expect(steps).to_have_value("3")
    assert shown.wrong == []


def test_the_address_holds_filters_order_page_and_the_record_on_the_bench(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["one"])
    page = shown.page
    page.click(".values button:has-text('cam')")
    shown.wait_for_count(60)
    page.select_option("label:has-text('sorted by') select", "l2")
    page.select_option("label:has-text('order') select", "down")
    page.select_option("label:has-text('picture') select", "adversarial")
    shown.settle()
    page.click("text=next page")
    shown.settle()
    names = page.locator(".tile strong").all_inner_texts()
    count = page.inner_text(".count")
    assert len(names) == 10
    page.click(".tile >> nth=3 >> button")
    page.wait_for_selector("#bench .bars li", state="visible")
    # The region of the record becomes the mask, and the mask a part of the address.
    page.wait_for_function("() => location.hash.includes('mask=') && location.hash.includes('records=')")
    area = page.inner_text(".area").partition(".")[0]
    assert "token" not in page.url
    again = page.context.new_page()
    again.on("pageerror", lambda error: shown.wrong.append(str(error)))
    again.goto(page.url)
    again.wait_for_selector("body[data-ready=yes]")
    expect(again.locator("#bench h2").first).to_be_visible()
    assert "pixels" in area
    expect(again.locator(".area")).to_contain_text(area)
    assert again.get_attribute(".thumb[aria-pressed=true]", "title") == names[3]
    again.click("#tabs button:has-text('Gallery')")
    expect(again.locator(".count")).to_have_text(count)
    assert again.locator(".tile strong").all_inner_texts() == names
    assert again.input_value("label:has-text('sorted by') select") == "l2"
    assert again.input_value("label:has-text('picture') select") == "adversarial"
    expect(again.locator(".values button[aria-pressed=true]")).to_have_text(re.compile("cam"))
    shown.check()


def test_a_brushed_score_is_in_the_address_and_another_run_says_that_it_is_not_meant(
    browser: Any, served: Any
) -> None:
    shown = Shown(browser, served["one"])
    page = shown.page
    page.select_option("select[aria-label='add a histogram']", "l2")
    slider = page.locator("input[aria-label='l2: to']")
    slider.focus()
    for _ in range(15):
        page.keyboard.press("ArrowLeft")
    shown.settle()
    count = page.inner_text(".count")
    page.wait_for_function("() => location.hash.includes('bins')")
    link = page.url.partition("#")[2]
    again = Shown(browser, served["one"], fragment=link)
    assert again.page.inner_text(".count") == count
    assert again.page.input_value("input[aria-label='l2: to']") == slider.input_value()
    assert again.page.is_visible("text=clear all filters")
    other = Shown(browser, served["two"], fragment=link)
    expect(other.page.locator(".gallery-view .message")).to_contain_text("This link is about")
    assert other.count() == 120
    again.check()
    other.check()


def test_all_values_of_a_record_are_shown_on_demand(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["one"])
    shown.page.click(".tile >> nth=0 >> summary")
    shown.page.wait_for_selector(".tile dl")
    assert "margin_clean" in shown.page.inner_text(".tile dl")


def test_the_picture_can_be_the_attacked_one_and_the_change(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["two"])
    page, pictures = shown.page, set[str]()
    for kind in ("clean", "adversarial", "change", "adversarial_after"):
        page.select_option("label:has-text('picture') select", kind)
        page.wait_for_function(
            "(known) => !known.includes(document.querySelector('.tile img:not([hidden])')?.src)",
            arg=sorted(pictures),
        )
        pictures.add(page.get_attribute(".tile img", "src"))
    assert len(pictures) == 4
    shown.check()


def test_findings_are_shown_and_lead_to_their_records(browser: Any, served: Any, runs: Path) -> None:
    shown = Shown(browser, served["two"])
    page = shown.page
    page.click("text=Weak classes and regions")
    page.wait_for_selector(".finding")
    assert "No class was compared" in page.inner_text(
        ".gallery-view"
    ) or "No class was shown" in page.inner_text(".gallery-view")
    assert not page.is_visible("text=show all rows")
    rows = page.locator(".gallery-view section:visible tbody tr").count()
    page.click("nav button:has-text('Records')")
    page.click(".values button:has-text('cam')")
    shown.wait_for_count(60)
    page.click("text=Weak classes and regions")
    expect(page.locator("p:visible:has-text('fit the filters of region')")).to_be_visible()
    assert page.locator(".gallery-view section:visible tbody tr").count() < rows
    page.click("text=show all rows")
    expect(page.locator("text=show all rows")).to_have_count(0)
    expect(page.locator(".gallery-view section:visible tbody tr")).to_have_count(rows)
    page.click("text=What changed")
    page.wait_for_selector("h3:has-text('first against second')")
    target = page.locator("td button:visible").first
    expected = int(target.inner_text())
    target.click()
    shown.wait_for_count(expected)
    assert page.is_visible(".choices button[aria-pressed=true]")
    shown.check()


def test_sql_answers_and_refuses(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["one"])
    page = shown.page
    page.click("nav button:has-text('SQL')")
    page.fill("textarea", "select attack, count(*) as n from outcomes group by 1 order by 1")
    page.focus("textarea")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("td:text-is('60')")
    page.fill("textarea", "drop view outcomes")
    page.click("button:text-is('Run')")
    page.wait_for_selector("pre[role=alert]")
    assert "one SELECT" in page.inner_text("pre[role=alert]")
    # The browser reports the status 400 of a refused request itself.
    assert [text for text in shown.wrong if "400" not in text] == []


def test_names_are_never_markup(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["hostile"])
    page = shown.page
    assert HOSTILE in page.inner_text(".tile strong")
    page.click("details.values:has(summary:text-is('class')) summary")
    assert HOSTILE in page.inner_text("details.values:has(summary:text-is('class'))")
    page.click("text=Weak classes and regions")
    page.wait_for_selector(".gallery-view table th:has-text('img')")
    page.click("nav button:has-text('SQL')")
    page.fill("textarea", "select label_name from records limit 1")
    page.click("button:text-is('Run')")
    page.wait_for_selector("th:visible:has-text('img')")
    assert page.title() != "broken"
    assert page.query_selector("img[src=x]") is None
    shown.check()


def test_a_run_without_a_model_shows_its_records_and_says_why(browser: Any, served: Any) -> None:
    shown = Shown(browser, served["bare"])
    page = shown.page
    page.click(".tile >> nth=0 >> button")
    page.wait_for_selector(f".message:has-text('{REASON}')")
    assert page.is_visible(".tiles")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_fit_and_have_no_serious_finding_of_axe(
    browser: Any, served: Any, width: int, scheme: str
) -> None:
    shown = Shown(browser, served["two"], width, scheme)
    page = shown.page
    for view in ("Records", "Weak classes and regions", "What changed", "SQL"):
        page.click(f"nav button:has-text('{view}')")
        if view == "Records":
            for fold in page.query_selector_all(".filters, .values"):
                fold.evaluate("fold => { fold.open = true; }")
        elif view != "SQL":
            page.wait_for_selector(".finding:visible")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in SERIOUS] == []
    ink = page.evaluate("getComputedStyle(document.querySelector('.gallery-view h2')).color")
    assert ink == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(232, 234, 237)")
    shown.check()
